"""Grade a class: judge every student's exercise notebooks, and write the tables of points.

Notable choices:
- each notebook has a process of its own for its judge, and another one for its code (minids/course/judge.py). Whatever
  a notebook answers, does or is costs at most that notebook: a judge that dies or takes too long is a row that says so;
- a row is yielded as soon as it and those before it are made, so that nothing is lost if grading is stopped;
- texts from a student's side (names, messages) are made printable before anything else.
"""

import csv
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from xml.etree import ElementTree

from minids.course import judge
from minids.course.checks import graded
from minids.course.exercises import NAMES
from minids.course.submissions import LARGEST, File, Student, find_students
from minids.sandbox.isolation import Layers

SECONDS = 120.0  # of processor time: limit of a cell; the exercises of a notebook share as much


@dataclass(frozen=True)
class Grade:
    """One row of the table: `status` is passed, failed, todo or error; `message` is the first issue."""

    student: str
    exercise: str
    name: str
    points: int
    out_of: int
    status: str
    message: str = ""


def grade(
    submissions: Path, seconds: float = SECONDS, workers: int | None = None, chapters: Sequence[int] = ()
) -> Iterator[Grade]:
    """Grade every student's notebooks, `workers` at a time (by default one per CPU core); yield rows in order.

    `chapters` are expected from all, by default those that at least one student submitted. Raises `ValueError` where
    nothing can be graded.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds!r}: must be positive and finite")
    students = find_students(submissions, NAMES)
    expected = sorted(set(chapters) or {chapter for student in students for chapter in student.notebooks})
    jobs = [(student, chapter) for student in students for chapter in expected]
    layers = judge.find_layers()
    judges: set[BaseProcess] = set()
    place = TemporaryDirectory(prefix="minids-", ignore_cleanup_errors=True)  # a judge that is killed leaves its folder
    threads = ThreadPoolExecutor(workers or os.cpu_count() or 1)  # they wait: the processes do the work
    try:
        outcomes = threads.map(lambda job: _outcomes(job[0], job[1], seconds, layers, judges, place.name), jobs)
        for (student, chapter), outcome in zip(jobs, outcomes, strict=True):
            for exercise, (status, points, message) in zip(graded(chapter), outcome, strict=True):
                name = printable(student.name)
                yield Grade(name, exercise.id, exercise.name, points, exercise.points, status, printable(message))
    finally:  # also where grading is interrupted
        threads.shutdown(wait=False, cancel_futures=True)
        for process in list(judges):
            process.kill()
        threads.shutdown()
        place.cleanup()


def _outcomes(
    student: Student, chapter: int, seconds: float, layers: Layers, judges: set[BaseProcess], place: str
) -> list[judge.Outcome]:
    """Return the outcome of every exercise of the chapter."""
    count = len(graded(chapter))
    files = _different(student.notebooks.get(chapter, []))
    if len(files) != 1:
        return [("error", 0, _not_one(student, files))] * count
    outcomes: list[judge.Outcome] = []
    try:
        content = _read(files[0])
        for outcome in _in_own_process(content, chapter, seconds, layers, judges, place):
            outcomes.append(outcome)
    except ValueError as error:
        outcomes += [("error", 0, f"{files[0].path}: {error}")] * (count - len(outcomes))
    return outcomes + [("error", 0, "the judge ended without a verdict")] * (count - len(outcomes))


def _different(files: list[File]) -> list[File]:
    """Return the files without copies of equal content."""
    if len(files) < 2 or any(file.problem for file in files):
        return files
    try:
        return list({file.read(): file for file in reversed(files)}.values())[::-1]
    except Exception:  # a damaged zip file: reported where it is read
        return files


def _not_one(student: Student, files: list[File]) -> str:
    if files:
        return f"submitted more than once: {', '.join(str(file.path) for file in files[:3])}"
    others = [name for name in student.others if name.lower().endswith((".ipynb", ".zip"))] or student.others
    return f"not submitted; found {', '.join(map(repr, others[:3]))}" if others else "not submitted"


def _read(file: File) -> bytes:
    if file.problem:
        raise ValueError(file.problem)
    try:
        content = file.read()
    except Exception as error:  # a file that vanished, a damaged or encrypted zip file
        raise ValueError(f"cannot be read: {error}") from None
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST >> 20} MiB; clear the outputs")
    return content


def _in_own_process(
    content: bytes, chapter: int, seconds: float, layers: Layers, judges: set[BaseProcess], place: str
) -> Iterator[judge.Outcome]:
    """Judge a notebook in a process, one of `judges` while it lives, which is killed when its time is up."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    arguments = theirs, content, chapter, seconds, layers, place
    process = _context().Process(target=_judge, args=arguments, daemon=True)
    process.start()
    judges.add(process)
    theirs.close()
    deadline = time.monotonic() + 2 * (judge.BUSY * seconds + judge.START)
    try:
        while ours.poll(max(deadline - time.monotonic(), 0)):
            outcome = ours.recv()
            if outcome is None:
                return
            yield outcome
        raise ValueError("took too long")
    except (EOFError, OSError):
        raise ValueError("the judge ended without a verdict: out of memory?") from None
    finally:
        process.kill()
        process.join()
        judges.discard(process)
        ours.close()


