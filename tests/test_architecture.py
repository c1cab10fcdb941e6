"""The package keeps its shape: imports go one way down, files stay short, a command imports only what it needs."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import cli

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for folder in ("minids", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
)


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


def test_the_contract_names_every_subpackage():
    """A subpackage that the contract does not name could import anything."""
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[[tool.importlinter.contracts]]")[1]
    subpackages = {p.name for p in (ROOT / "minids").iterdir() if (p / "__init__.py").exists()}
    assert subpackages and all(f"minids.{name}" in contract for name in subpackages)


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


COURSE = ["matplotlib", "PIL", "IPython", "nbformat", "nbclient", "jupyter_client", "ipywidgets"]


@pytest.mark.parametrize(
    "module",
    ["minids.cli.train", "minids.cli.sample", "minids.cli.rl", "minids.cli.r1", "minids.cli.convert", "minids.cli.cost"]
    + ["minids.cli.schedule", "minids.parallel.trainer", "minids.model.transformer"],
)
def test_importing_a_command_imports_nothing_of_the_course(module):
    unwanted = [*COURSE, "transformers", "datasets", "pandas", "tensorboard"]
    code = f"import sys, {module}; print([name for name in {unwanted} if name in sys.modules])"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_root_help_imports_no_command():
    code = (
        "import sys; from minids.cli.main import run; run(['--help']); print([m for m in sys.modules if 'tyro' in m])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("[]")


def test_config_and_cost_need_no_torch():
    """Nor does the package's face: `minids/__init__.py` imports its names when they are used."""
    result = python("import sys, minids.config, minids.cost, minids.cli.cost; print('torch' in sys.modules)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


def test_the_face_of_the_package_has_its_names():
    result = python("from minids import *; import minids; print(MiniDS, generate, train, ModelConfig); minids.nothing")
    assert result.stdout.count("minids.") == 2 and result.stdout.count("<function") == 2
    assert "AttributeError: module 'minids' has no attribute 'nothing'" in result.stderr


def test_the_code_is_clean():
    """Unused names, import order, line length: what ruff finds with the settings of pyproject.toml."""
    command = [sys.executable, "-m", "ruff", "check", "minids", "tests", "benchmarks", "examples", "course.py"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    command[3:4] = ["format", "--check"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
