"""A course is handed out and graded as it comes back."""

import csv
import shutil
import subprocess
import sys

import pytest

from minids.course.notebooks import ROOT


def minids(folder, *arguments):
    command = [sys.executable, "-m", "minids", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=None)


@pytest.mark.parametrize("style", ["plain", "nbgrader"])
def test_what_is_handed_out_comes_back_and_is_graded(tmp_path, style):
    made = minids(ROOT, "handout", str(tmp_path / "out"), "--style", style, "--chapters", "0", "2")
    assert made.returncode == 0, made.stderr
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.ipynb"))
    names = ["00_claims.ipynb", "02_mla.ipynb"]
    assert files == (names if style == "plain" else [f"release/{name[:-6]}/{name}" for name in names])
    home = tmp_path / "submitted" / "anna"
    shutil.copytree(tmp_path / "out" / ("release" if style == "nbgrader" else ""), home)
    graded = minids(ROOT, "grade", str(tmp_path / "submitted"), "--csv", str(tmp_path / "points.csv"))
    assert graded.returncode == 0, graded.stderr
    with (tmp_path / "points.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"todo"} and {row["exercise"][0] for row in rows} == {"0", "2"}


def test_mistakes_are_one_line_and_make_nothing(tmp_path):
    for arguments, words in (
        ([str(tmp_path)], "exists: choose another folder"),
        ([str(tmp_path / "x"), "--chapters", "99"], "chapters=99: must be from 0 to"),
    ):
        failed = minids(ROOT, "handout", *arguments)
        assert failed.returncode == 2 and words in failed.stderr and failed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
