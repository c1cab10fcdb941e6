"""A class of honest and hostile students becomes the right table, in one command that ends."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from xml.etree import ElementTree

import nbformat
import pytest
from notebooks import EXERCISES, SOLUTIONS, chapter_number
from students import FILE, HOSTILE, HOSTILE_FILES, cells_of, notebook, saved_by_others

from minids.cli import grade as grade_command
from minids.course import checks, judge
from minids.course.checks import OpenTask
from minids.course.exercises import NAMES
from minids.course.grade import Grade, grade, printable
from minids.course.notebooks import ROOT

ASKED = checks.graded(chapter_number(SOLUTIONS[0]))
POINTS = sum(exercise.points for exercise in ASKED)
FIRST, SECOND = ASKED[:2]
SOLVED, BLANK = cells_of(SOLUTIONS[0]), cells_of(EXERCISES[0])


AWAIT = "import asyncio\nawait asyncio.sleep(0)"
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


def honest() -> dict[str, tuple[int, list[str]]]:
    """Points and cells of honest students."""
    seven = f"def {FIRST.name}(*arguments):\n    return 7"
    students = {
        "right": (POINTS, SOLVED),
        "no check cells": (POINTS, [cell for cell in SOLVED if "check(" not in cell]),
        "one cell": (POINTS, ["\n\n".join(SOLVED)]),
        "reversed": (POINTS, SOLVED[:1] + SOLVED[:0:-1]),
        "wrong": (POINTS - FIRST.points, [*SOLVED, seven]),
        "half": (FIRST.points, [*BLANK, SOLVED[1]]),
        "blank": (0, BLANK),
        "empty": (0, []),
        "constant": (0, [f"def {exercise.name}(*arguments):\n    return 0" for exercise in ASKED]),
        "unparsable": (POINTS, ["def broken(:", *SOLVED]),
        "crashing": (POINTS - SECOND.points, ["1 / 0", *SOLVED, f"del {SECOND.name}"]),
        "greedy": (POINTS, ["b = bytearray(2**40)", *SOLVED]),
        "exits": (POINTS, [*SOLVED, "exit()"]),
        "quits": (POINTS, [*SOLVED, "quit"]),
        "system exit": (POINTS, ["raise SystemExit", *SOLVED, "import sys\nsys.exit(1)"]),
        "interrupted": (POINTS, ["raise KeyboardInterrupt", *SOLVED]),
        "json by accident": (POINTS, ["import json\njson = {}", *SOLVED]),
        "outputs": (POINTS, ["print('x' * 10**7)", "import warnings\nwarnings.warn('x')", PLOT, *SOLVED]),
        "magic": (POINTS, ["%matplotlib inline\n%time 1 + 1", "!pip install something", "%%time\nx = 1", *SOLVED]),
        "timed": (POINTS, [SOLVED[0], *("%%time\n" + cell for cell in SOLVED[1:])]),
        "asks, awaits, recurses": (
            POINTS,
            ["name = input('who are you?')", AWAIT, "def f(): return f()\nf()", *SOLVED],
        ),
        "threads": (
            POINTS,
            ["import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()", *SOLVED],
        ),
        "writes": (POINTS, ["open('notes.txt', 'w').write('x')\nassert open('notes.txt').read() == 'x'", *SOLVED]),
        "shows": (
            POINTS,
            [
                "from minids.course import show\nfrom minids.course.checks import hint\nhint('0.1')",
                "import numpy, einops, torch\ntorch.ones(2) @ torch.ones(2)",
                *SOLVED,
            ],
        ),
        "hanging": (POINTS, [*SOLVED, "while True:\n    pass"]),
    }
    return students


SPELLED = {"lms prefix": f"anna_{FILE}"}  # student: file name
NAMED = {
    "M\udcfcller": ("M\\udcfcller", f"Copy of {FILE}"),  # student: as the tables show it, file name
    "=1+1": ("=1+1", "00_claims - Copy.ipynb"),
    "学生": ("学生", "00_claims copy.ipynb"),
    "a\x1b[2Kb": ("a\\x1b[2Kb", FILE.upper()),
    "new\nline": ("new line", "00_claims (1).ipynb"),
}


@pytest.fixture(scope="module")
def expected():
    """The points of every student of the class."""
    points = {name: points for name, (points, _) in honest().items()}
    points |= dict.fromkeys((*SPELLED, *saved_by_others([]), "zipped", *(shown for shown, _ in NAMED.values())), POINTS)
    return points | {name: case.points for name, case in HOSTILE.items()} | dict.fromkeys(HOSTILE_FILES, 0)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A whole class, graded by the command at once, as a teacher would: what it prints, and the folder of its files."""
    folder, results = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("results")
    for name, (_, cells) in honest().items():
        notebook(folder / name / FILE, *cells)
    for name, file in (SPELLED | {name: file for name, (_, file) in NAMED.items()}).items():
        notebook(folder / name / file, *SOLVED)
    for name, content in saved_by_others(SOLVED).items():
        (folder / name).mkdir()
        (folder / name / FILE).write_bytes(content)
    with zipfile.ZipFile(folder / "zipped.zip", "w") as archive:
        archive.write(folder / "right" / FILE, f"homework/{FILE}")
    for name, case in HOSTILE.items():
        notebook(folder / name / FILE, *case.cells(SOLVED))
    for name, make in HOSTILE_FILES.items():
        (folder / name).mkdir()
        make(folder / name / FILE)
    (folder / "a file, not a student.txt").write_text("")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / f"._{FILE}").write_bytes(b"\0\5\26\7")
    options = ["--csv", str(results / "table.csv"), "--junit", str(results / "table.xml"), "--seconds", "10"]
    command = [sys.executable, "-m", "minids", "grade", str(folder), *options]
    narrow = os.environ | {"PYTHONIOENCODING": "cp1252"}  # a redirected terminal on Windows
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, env=narrow, timeout=1800)
    assert finished.returncode == 0, finished.stderr.decode()
    assert b"Traceback" not in finished.stderr, finished.stderr.decode()
    return finished.stdout.decode("cp1252"), results