def _context() -> ForkServerContext:
    """Return how to start a judge: by forking a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minids.course.judge"])
    return context


def _judge(pipe: Connection, content: bytes, chapter: int, seconds: float, layers: Layers, place: str) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the command, which ends its judges
    torch.set_num_threads(1)
    if sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)  # of the user, which cannot be raised
        limit = 4 * judge.MEMORY if most == resource.RLIM_INFINITY else min(4 * judge.MEMORY, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for outcome in judge.judge(content, chapter, seconds, layers, place):
        pipe.send(outcome)
    pipe.send(None)


def printable(text: str) -> str:
    """Return a text in which line ends are spaces, and what cannot be shown or written is escaped."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def as_text(grades: Iterable[Grade]) -> Iterator[str]:
    """Format the grades as a table for the terminal, line by line as they are made, with each student's sum."""
    yield f"{'student':24}{'exercise':26}{'points':>8}  first issue"
    student, points, out_of = None, 0, 0
    for each in grades:
        if student not in (None, each.student):
            yield f"{student:<23} {'sum':26}{f'{points}/{out_of}':>8}"
            points = out_of = 0
        student, points, out_of = each.student, points + each.points, out_of + each.out_of
        what = f"{f'{each.exercise} {each.name}':26}{f'{each.points}/{each.out_of}':>8}"
        yield f"{student:<23} {what}  {each.message}".rstrip()
    if student is not None:
        yield f"{student:<23} {'sum':26}{f'{points}/{out_of}':>8}"


class CsvFile:
    """The table as CSV, a row per student and exercise, written at once; what a spreadsheet would run is quoted."""

    def __init__(self, path: Path):
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, Grade.__dataclass_fields__)
        self.writer.writeheader()

    def __enter__(self) -> "CsvFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.file.close()

    def write(self, grade: Grade) -> None:
        self.writer.writerow({name: _no_formula(value) for name, value in asdict(grade).items()})
        self.file.flush()


def _no_formula(value: str | int) -> str | int:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_junit(grades: Iterable[Grade], path: Path) -> None:
    """Write the table as JUnit XML: a suite per student, a failure for each exercise that did not pass."""
    suites = ElementTree.Element("testsuites")
    students: dict[str, ElementTree.Element] = {}
    for each in grades:
        if each.student not in students:
            students[each.student] = ElementTree.SubElement(suites, "testsuite", name=each.student)
        name = f"{each.exercise} {each.name}"
        case = ElementTree.SubElement(students[each.student], "testcase", classname=each.student, name=name)
        if each.status != "passed":
            kind = "error" if each.status == "error" else "failure"
            ElementTree.SubElement(case, kind, message=each.message or each.status)
    ElementTree.indent(suites)
    ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)
