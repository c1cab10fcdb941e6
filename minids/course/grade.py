"""Grade a class: run every student's exercise notebooks and check the answers with this project's own checks.

A folder of submissions holds one folder per student, with that student's NN_name.ipynb anywhere inside. Each notebook
runs in a fresh kernel of its own. Only the names that it defines at its end count: check cells that a student edited or
deleted neither earn nor cost points. Output is never collected, so a notebook may print without end; time and (on
Linux) memory are limited; a kernel that does not stop when interrupted is killed.

Where bubblewrap is available (Linux), a notebook runs in isolation: it sees its own folder, Python and this package,
has no network, and can write only to a private /tmp. Elsewhere it runs with the rights of the user who grades.
"""

import ast
import contextlib
import csv
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from jupyter_client import BlockingKernelClient, KernelManager
from tqdm import tqdm

from minids.course.checks import Exercise, exercises
from minids.course.notebooks import ROOT, environment, read
from minids.sandbox.isolation import PYTHON, READABLE, IsolationUnavailable, bubblewrap

NAME = re.compile(r"(\d\d)_\w+(-Copy\d+| ?\(\d+\))?\.ipynb")  # JupyterLab and browsers add such suffixes to copies
CHAPTERS = {int(module.stem[-2:]) for module in Path(__file__).with_name("exercises").glob("chapter*.py")}
SECONDS, MEMORY = 120.0, 8 * 2**30  # limits of one notebook: time, and address space in bytes
GRACE = 5.0  # seconds that an interrupted kernel has to stop


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


class KernelLost(Exception):
    """The kernel died, or had to be killed."""


