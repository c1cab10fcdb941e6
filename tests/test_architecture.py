"""The package keeps its shape: imports go one way down, files stay short, the model needs no heavy company."""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest
from importlinter import cli

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "minids").rglob("*.py"))


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def lint(config):
    return cli.lint_imports(config_filename=str(config), no_cache=True)


def test_imports_go_one_way_down(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    assert lint(ROOT / "pyproject.toml") == 0, capsys.readouterr().out
    upside_down = tmp_path / "contract.toml"  # the linter does find an import that goes up
    upside_down.write_text(
        '[tool.importlinter]\nroot_package = "minids"\n[[tool.importlinter.contracts]]\n'
        'name = "upside down"\ntype = "layers"\nlayers = ["minids.config", "minids.model"]\n'
    )
    assert lint(upside_down) == 1


def test_the_contract_sees_every_room():
    """A room that the contract does not name could import anything."""
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[[tool.importlinter.contracts]]")[1]
    rooms = {p.name for p in (ROOT / "minids").iterdir() if (p / "__init__.py").exists()}
    assert rooms and all(f"minids.{room}" in contract for room in rooms)


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_a_file_can_be_read_in_one_sitting(path):
    assert lines(path) <= 350


def lines_of_code(path):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    source = path.read_text(encoding="utf-8")
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in layout]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return len(code)


def test_a_line_of_code_is_neither_blank_nor_comment_nor_docstring(tmp_path):
    source = '"""One.\n\nTwo."""\n\n# why\nx = [\n    1,  # one\n]\n\ndef f():\n    """Say."""\n    return """a\nb"""\n'
    (tmp_path / "x.py").write_text(source)
    assert lines_of_code(tmp_path / "x.py") == 6


def test_the_package_stays_compact():
    """The model, its data, training and decoding can be read in a day; the rest only grows with a reason.

    The exercises are the course's text in another form, a module for each chapter, and are not counted.
    """
    rooms = Counter()
    for path in FILES:
        if path.parent.name != "exercises":
            rooms[path.parent.name] += lines_of_code(path)
    assert sum(rooms[room] for room in ("model", "data", "training", "inference")) < 2200
    assert sum(rooms.values()) < 7100


def test_the_model_needs_no_heavy_company():
    heavy = ["transformers", "datasets", "matplotlib", "ipywidgets", "jupyterlab", "pandas"]
    result = python(f"import sys, minids.model.transformer; print([name for name in {heavy} if name in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_config_needs_no_torch():
    """Its own imports only: the package's face, `minids/__init__.py`, does import torch."""
    source = (ROOT / "minids" / "config.py").read_text(encoding="utf-8")
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= set(sys.stdlib_module_names)


def test_the_code_is_clean():
    """Unused names, import order, line length: what ruff finds with the settings of pyproject.toml."""
    command = [sys.executable, "-m", "ruff", "check", "minids", "tests", "benchmarks", "course.py"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
