"""Command lines in this process, in a folder of their own with a small text, and what every refused one leaves."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from training.helpers import counting_text

from minids.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"text": document.text, "domain": document.domain}) for document in counting_text())
    Path("text.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def minids(monkeypatch, capsys):
    """Run a command line in this process: status, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["minids", *map(str, arguments)])
        status = main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def contents(place):
    return {path: (path.stat().st_mtime_ns if path.is_file() else 0) for path in place.rglob("*")}


@pytest.fixture
def refused(folder, minids, monkeypatch):
    """Assert that a command line ends with status 2 and one line that holds `message`, and changes no file."""
    monkeypatch.delenv("MINIDS_TRACEBACK", raising=False)

    def check(command, message):
        before = contents(folder)
        status, _, error = minids(*(shlex.split(command) if isinstance(command, str) else command))
        assert status == 2, error
        assert error.startswith("minids: ") and error.count("\n") == 1 and error.endswith("\n"), error
        assert message in error and "Traceback" not in error and len(error) < 1000, error
        assert contents(folder) == before

    return check