def grade(submissions: Path, seconds: float = SECONDS) -> list[Grade]:
    """Grade every student's notebooks, with a progress bar.

    A chapter that at least one student submitted is expected from all. Raises `ValueError` where nothing can be graded.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds!r}: must be positive")
    if not submissions.is_dir():
        raise ValueError(f"{submissions} is not a folder")
    students = sorted(path for path in submissions.iterdir() if path.is_dir() and not path.name.startswith("."))
    submitted = {student: _notebooks(student) for student in students}
    chapters = sorted({chapter for found in submitted.values() for chapter in found})
    if not chapters:
        raise ValueError(f"{submissions}: expected a folder for each student with notebooks such as 02_mla.ipynb in it")
    grades = []
    for student, chapter in tqdm([(s, c) for s in students for c in chapters], unit="notebook", disable=None):
        outcome = _grade_chapter(submitted[student].get(chapter, []), chapter, seconds)
        for exercise, (status, points, message) in zip(exercises(chapter), outcome, strict=True):
            grades.append(Grade(student.name, exercise.id, exercise.name, points, exercise.points, status, message))
    return grades


def _notebooks(student: Path) -> dict[int, list[Path]]:
    """Return the student's notebooks by chapter with exercises; in a copy of the whole course, those in exercises/."""
    paths = [path for path in sorted(student.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    paths = [path for path in paths if path.parent.name == "exercises"] or paths
    found: dict[int, list[Path]] = {}
    for path in paths:
        match = NAME.fullmatch(path.name)
        if match is not None and int(match[1]) in CHAPTERS:
            found.setdefault(int(match[1]), []).append(path)
    return found


Outcome = tuple[str, int, str]


def _grade_chapter(paths: list[Path], chapter: int, seconds: float) -> list[Outcome]:
    """Return status, points and message of every exercise of the chapter."""
    expected = exercises(chapter)
    if len(paths) != 1:
        return [("error", 0, "submitted more than once" if paths else "not submitted")] * len(expected)
    try:
        cells = [cell.source for cell in read(paths[0]).cells if cell.cell_type == "code"]
    except ValueError as error:
        return [("error", 0, str(error))] * len(expected)
    outcome: list[Outcome] = []
    try:
        with Kernel(paths[0].parent) as kernel:
            trouble = _run_all(kernel, cells, seconds)
            for exercise in expected:
                outcome.append(_check(kernel, exercise, seconds, trouble))
    except KernelLost as lost:
        outcome += [("error", 0, str(lost))] * (len(expected) - len(outcome))
    return outcome


def _run_all(kernel: "Kernel", cells: list[str], seconds: float) -> str:
    """Run all cells in order, past those that fail, until time is up; return the first error message, or ""."""
    deadline = time.monotonic() + seconds
    complaints = []
    for number, source in enumerate(cells, start=1):
        if time.monotonic() > deadline:
            break
        if complaint := kernel.run(source, deadline):
            complaints.append(f"cell {number}: {complaint}")
    return complaints[0] if complaints else ""


_VERDICT = """
def _verdict():
    import json, sys
    sys.path.insert(0, {root!r})
    for name in [name for name in sys.modules if name.partition(".")[0] == "minids"]:
        del sys.modules[name]
    from minids.course.checks import check
    report = check({id!r}, {name})
    return json.dumps([report.status, report.points, [line.strip() for line in report.lines]])
"""


def _check(kernel: "Kernel", exercise: Exercise, seconds: float, trouble: str) -> Outcome:
    """Check one exercise with minids imported again from disk, so that changes by the notebook have no effect."""
    source = _VERDICT.format(root=str(ROOT), id=exercise.id, name=exercise.name)
    reply = kernel.ask(source, "_verdict()", time.monotonic() + seconds)
    if isinstance(reply, str):
        missing = reply.startswith("NameError") and exercise.name in reply
        message = f"the notebook does not define {exercise.name}" if missing else reply
        return "error", 0, f"{message} ({trouble})" if trouble else message
    status, points, lines = reply
    issues = " ".join(line for line in lines if not line.startswith("✓"))
    return status, points, "not started yet" if status == "todo" else issues


@functools.cache
def isolation_available() -> bool:
    """Return whether notebooks can run in isolation on this machine."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [*_isolation(Path(folder), Path(folder)), sys.executable, "-c", ""]
            return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (IsolationUnavailable, OSError, subprocess.TimeoutExpired):
        return False


def _isolation(folder: Path, sockets: Path) -> list[str]:
    """Return the command prefix that isolates a notebook of `folder`; of this project it sees only the package."""
    package = str(ROOT / "minids")
    seen = [*READABLE, PYTHON, sys.prefix, sys.base_prefix, package, str(folder)]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": "/tmp", "PATH": os.defpath}
    own = ["--proc", "/proc", "--dev", "/dev", "--bind", str(sockets), str(sockets), "--chdir", str(folder)]
    return bubblewrap(seen, 2**30, variables, *own)


_SILENCE = """
import contextlib, os, sys
sys.stdout = sys.stderr = open(os.devnull, "w")
get_ipython()._tee = lambda channel, nothing=contextlib.nullcontext: nothing()  # keeps a copy for the history
del contextlib, os, sys
"""


class Kernel:
    """A fresh kernel that runs code until a deadline; its output is discarded.

    A kernel buffers output that it cannot send fast enough, and its history keeps all output: both can exhaust memory.
    """

    def __init__(self, folder: Path):
        self.sockets = tempfile.TemporaryDirectory()
        place = Path(self.sockets.name)
        if isolation_available():  # there is no network inside: connect through socket files
            channels = dict(transport="ipc", ip=str(place / "kernel"))
            self.manager = KernelManager(connection_file=str(place / "connection.json"), **channels)
            spec = self.manager.kernel_spec
            spec.argv = [*_isolation(folder.resolve(), place), sys.executable, *spec.argv[1:]]
            spec.interrupt_mode = "message"
        else:
            self.manager = KernelManager()
        nowhere = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.manager.start_kernel(cwd=str(folder), env=environment(), **nowhere)
        self.client: BlockingKernelClient = self.manager.blocking_client()
        self.client.start_channels(iopub=False, stdin=False, hb=False)

    def __enter__(self) -> "Kernel":
        limit = f"import resource as r; r.setrlimit(r.RLIMIT_AS, ({MEMORY}, {MEMORY})); del r"
        complaint = self.run(_SILENCE + (limit if os.name == "posix" else ""), time.monotonic() + 60)
        if complaint:
            raise KernelLost(f"the kernel did not start: {complaint}")
        return self

    def __exit__(self, *error: object) -> None:
        self.client.stop_channels()
        if os.name == "posix":  # the kernel leads a process group, which contains all that the notebook has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.manager.provisioner.pgid, signal.SIGKILL)
        self.manager.shutdown_kernel(now=True)
        self.sockets.cleanup()

    def run(self, source: str, deadline: float) -> str:
        """Run a cell; return the error message in one line, or "". Raises `KernelLost`."""
        return self._complaint(self._execute(source, {}, deadline))

    def ask(self, source: str, expression: str, deadline: float) -> list | str:
        """Run a cell and return the value of a JSON expression, or the error message, a string. Raises `KernelLost`."""
        reply = self._execute(source, {"answer": expression}, deadline)
        answer = reply.get("user_expressions", {}).get("answer", reply)
        if complaint := self._complaint(answer):
            return complaint
        return json.loads(ast.literal_eval(answer["data"]["text/plain"]))

    def _execute(self, source: str, expressions: dict[str, str], deadline: float) -> dict:
        options = dict(store_history=False, allow_stdin=False, stop_on_error=False)
        id = self.client.execute(source, user_expressions=expressions, **options)
        next_interrupt = deadline
        while True:
            with contextlib.suppress(queue.Empty):
                reply = self.client.get_shell_msg(timeout=0.2)
                if reply["parent_header"].get("msg_id") == id:
                    return reply["content"]
            if not self.manager.is_alive():
                raise KernelLost("the kernel died: out of memory, or the notebook ended it")
            if time.monotonic() > deadline + GRACE:
                raise KernelLost("took too long, and did not stop when interrupted")
            if time.monotonic() > next_interrupt:  # repeat: an except in the cell may swallow one
                self.manager.interrupt_kernel()
                next_interrupt += 1.0

    @staticmethod
    def _complaint(content: dict) -> str:
        if content["status"] == "ok":
            return ""
        if content.get("ename") == "KeyboardInterrupt":
            return "took too long"
        return f"{content.get('ename', 'aborted')}: {content.get('evalue', '')}".replace("\n", " ")[:200]


def as_text(grades: Iterable[Grade]) -> Iterator[str]:
    """Format the grades as a table for the terminal, with each student's sum."""
    grades = list(grades)
    width = max(len("student"), *(len(grade.student) for grade in grades)) + 2
    yield f"{'student':{width}}{'exercise':26}{'points':>8}  first issue"
    for student in dict.fromkeys(grade.student for grade in grades):
        own = [grade for grade in grades if grade.student == student]
        for g in own:
            yield f"{student:{width}}{f'{g.exercise} {g.name}':26}{f'{g.points}/{g.out_of}':>8}  {g.message}".rstrip()
        yield f"{student:{width}}{'sum':26}{f'{sum(g.points for g in own)}/{sum(g.out_of for g in own)}':>8}"


def write_csv(grades: Iterable[Grade], path: Path) -> None:
    """Write the table as CSV, one row per student and exercise."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, Grade.__dataclass_fields__)
        writer.writeheader()
        writer.writerows(map(asdict, grades))


def write_junit(grades: Iterable[Grade], path: Path) -> None:
    """Write the table as JUnit XML: a suite per student, a failure for each exercise that did not pass."""
    suites = ElementTree.Element("testsuites")
    students: dict[str, ElementTree.Element] = {}
    for grade in grades:
        suite = students.get(grade.student)
        if suite is None:
            suite = students[grade.student] = ElementTree.SubElement(suites, "testsuite", name=grade.student)
        case = ElementTree.SubElement(suite, "testcase", classname=grade.student, name=f"{grade.exercise} {grade.name}")
        if grade.status != "passed":
            kind = "error" if grade.status == "error" else "failure"
            printable = (c if c.isprintable() else " " for c in grade.message or grade.status)  # XML allows no other
            ElementTree.SubElement(case, kind, message="".join(printable))
    ElementTree.indent(suites)
    ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)
