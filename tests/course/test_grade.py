"""A folder of submissions becomes the right table, whatever the notebooks in it do."""

import csv
import re
import socket
import subprocess
import sys
from xml.etree import ElementTree

import nbformat
import pytest
from notebooks import EXERCISES, SOLUTIONS, chapter_number

from minids.course import grade as grading
from minids.course.checks import exercises
from minids.course.grade import Grade, grade
from minids.course.notebooks import ROOT, read

ASKED = exercises(chapter_number(SOLUTIONS[0]))
POINTS = sum(exercise.points for exercise in ASKED)
FILE = SOLUTIONS[0].name


def notebook(path, *sources):
    path.parent.mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def solution():
    return [cell.source for cell in read(SOLUTIONS[0]).cells if cell.cell_type == "code"]


def handed_out():
    return [cell.source for cell in read(EXERCISES[0]).cells if cell.cell_type == "code"]


FIRST, SECOND = ASKED[:2]
FORGED = """
import minids.course.checks as checks
checks.check = lambda *_: checks.Report("1.1", "x", "passed", 9, 9)
checks.Function.check = lambda *_: checks.Report("1.1", "x", "passed", 9, 9)
"""


EARNED = dict.fromkeys(("right", "downloaded", "no_check_cells", "unparsable", "hanging", "greedy", "chatty"), POINTS)
EARNED |= {"half": FIRST.points, "wrong": POINTS - FIRST.points, "crashing": POINTS - SECOND.points}
EARNED |= {"forging": POINTS - FIRST.points}
EARNED |= dict.fromkeys(("blank", "constant", "empty", "renamed", "stubborn", "dying", "garbage", "absent"), 0)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A whole class, graded by the command at once, as a teacher would: what it prints, and the folder of its files."""
    folder, results = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("results")
    notebook(folder / "right" / FILE, *solution())
    notebook(folder / "downloaded" / FILE.replace(".", " (1)."), *solution())
    notebook(folder / "no_check_cells" / "week 1" / FILE, *[cell for cell in solution() if "check(" not in cell])
    notebook(folder / "wrong" / FILE, *solution(), f"def {FIRST.name}(*arguments):\n    return 7")
    notebook(folder / "half" / FILE, *handed_out(), solution()[1])
    notebook(folder / "constant" / FILE, *(f"def {exercise.name}(*arguments):\n    return 0" for exercise in ASKED))
    notebook(folder / "unparsable" / FILE, "def broken(:", *solution())
    notebook(folder / "empty" / FILE)
    notebook(folder / "renamed" / "my homework.ipynb", *solution())
    notebook(folder / "crashing" / FILE, "1 / 0", *solution(), f"del {SECOND.name}")
    notebook(folder / "hanging" / FILE, *solution(), "while True:\n    pass")
    notebook(folder / "stubborn" / FILE, "import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass")
    notebook(folder / "dying" / FILE, "import os\nos._exit(0)", *solution())
    notebook(folder / "forging" / FILE, FORGED, *solution(), f"def {FIRST.name}(*arguments):\n    return 7")
    notebook(folder / "greedy" / FILE, "b = bytearray(2**40)", *solution())
    notebook(folder / "chatty" / FILE, *solution(), "while True:\n    print('x' * 10**6)")
    (folder / "garbage").mkdir()
    (folder / "garbage" / FILE).write_text("this is no notebook")
    (folder / "absent").mkdir()
    (folder / "a file, not a student.txt").write_text("")
    for place in ("chapters", "exercises", "solutions"):  # a whole copy of the course
        (folder / "blank" / place).mkdir(parents=True)
        (folder / "blank" / place / FILE).write_text(EXERCISES[0].read_text(encoding="utf-8"), encoding="utf-8")
    options = ["--csv", str(results / "table.csv"), "--junit", str(results / "table.xml"), "--seconds", "20"]
    command = [sys.executable, "-m", "minids", "grade", str(folder), *options]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, results


@pytest.fixture(scope="module")
def graded(tables):
    with (tables[1] / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Grade(**row | {"points": int(row["points"]), "out_of": int(row["out_of"])}) for row in rows]


def of(graded, student):
    rows = [row for row in graded if row.student == student]
    assert [row.exercise for row in rows] == [exercise.id for exercise in ASKED]
    return rows


def points(graded, student):
    return sum(row.points for row in of(graded, student))


def test_right_answers_earn_all_points_with_or_without_check_cells(graded):
    assert points(graded, "right") == points(graded, "no_check_cells") == POINTS
    assert all(row.status == "passed" and not row.message for row in of(graded, "right"))


def test_a_wrong_answer_costs_its_points_and_is_told_why(graded):
    first, *others = of(graded, "wrong")
    assert (first.status, first.points) == ("failed", 0)
    assert "got 7" in first.message
    assert all(row.status == "passed" for row in others)


def test_after_a_crash_the_other_cells_still_count(graded):
    first, second, *others = of(graded, "crashing")
    assert first.status == "passed" and all(row.status == "passed" for row in others)
    assert second.status == "error"
    assert f"does not define {SECOND.name} (cell 1: ZeroDivisionError: division by zero)" in second.message


def test_endless_cells_are_stopped_and_the_rest_counts(graded):
    assert points(graded, "hanging") == POINTS
    assert points(graded, "chatty") == POINTS


def test_a_kernel_that_cannot_go_on_is_one_message_for_each_exercise(graded):
    assert {row.message for row in of(graded, "stubborn")} == {"took too long, and did not stop when interrupted"}
    assert {row.message for row in of(graded, "dying")} == {"the kernel died: out of memory, or the notebook ended it"}


def test_memory_is_limited(graded):
    assert points(graded, "greedy") == POINTS  # the allocation failed in its cell, and the rest went on


def test_a_check_that_the_notebook_replaced_earns_nothing(graded):
    first, *others = of(graded, "forging")
    assert first.points == 0 and all(row.status == "passed" for row in others)


def test_what_is_no_notebook_or_not_there_is_named(graded):
    assert all(row.message.startswith(f"{FILE} is not a notebook") for row in of(graded, "garbage"))
    assert {row.message for student in ("absent", "renamed") for row in of(graded, student)} == {"not submitted"}
    assert [row.message for row in of(graded, "empty")] == [f"the notebook does not define {e.name}" for e in ASKED]


def test_of_a_whole_copy_of_the_course_the_exercises_count(graded):
    assert {(row.status, row.message) for row in of(graded, "blank")} == {("todo", "not started yet")}


def test_what_is_begun_counts_and_what_is_constant_does_not(graded):
    assert [row.status for row in of(graded, "half")] == ["passed"] + ["todo"] * (len(ASKED) - 1)
    assert {row.status for row in of(graded, "constant")} == {"failed"}


def test_the_printed_table_the_csv_and_the_xml_say_the_same(tables, graded):
    printed, results = tables
    sums = re.findall(rf"^(\S+) +sum +(\d+)/{POINTS}$", printed, re.MULTILINE)
    assert {student: int(points) for student, points in sums} == EARNED
    assert {student: points(graded, student) for student in EARNED} == EARNED
    assert len(graded) == len(EARNED) * len(ASKED) and "a file, not a student" not in printed
    suites = ElementTree.parse(results / "table.xml").getroot()
    assert [suite.get("name") for suite in suites] == sorted(EARNED)
    for suite in suites:
        kinds = [case[0].tag if len(case) else "passed" for case in suite]
        wanted = {"todo": "failure", "failed": "failure"}
        assert kinds == [wanted.get(row.status, row.status) for row in of(graded, suite.get("name"))]
    assert "got 7" in suites.find("testsuite[@name='wrong']").find(".//failure").get("message")


SPYING = f"""
import os, socket
seen = [os.path.exists(place) for place in ({str(SOLUTIONS[0])!r}, {str(ROOT / "README.md")!r}, {__file__!r})]
try:
    socket.create_connection(("127.0.0.1", PORT), 2)
    seen.append(True)