@pytest.fixture(scope="module")
def graded(tables):
    with (tables[1] / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Grade(**row | {"points": int(row["points"]), "out_of": int(row["out_of"])}) for row in rows]


def of(graded, student):
    rows = [row for row in graded if row.student == student]
    assert [row.exercise for row in rows] == [exercise.id for exercise in ASKED], student
    return rows


def test_the_class_is_large_enough():
    assert len(HOSTILE) + len(HOSTILE_FILES) >= 40
    assert len(honest()) + len(SPELLED) + len(saved_by_others([])) + 1 + len(NAMED) >= 40


def test_every_honest_point_is_given_and_every_hostile_one_refused(graded, expected):
    students = dict.fromkeys(row.student.removeprefix("'") for row in graded)
    earned = {name: sum(row.points for row in graded if row.student.removeprefix("'") == name) for name in students}
    names = earned.keys() | expected.keys()
    assert {n: (earned.get(n), expected.get(n)) for n in names if earned.get(n) != expected.get(n)} == {}


def test_points_and_status_are_within_bounds(graded):
    assert {row.status for row in graded} == {"passed", "failed", "todo", "error"}
    assert all(0 <= row.points <= row.out_of and (row.status == "passed") == (not row.message) for row in graded)


def test_the_tables_say_the_same_and_are_well_formed(tables, graded, expected):
    printed, results = tables
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed.replace("\r\n", "\n"))
    sums = dict(re.findall(rf"^(\S.*?) +sum +(\d+)/{POINTS}$", printed, re.MULTILINE))
    shown = {name.encode("cp1252", "replace").decode("cp1252"): points for name, points in expected.items()}
    assert {student.strip(): int(points) for student, points in sums.items()} == shown
    suites = ElementTree.parse(results / "table.xml").getroot()
    assert {suite.get("name") for suite in suites} == set(expected)
    for suite in suites:
        assert len(suite) == len(ASKED)
        passed = sum(len(case) == 0 for case in suite)
        name = suite.get("name")
        assert passed == sum(row.status == "passed" for row in graded if row.student.removeprefix("'") == name)
    with (results / "table.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_messages_say_what_happened(graded):
    def messages(student):
        return {row.message for row in of(graded, student)}

    assert "got 7" in of(graded, "wrong")[0].message
    assert "does not define" in of(graded, "crashing")[1].message
    assert "code cell 1: ZeroDivisionError: division by zero" in of(graded, "crashing")[1].message
    assert messages("empty") == {f"the notebook does not define {e.name}" for e in ASKED}
    assert messages("stubborn") == {"the notebook's process: took too long"}
    assert messages("dies") == {"the notebook's process: the process ended without an answer"}
    assert messages("link to the solutions") == {f"{FILE}: a link"}
    assert all(message.startswith("not a notebook, or a damaged one: ") for message in messages("garbage"))
    assert messages("nothing") == {"not submitted"}


def test_a_table_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    for options, words in (
        (["--csv", str(tmp_path / "no" / "table.csv")], "there is no folder"),
        (["--csv", "same", "--junit", "same"], "are the same file"),
        (["--junit", str(tmp_path)], "is a folder: name a file for the table"),
        (["--seconds", "inf"], "seconds=inf: must be positive and finite"),
        (["--workers", "0"], "workers=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            grade_command.run("minids grade", [str(tmp_path), *options])


def test_nothing_to_grade_is_one_line(tmp_path):
    command = [sys.executable, "-m", "minids", "grade", str(tmp_path / "class")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2 and "is not a folder or a zip file" in finished.stderr
    with pytest.raises(ValueError, match="seconds=0: must be positive and finite"):
        next(grade(tmp_path, seconds=0))


def test_rows_are_written_as_they_are_made(tmp_path):
    for name in ("a", "b", "c"):
        notebook(tmp_path / "class" / name / FILE, *SOLVED)
    notebook(tmp_path / "class" / "z" / FILE, "import time\ntime.sleep(600)")
    command = [sys.executable, "-m", "minids", "grade", "class", "--csv", "table.csv", "--junit", "table.xml"]
    temporary = tempfile.mkdtemp()  # not in tmp_path: the path of a socket has at most 107 letters
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": temporary}
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    try:
        wanted = 1 + 3 * len(ASKED)
        for _ in range(600):
            table = tmp_path / "table.csv"
            if table.exists() and len(table.read_text().splitlines()) == wanted:
                break
            time.sleep(0.2)
        assert len((tmp_path / "table.csv").read_text().splitlines()) == wanted
        process.send_signal(2)
        assert process.wait(60) == 130
        assert not [name for name in os.listdir(temporary) if name.startswith("minids")]
        assert len(ElementTree.parse(tmp_path / "table.xml").getroot()) == 3, "what was made is in both tables"
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(temporary)


def test_equal_copies_count_once_and_other_chapters_can_be_left_out(tmp_path):
    notebook(tmp_path / "anna" / "a" / FILE, *SOLVED)
    shutil.copy(tmp_path / "anna" / "a" / FILE, tmp_path / "anna" / "00_claims (1).ipynb")
    notebook(tmp_path / "anna" / "other" / "02_mla.ipynb", "1")
    rows = list(grade(tmp_path, chapters=(0,)))
    assert [row.exercise for row in rows] == [exercise.id for exercise in ASKED]
    assert sum(row.points for row in rows) == POINTS


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\nb\r\tc", "a b c"),
        ("\x1b[2K", "\\x1b[2K"),
        ("\ud800", "\\ud800"),
        ("é学☺", "é学☺"),
        ("\u202eabc", "\\u202eabc"),
    ],
)
def test_what_cannot_be_shown_is_escaped(text, shown):
    assert printable(text) == shown


def test_the_names_of_the_chapters_are_those_of_the_notebooks():
    assert NAMES == {int(path.name[:2]): path.stem for path in SOLUTIONS}


def test_a_chapter_of_the_course_with_open_tasks_is_graded_without_them(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "exercises", lambda chapter: [*ASKED, OpenTask("0.9", "essay", ("a reason",))])
    assert checks.graded(0) == ASKED and len(checks.exercises(0)) == len(ASKED) + 1
    content = nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])).encode()
    assert len(list(judge.judge(content, 0, 20.0, ()))) == len(ASKED)
    notebook(tmp_path / "anna" / FILE, "1")
    assert [row.exercise for row in grade(tmp_path)] == [exercise.id for exercise in ASKED]


def test_json_of_the_solution_is_read_as_the_course_writes_it():
    content = json.loads(SOLUTIONS[0].read_text(encoding="utf-8"))
    assert nbformat.validator.isvalid(content)
