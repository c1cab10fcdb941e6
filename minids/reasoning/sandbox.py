"""Run programs that a model wrote, and judge them by tests they cannot reach.

Notable choices:
- the judge sits outside: the program's process is asked one call at a time and answers with plain data, so expected
  results never enter it and there is no verdict in it to forge. Whatever a program does to `assert`, `sys.exit`, the
  stack, `gc` or its own process, it can only answer calls, rightly or wrongly;
- every program gets a fresh process behind fresh walls, and that process is killed once the verdict stands;
- the walls on Linux are bubblewrap's namespaces (nothing of the machine is visible but Python and the system's
  libraries, read-only; no network; a private /tmp in memory), a seccomp filter that allows what computing takes and
  no more (no processes, threads, sockets, signals to others; where libseccomp is installed), and resource limits;
- where user namespaces are forbidden, Landlock and seccomp remain: `Sandbox(weaker=True)` accepts them, and says so.

What this does not do: protect against a hole in the kernel, against what can be learned from timing, or against tests
that are too weak. Behind the weaker walls a program also sees the names and sizes of files (not what is in them) and
has no folder to write to. macOS runs `sandbox-exec`; that part was never tried. There is no sandbox on Windows.
"""

import ast
import builtins
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any

from minids.reasoning.sandbox_walls import LIBRARIES, MACOS, STRONG, WEAKER, Limits, NoWalls, command

START = 30.0  # seconds for a process and its walls to stand, not charged to the program


@dataclass(frozen=True)
class Verdict:
    """Whether all tests held; if not, the first reason; seconds from the program's arrival to the verdict.

    `reason` may quote the program: it is text to read, never to act on.
    """

    passed: bool
    reason: str
    seconds: float


class Failed(Exception):
    """The program failed; the message is the verdict's reason."""


class Sandbox:
    """Judges programs, `workers` of them at a time.

    `walls` names the layers in use. Raises `NoWalls` where the strong ones cannot be had, unless `weaker` accepts what
    remains, which is then named in a warning.
    """

    def __init__(self, workers: int = 2, limits: Limits = Limits(), weaker: bool = False):  # noqa: B008 - frozen
        self.workers, self.limits, self.walls = workers, limits, find_walls(weaker)
        if self.walls in WEAKER:
            warnings.warn(f"untrusted programs run behind weaker walls: {', '.join(self.walls)}", stacklevel=2)

    def run_many(self, pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        """The verdicts on (program, tests) pairs, in their order.

        `parse` says what `tests` may hold, and raises `ValueError` for the rest before any program starts.
        """
        jobs = [(program, parse(tests)) for program, tests in pairs]
        with ThreadPoolExecutor(self.workers) as threads:  # they only wait; the work is in the processes
            return list(threads.map(lambda job: judge(*job, self.walls, self.limits), jobs))


def run(program: str, tests: str, limits: Limits = Limits(), weaker: bool = False) -> Verdict:  # noqa: B008 - frozen
    """The verdict on one program, in a `Sandbox` of its own."""
    return Sandbox(1, limits, weaker).run_many([(program, tests)])[0]


@functools.cache
def find_walls(weaker: bool) -> tuple[str, ...]:
    """The first set of walls behind which a process starts. Raises `NoWalls`, saying why each set failed."""
    if sys.platform not in ("linux", "darwin"):
        raise NoWalls(f"no sandbox on {sys.platform}: use Linux (on Windows: WSL)")
    sets = (MACOS if sys.platform == "darwin" else STRONG) + (WEAKER if weaker else ())
    complaints = []
    for walls in sets:
        try:
            Cell(walls, Limits()).close()
            return walls
        except OSError as error:
            complaints.append(str(error))
    hint = "" if weaker else "; Sandbox(weaker=True) accepts what remains"
    raise NoWalls(f"no walls for untrusted programs ({'; '.join(complaints)}){hint}")


# The judge.

HELPERS = {helper.__name__: helper for helper in (abs, len, round, set, sorted)}
PLAIN = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.USub, ast.Load)
TESTING = (ast.Compare, ast.cmpop, ast.Not, ast.BinOp, ast.Sub)


@dataclass(frozen=True)
class Test:
    """One assertion: its text, the call that the program is asked to answer, and what must hold of `answer`."""

    source: str
    call: str
    condition: CodeType

    def holds(self, answer: Any) -> bool:
        try:
            return bool(eval(self.condition, {"__builtins__": {}, **HELPERS, "answer": answer}))
        except (TypeError, ValueError, ArithmeticError, RecursionError):  # such as a string where a number was due
            return False


def parse(tests: str) -> list[Test]:
    """Read tests: lines such as `assert f(1, [2]) == 3`, `assert not f("a", n=2)`, `assert abs(f(0.5) - 0.25) <= 1e-6`.

    A line holds exactly one call of the program, with literal arguments. Around it may stand comparisons, `not`, `-`,
    literals (None, bool, int, float, str, list, tuple, set, dict), and `abs`, `len`, `round`, `set` and `sorted`, which
    are Python's own whatever the program defines. Raises `ValueError` naming the first line of any other form.
    """
    try:
        statements = ast.parse(tests).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"tests: {error}") from None
    if not statements:
        raise ValueError(f"tests={tests!r}: must hold at least one assertion")
    return [_parse_line(statement) for statement in statements]