except OSError:
    seen.append(False)
try:
    open("left.txt", "w").write("x")
    seen.append(True)
except OSError:
    seen.append(False)
def {FIRST.name}(*arguments):
    raise RuntimeError(str(seen))
"""


@pytest.mark.skipif(not grading.isolation_available(), reason="bubblewrap is unavailable here")
def test_isolated_notebook_sees_its_folder_and_the_package_only(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        notebook(tmp_path / "spy" / FILE, SPYING.replace("PORT", str(server.getsockname()[1])))
        first = grade(tmp_path)[0]
    assert "[False, False, False, False, False]" in first.message and not (tmp_path / "spy" / "left.txt").exists()


def test_notebooks_are_graded_without_isolation_too(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "isolation_available", lambda: False)
    notebook(tmp_path / "ann" / FILE, *solution())
    assert sum(row.points for row in grade(tmp_path)) == POINTS
    notebook(tmp_path / "spy" / FILE, SPYING.replace("PORT", "9"))
    assert "[True, True, True" in grade(tmp_path)[-len(ASKED)].message  # what isolation prevents


def test_two_notebooks_of_one_chapter_are_refused(tmp_path):
    notebook(tmp_path / "ann" / "first" / FILE, "1")
    notebook(tmp_path / "ann" / "second" / FILE.replace(".", "-Copy1."), "1")
    assert {row.message for row in grade(tmp_path)} == {"submitted more than once"}


def test_a_hanging_answer_does_not_stop_the_others(tmp_path):
    notebook(tmp_path / "ann" / FILE, *solution(), f"def {FIRST.name}(*arguments):\n    while True: pass")
    first, *others = grade(tmp_path, seconds=15)
    assert (first.status, first.message) == ("error", "took too long")
    assert all(row.status == "passed" for row in others)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "expected a folder for each student"),
    ],
)
def test_nothing_to_grade_is_said_in_a_line(tmp_path, make, words):
    make(tmp_path / "class")
    with pytest.raises(ValueError, match=words):
        grade(tmp_path / "class")
    finished = subprocess.run(
        [sys.executable, "-m", "minids", "grade", str(tmp_path / "class")], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 2 and words in finished.stderr and finished.stderr.count("\n") == 1


def test_a_table_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    command = [sys.executable, "-m", "minids", "grade", str(tmp_path), "--csv", str(tmp_path / "no" / "table.csv")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2 and "there is no folder" in finished.stderr


def test_the_time_of_a_notebook_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="seconds=0: must be positive"):
        grade(tmp_path, seconds=0)


def test_the_chapters_that_can_be_graded_are_those_with_exercises():
    assert grading.CHAPTERS == {int(path.name[:2]) for path in SOLUTIONS}
