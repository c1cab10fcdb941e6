"""Passed exercises are kept in a small file of this checkout, and shown."""

import os
import subprocess

import pytest

from minids.course import checks, progress
from minids.course.checks import graded
from minids.course.notebooks import ROOT

ASKED = graded(0)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "ROOT", tmp_path)
    monkeypatch.setattr(progress, "FILE", tmp_path / ".progress.json")
    (tmp_path / "exercises").mkdir()
    monkeypatch.chdir(tmp_path / "exercises")
    return tmp_path


def test_a_passed_check_is_kept_and_counted(checkout):
    first, second = [exercise for exercise in ASKED if hasattr(exercise, "reference")][:2]
    following = next(exercise for exercise in ASKED if exercise not in (first, second))
    report = checks.check(first.id, first.reference)
    assert report.lines[-1] == f"1 of {len(ASKED)} exercises of this chapter are done"
    assert checks.check(second.id, second.reference).lines[-1].startswith("2 of")
    assert progress.done() == {first.id: first.points, second.id: second.points}
    table = list(progress.as_text([("00_claims", ASKED)]))
    points = f"{first.points + second.points}/{sum(exercise.points for exercise in ASKED)}"
    assert table[1].split() == ["00_claims", f"2/{len(ASKED)}", points, following.id, following.name]


def test_a_failed_check_and_one_elsewhere_are_not_kept(checkout, monkeypatch):
    checks.check(ASKED[0].id, lambda *arguments: 0)
    monkeypatch.chdir(checkout)
    checks.check(ASKED[0].id, ASKED[0].reference)
    assert progress.done() == {} and not progress.FILE.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"0.1": "x"}', "\xff"])
def test_a_damaged_file_counts_as_nothing_done(checkout, content):
    progress.FILE.write_text(content, encoding="latin-1")
    assert progress.done() == {}
    assert checks.check(ASKED[0].id, ASKED[0].reference).status == "passed"
    assert progress.done() == {ASKED[0].id: ASKED[0].points}


def test_the_file_never_enters_git():
    ignored = subprocess.run(["git", "check-ignore", ".progress.json"], cwd=ROOT, capture_output=True)
    assert ignored.returncode == 0


def test_the_command_prints_a_row_for_each_chapter():
    command = [os.sys.executable, "-m", "minids", "progress"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in printed[1:]] == [
        path.stem for path in sorted((ROOT / "solutions").glob("*.ipynb"))
    ]
