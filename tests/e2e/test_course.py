"""course.py, as far as it can be tried without installing anything: what it says, and what it would run."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

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


def test_nothing_is_installed_twice(course, monkeypatch):
    calls = []

    def pretend(command, **options):
        calls.append([str(part) for part in command])
        return 0

    monkeypatch.setattr(course.subprocess, "call", pretend)
    course.set_up()
    assert [call[2] for call in calls] == ["venv", "pip"]
    assert (course.ENVIRONMENT / "share/jupyter/lab/settings/overrides.json").exists()
    course.set_up()
    assert len(calls) == 2


def test_a_failed_installation_is_not_taken_for_done(course, monkeypatch):
    monkeypatch.setattr(course.subprocess, "call", lambda command, **options: 1 if "pip" in command else 0)
    with pytest.raises(SystemExit, match="could not install"):
        course.set_up()
    assert not (course.ENVIRONMENT / "requirements.sha256").exists()


def test_ci_runs_the_test_command_of_the_readme():
    command = "python3 course.py test"
    assert command in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == command
    steps = re.findall(r"^      - run: (\S.*)$", (ROOT / ".github/workflows/test.yml").read_text(), re.MULTILINE)
    assert steps.count(".ci/run") == 2, "natively and on other processors"
