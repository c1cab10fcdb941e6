"""Judge one notebook: its code runs in an isolated process, the references and the points stay in this one.

Notable choices:
- an exercise calls the student's function through a `Peer`: arguments go out, plain data comes back, and is compared
  here. A test that a student wrote is called with functions that only send their arguments to this process, in random
  order and each of them three times: which one is right can be learned only from what it returns;
- of this project the student's process can open the files in `VISIBLE`; it has no network, no other process, a private
  temporary folder, and limits on memory, file size, temporary space and time.

Not covered: vulnerabilities of the kernel. Without layers (macOS, Linux without bubblewrap and Landlock) the
process has the rights of the user who grades and can read the references; points stay the judge's own.
"""

import contextlib
import functools
import logging
import os
import shutil
import site
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import nbformat

from minids.course.checks import Exercise, graded
from minids.course.observation import Observation
from minids.course.wire import Broken, Peer
from minids.sandbox.errors import IsolationUnavailable
from minids.sandbox.isolation import LINUX, PYTHON, SYSTEM, Access, Layers, command
from minids.sandbox.process import IsolatedProcess

PACKAGE = Path(__file__).parents[1]
VISIBLE = {  # modules that the exercises import, and what the student's process needs itself
    f"minids.{name}": str(PACKAGE / f"{name.replace('.', '/')}.py")
    for name in (
        "config",
        "engram_config",
        "hf_config",
        "validation",
        "fp8.formats",
        "parallel.eplb",
        "parallel.schedule",
        "parallel.programs",
        "parallel.one_f_one_b",
        "course.wire",
        "course.observation",
    )
}
MEMORY, FILE, SCRATCH = 4 * 2**30, 2**26, 2**28  # bytes: address space, largest file, all temporary files
START, GRACE = 60.0, 5.0  # seconds that a process has to start, and an interrupted call to stop
BUSY = 3.0  # seconds on the clock per second of processor time, on a machine with other work
RUN_CELL, CALL, TEST = range(3)  # the functions of minids.course.student

Outcome = tuple[str, int, str]  # status, points, message


def judge(content: bytes, chapter: int, seconds: float, layers: Layers, place: str | None = None) -> Iterator[Outcome]:
    """Run a notebook and yield the outcome of every exercise of the chapter that is worth points, in order.

    `seconds` limit the processor time of a cell, and exercises share them; on the clock, all cells together may take
    `BUSY` times as long, and again all exercises. `place` is where the notebook's temporary folder is made.
    """
    expected = graded(chapter)
    try:
        cells = read_cells(content)
        student = Student(layers, place)
    except ValueError as error:
        yield from [("error", 0, str(error))] * len(expected)
        return
    done = 0
    with closing(student):
        try:
            trouble = student.run_all(cells, seconds)
            for exercise in expected:
                yield _check(student, exercise, seconds / len(expected), trouble)
                done += 1
        except Broken as broken:
            yield from [("error", 0, f"the notebook's process: {broken}")] * (len(expected) - done)


def read_cells(content: bytes) -> list[str]:
    """Return the source of every code cell. Raises `ValueError` for what is not a notebook.

    Only the sources count: what other editors do to ids, outputs and counts says nothing about an answer.
    """
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)  # nbformat's complaints about exactly that
    try:
        notebook = nbformat.reads(content.decode("utf-8-sig"), as_version=4)
        cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        return [source if isinstance(source, str) else "".join(source) for source in cells]
    except Exception as error:  # nbformat raises many types for what is not JSON, or JSON of another kind
        raise ValueError(f"not a notebook, or a damaged one: {str(error).partition(chr(10))[0][:100]}") from None


def _check(student: "Student", exercise: Exercise, seconds: float, trouble: str) -> Outcome:
    report = exercise.check(student.answer(exercise.name, seconds), careful=True)
    if report.status == "todo":
        return "todo", 0, "not started yet"
    if report.status == "passed":
        return "passed", min(report.points, exercise.points), ""
    message = "; ".join(line.strip().removeprefix("✗ ") for line in report.lines if not line.startswith("✓"))
    if report.status == "error":
        message += f" ({trouble})" if trouble else ""
    return report.status, min(report.points, exercise.points), message