def _parse_line(statement: ast.stmt) -> Test:
    source = ast.unparse(statement)
    asked = _Asked()
    try:
        if not isinstance(statement, ast.Assert) or statement.msg is not None:
            raise ValueError("is no plain assertion")
        condition = ast.fix_missing_locations(ast.Expression(asked.visit(statement.test)))
        if len(asked.calls) != 1:
            raise ValueError(f"holds {len(asked.calls)} calls of the program, not one")
    except ValueError as error:
        raise ValueError(f"tests: {source!r} {error}; expected a line such as `assert f(1, 2) == 3`") from None
    return Test(source, asked.calls[0], compile(condition, "<tests>", "eval"))


class _Asked(ast.NodeTransformer):
    """Takes the program's calls out of an expression, leaving `answer` in their place; refuses what `parse` does."""

    def __init__(self):
        self.calls: list[str] = []

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, PLAIN + TESTING):
            raise ValueError(f"holds {type(node).__name__}")
        if isinstance(node, ast.Constant) and not isinstance(node.value, bool | int | float | str | None):
            raise ValueError(f"holds {node.value!r}, which no answer can equal")
        return super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not isinstance(node.func, ast.Name):
            raise ValueError("calls something that is not a name")
        if node.func.id in HELPERS and not node.keywords:
            node.args = [self.visit(argument) for argument in node.args]
            return node
        if hasattr(builtins, node.func.id):  # the program could redefine it, and with it what is expected
            raise ValueError(f"calls {node.func.id}")
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            ast.literal_eval(argument)
        self.calls.append(ast.unparse(node))
        return ast.Name("answer", ast.Load())


def judge(program: str, tests: list[Test], walls: tuple[str, ...], limits: Limits) -> Verdict:
    """Load the program in a fresh process and hold every test against its answers, until one fails or time is up."""
    with closing(Cell(walls, limits)) as cell:
        start = time.monotonic()
        deadline = start + limits.seconds
        try:
            cell.ask(program, deadline)
            for test in tests:
                answer = cell.ask(test.call, deadline)
                if not test.holds(answer):
                    raise Failed(f"{test.source}: {test.call} gave {ascii(answer)[:200]}")
        except (Failed, RecursionError) as failure:  # a deep answer can be too deep to print
            return Verdict(False, str(failure), time.monotonic() - start)
        return Verdict(True, "passed", time.monotonic() - start)


class Cell:
    """One process behind its walls, ready for one program, until closed. Raises `NoWalls` if they do not stand."""

    def __init__(self, walls: tuple[str, ...], limits: Limits):
        self.limits = limits
        self.received = b""
        line = command(walls, limits)
        self.socket, theirs = socket.socketpair()
        info, report = os.pipe()
        with theirs, open(info, "rb") as info, open(report, "wb") as report:
            if "bubblewrap" in walls:
                line[1:1] = ["--info-fd", str(report.fileno())]
            self.process = subprocess.Popen(
                line,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"LD_LIBRARY_PATH": LIBRARIES},
                cwd="/",
                pass_fds=[report.fileno()],
                start_new_session=True,
            )
            report.close()
            self.inner = None
            with suppress(ValueError, ProcessLookupError):  # bubblewrap failed: told below
                if "bubblewrap" in walls:  # its first process inside: all others in there die with it
                    self.inner = os.pidfd_open(json.loads(info.read())["child-pid"])
        try:
            self._receive(time.monotonic() + START)
        except Failed as failure:
            complaint = self.close().decode(errors="replace").strip().splitlines()
            raise NoWalls(f"{walls[0]}: {complaint[-1] if complaint else failure}") from None

    def close(self) -> bytes:
        """Kill everything inside, wait until it is gone, and return what it complained about while starting."""
        if self.inner is None:
            self.process.kill()
        else:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.inner, signal.SIGKILL)
            os.close(self.inner)
        self.socket.close()
        return self.process.communicate()[1]

    def ask(self, source: str, deadline: float) -> Any:
        """The value of `source` inside, as plain data made here. Raises `Failed` for everything that may go wrong."""
        try:
            self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            self.socket.sendall(ascii(source).encode() + b"\n")
        except TimeoutError:
            raise Failed("out of time") from None
        except OSError:
            pass  # it hung up; what it said before that is still to be read
        return self._receive(deadline)

    def _receive(self, deadline: float) -> Any:
        while b"\n" not in self.received:
            try:
                self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                received = self.socket.recv(2**16)
            except TimeoutError:
                raise Failed("out of time") from None
            except OSError:
                received = b""
            if not received:
                raise Failed("the process ended without an answer")
            self.received += received
            if len(self.received) > self.limits.answer:
                raise Failed(f"an answer of more than {self.limits.answer} bytes")
        line, _, self.received = self.received.partition(b"\n")
        try:
            state, answer = json.loads(line, object_hook=_decode)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Failed("an answer that is not plain data") from None
        if state != "ok":
            raise Failed(ascii(answer)[:200])
        return answer


def _decode(tagged: dict[str, Any]) -> Any:
    """Undo the worker's `encode` for one object. Whatever comes in, what goes out is made of Python's own types."""
    ((kind, content),) = tagged.items()
    if kind == "str":
        return bytes.fromhex(content).decode("utf-8", "surrogatepass")
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[kind](content)
