"""course.py, as far as it can be tried without installing anything: what it says, and what it would run."""

import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat.sign
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def course(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("course", ROOT / "course.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ENVIRONMENT", tmp_path / ".venv")
    return module


def run(*options, argument):
    command = [sys.executable, *options, ROOT / "course.py", argument]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("argument", "status", "says"), [("--help", 0, "train"), ("tran", 2, "unknown task 'tran'")])
def test_it_speaks_before_it_installs(argument, status, says):
    finished = run(argument=argument)
    assert finished.returncode == status
    assert says in finished.stdout + finished.stderr


def test_it_needs_the_standard_library_only():
    """Run without site-packages, where an import of anything else would fail."""
    finished = run("-S", "-I", argument="--help")
    assert finished.returncode == 0 and "course.py test" in finished.stdout


def test_the_commands_that_it_runs(course):
    assert course.command_of("train") == ["minids", "train"]
    assert course.command_of("test") == ["pytest", "--nbval", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    lab = course.command_of("lab")
    assert lab[0] == "jupyterlab" and f"--ServerApp.root_dir={ROOT}" in lab


def test_the_drawings_of_the_chapters_are_signed_before_jupyterlab_opens(course, monkeypatch, tmp_path):
    """JupyterLab shows no SVG of a notebook that nobody on this machine has run or signed."""
    monkeypatch.setattr(course, "set_up", lambda *arguments: None)
    monkeypatch.setattr(course, "python_of", lambda environment: Path(sys.executable))
    monkeypatch.setattr(course.signal, "signal", lambda *arguments: None)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))

    made, real = [], subprocess.Popen

    def start(command, **options):
        if "jupyterlab" not in command:
            return real(command, **options)
        stored = nbformat.read(sorted((ROOT / "chapters").glob("*.ipynb"))[0], as_version=4)
        made.append(nbformat.sign.NotebookNotary().check_signature(stored))
        return real([sys.executable, "-c", ""])

    monkeypatch.setattr(course.subprocess, "Popen", start)
    assert course.main("lab") == 0 and made == [True]


@pytest.fixture
def calls(course, monkeypatch):
    """What set_up runs, without the installation: environments are made for real, packages are not."""
    made, real = [], subprocess.call

    def record(command, **options):
        made.append([str(part) for part in command if part != "-I"][1:])
        return 0 if "install" in made[-1] else real(command, **options)

    monkeypatch.setattr(course.subprocess, "call", record)
    return made


CHECK, MAKE, INSTALL = ["-c", "import pip"], ["-m", "venv"], ["-m", "pip"]


def test_nothing_is_installed_twice(course, monkeypatch):
    calls = []

    def pretend(command, **options):
        calls.append([str(part) for part in command if part != "-I"][1:3])
        return 0

    monkeypatch.setattr(course.subprocess, "call", pretend)
    course.set_up()
    assert calls == [CHECK, MAKE, INSTALL]
    assert (course.ENVIRONMENT / "share/jupyter/lab/settings/overrides.json").exists()
    (link,) = course.ENVIRONMENT.rglob("minids.pth")
    assert (link.parent / link.read_text().strip()).resolve() == course.ROOT
    course.set_up()
    assert calls[3:] == [CHECK]


@pytest.mark.parametrize("fault", ["its Python is gone", "its packages are gone"])
def test_a_broken_environment_is_made_anew(course, calls, monkeypatch, tmp_path, fault):
    """Without packages: after an upgrade of the system's Python, whose link then looks for them elsewhere."""
    monkeypatch.setattr(course, "ENVIRONMENT", tmp_path / "größe 专家 with spaces" / ".venv")
    python = course.python_of(course.ENVIRONMENT)
    if fault == "its Python is gone":
        python.parent.mkdir(parents=True)
        python.symlink_to("/gone/python3.12")
    else:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", course.ENVIRONMENT], check=True)
    (course.ENVIRONMENT / "left over").touch()
    wanted = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    (course.ENVIRONMENT / "requirements.sha256").write_text(wanted)
    course.set_up()
    assert [call[:2] for call in calls] == [CHECK, MAKE, INSTALL]
    assert course.works(course.ENVIRONMENT) and not (course.ENVIRONMENT / "left over").exists()