class Student:
    """The isolated process of one notebook, until closed. Raises `IsolationUnavailable` where it does not start."""

    def __init__(self, layers: Layers, place: str | None = None):
        self.folder = tempfile.mkdtemp(prefix="minids-", dir=place)
        line = command(
            layers,
            _access(self.folder),
            [sys.executable, "-I", "-B"],
            ["sandbox/confine.py", "course/student.py"],
            VISIBLE,
            "/tmp" if "bubblewrap" in layers else self.folder,
        )
        self.process = IsolatedProcess(line, {"PATH": os.defpath, "OMP_NUM_THREADS": "1"}, self.folder)
        self.peer = Peer(self.process.socket)
        self.peer.meanwhile = self.check_size
        try:
            # what no notebook should pay for
            self.limited(START, RUN_CELL, ["__import__('torch')", START, START])
        except Broken as broken:
            complaint = self.close().decode(errors="replace").strip().splitlines()
            raise IsolationUnavailable(f"{layers or 'no layers'}: {complaint[-1] if complaint else broken}") from None

    def close(self) -> bytes:
        said = self.process.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return said

    def limited(self, seconds: float, function: int, arguments: list[Any]) -> Any:
        """Call a function of the process, which ends the notebook if it does not return in time."""
        self.peer.deadline = time.monotonic() + seconds + GRACE
        self.check_size()
        return self.peer.call(function, arguments)

    def check_size(self) -> None:
        """Raise `Broken` for too many temporary files, also every second while a call runs: Landlock limits none."""
        if _size(self.folder) > SCRATCH:
            raise Broken(f"more than {SCRATCH >> 20} MiB of temporary files")

    def run_all(self, cells: list[str], seconds: float) -> str:
        """Run all cells in order, past those that fail, until time is up; return the first error message, or ""."""
        deadline = time.monotonic() + BUSY * seconds
        complaints = []
        for number, source in enumerate(cells, start=1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if complaint := self.limited(left, RUN_CELL, [source, min(seconds, left), left]):
                complaints.append(f"code cell {number}: {complaint}")
        return str(complaints[0]) if complaints else ""

    def answer(self, name: str, seconds: float) -> "RemoteAnswer":
        return RemoteAnswer(self, name, seconds)


class RemoteAnswer:
    """A student's function, as an exercise calls it: with a limit of each call, and on the clock of all its calls."""

    def __init__(self, student: Student, name: str, seconds: float):
        self.student, self.name, self.seconds = student, name, seconds
        self.deadline = time.monotonic() + BUSY * seconds

    def observe(self, arguments: tuple, differentiate: tuple[int, ...] = (), watch: bool = False) -> Observation:
        seen = self._limited(CALL, list(arguments), list(differentiate), watch)
        if not isinstance(seen, Observation) or not isinstance(seen.arguments, tuple):
            raise Broken("an answer that is not plain data")
        return seen

    def test(self, implementation: Callable[..., Any]) -> None:
        self._limited(TEST, implementation)

    def _limited(self, function: int, *arguments: Any) -> Any:
        left = max(self.deadline - time.monotonic(), 0.1)
        return self.student.limited(left, function, [self.name, *arguments, min(self.seconds, left), left])


def _access(folder: str) -> Access:
    copies = [str(place) for root in site.getsitepackages() for place in Path(root).glob("minids*")]
    system = ["/dev/urandom", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/etc/ld.so.cache"]
    return Access(
        readable=[*SYSTEM, f"{sys.base_prefix}/bin", sys.prefix, PYTHON, *system, *VISIBLE.values()],
        hidden=[str(PACKAGE), *copies],
        rlimits={"RLIMIT_AS": MEMORY, "RLIMIT_FSIZE": FILE, "RLIMIT_NOFILE": 256, "RLIMIT_CORE": 0},
        scratch=SCRATCH,
        folder=folder,
        threads=True,
    )


def _size(folder: str) -> int:
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # deleted in between
                size += os.lstat(os.path.join(place, name)).st_size
    return size


@functools.cache
def find_layers() -> Layers:
    """Return the first set of layers in which a notebook can run; () where there is none."""
    for layers in LINUX if sys.platform == "linux" else ():
        try:
            Student(layers).close()
            return layers
        except (IsolationUnavailable, OSError):
            continue
    return ()