@pytest.mark.skipif(os.name == "nt", reason="a path of Windows holds no semicolon that matters here")
def test_a_path_with_a_colon_is_refused_with_the_reason(course, monkeypatch, tmp_path):
    monkeypatch.setattr(course, "ENVIRONMENT", tmp_path / "a:b" / ".venv")
    with pytest.raises(SystemExit, match="no virtual environment can be in a path with ':': rename the folder"):
        course.set_up()
    assert not (tmp_path / "a:b").exists()


SOURCE = (ROOT / "course.py").read_text(encoding="utf-8")


def test_an_older_python_can_parse_it_and_meets_the_version_first():
    body = ast.parse(SOURCE, feature_version=(3, 6)).body
    first = next(i for i, node in enumerate(body) if not isinstance(node, ast.Expr | ast.Import | ast.ImportFrom))
    assert isinstance(body[first], ast.If) and "version_info" in ast.unparse(body[first].test)
    names = {name for node in body[:first] if not isinstance(node, ast.Expr) for name in module_names(node)}
    assert names <= {"hashlib", "json", "os", "signal", "subprocess", "sys", "pathlib"}  # all in Python 3.6


def module_names(node):
    return [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


@pytest.mark.parametrize("minor", [6, 7, 8, 9, 10])
def test_an_older_python_gets_one_line(minor, tmp_path):
    python = shutil.which(f"python3.{minor}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        python = None  # then this one, which says that it is older
        program = f"import runpy, sys; sys.version_info = (3, {minor}, 9); sys.version = '3.{minor}.9 (main)'; "
        command = [sys.executable, "-c", f"{program}runpy.run_path({str(ROOT / 'course.py')!r}, run_name='__main__')"]
    else:
        command = [python, str(ROOT / "course.py"), "train"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    line = rf"course.py: Python 3\.{minor}\.\d+ is too old: 3\.11 or newer is needed\n"
    assert re.fullmatch(line, finished.stderr), finished.stderr


def test_a_failed_installation_is_not_taken_for_done(course, monkeypatch):
    monkeypatch.setattr(course.subprocess, "call", lambda command, **options: 1 if "pip" in command else 0)
    with pytest.raises(SystemExit, match="could not install"):
        course.set_up()
    assert not (course.ENVIRONMENT / "requirements.sha256").exists()


def test_ci_runs_the_test_command_of_the_readme():
    command = "python3 course.py test"
    assert command in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == command
    for workflow in ("test", "weekly"):  # natively and on other processors
        steps = re.findall(r"^      - run: (\S.*)$", workflow_text(workflow), re.MULTILINE)
        assert steps.count(".ci/run") == 1


def workflow_text(name):
    return (ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["test", "weekly", "site"])
def test_a_workflow_has_least_permissions_and_pinned_actions(name):
    text = workflow_text(name)
    assert re.search(r"^permissions:\n  contents: read$", text, re.MULTILINE)
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action, _ in used)
    assert all(re.fullmatch(r" # v[\d.]+", version) for _, version in used)


def test_the_weekly_run_imitates_the_processors_of_a_contributor(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    known = [tuple(settings.values()) for settings in importlib.import_module("processors").PROCESSORS.values()]
    weekly = re.findall(r"aten: (\w+), mkl: (\w+), onednn: (\w+)", workflow_text("weekly"))
    assert len(weekly) == 2 and set(weekly) <= set(known)


def test_the_containers_set_up_the_environment_of_the_course():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert f"FROM python:{oldest}" in dockerfile and container["image"].endswith(f"python:{oldest}")
    assert "course.set_up()" in dockerfile and "course.set_up()" in container["postCreateCommand"]
    assert "EXPOSE 8888" in dockerfile and container["forwardPorts"] == [8888]
