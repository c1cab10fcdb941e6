"""Run programs that a model wrote in isolation, and judge them by unit tests that they cannot reach.

Notable choices:
- the judge is a separate process: it sends one call at a time to the program's process and receives plain data, so
  expected results never enter that process, and it holds no verdict to forge. Whatever a program does to `assert`,
  `sys.exit`, the stack, `gc` or its own process, it can only answer calls, correctly or incorrectly;
- every program gets a fresh process with its own isolation layers; that process is killed after the verdict;
- on Linux a seccomp filter allows only the system calls that computing needs (no processes, threads, sockets, signals
  to others), resource limits hold, and files are limited to Python and the system's libraries, read-only: by
  bubblewrap where the system has it (namespaces, and a private /tmp in memory), else by Landlock.

Not covered: vulnerabilities of the kernel, timing side channels, and tests that are too weak. Behind Landlock a program
also sees the names and sizes of files (not their contents) and has no folder to write to. macOS runs `sandbox-exec`;
that part is untested. There is no sandbox on Windows.
"""

import ast
import builtins
import functools
import json
import math
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from types import CodeType
from typing import Any

from minids.config import check_fields
from minids.sandbox.errors import Failed, IsolationUnavailable
from minids.sandbox.isolation import LINUX, MACOS, PYTHON, SYSTEM, Access, Layers, command
from minids.sandbox.process import IsolatedProcess

START = 30.0  # seconds for an isolated process to start, not charged to the program


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program: seconds for all of its tests together, and bytes."""

    seconds: float = 2.0
    memory: int = 256 * 2**20
    file: int = 2**20  # largest file; the private /tmp holds 16 such files
    answer: int = 2**16  # longest result of one call, as text

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Verdict:
    """Result of judging one program: whether all tests passed, else the first reason; seconds from load to verdict.

    `reason` may quote the program: display it, never execute it.
    """

    passed: bool
    reason: str
    seconds: float


class Sandbox:
    """Judge of programs, `workers` of them at a time; `isolation` names the layers in use.

    Raises `IsolationUnavailable` where no set of layers is available.
    """

    def __init__(self, workers: int = 2, limits: Limits = Limits()):  # noqa: B008 - frozen
        self.workers, self.limits, self.isolation = workers, limits, find_isolation()

    def run_many(self, pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        """Judge (program, tests) pairs; return the verdicts in the same order.

        `parse` defines the form of `tests` and raises `ValueError` for any other form before a program starts.
        """
        jobs = [(program, parse(tests)) for program, tests in pairs]
        with ThreadPoolExecutor(self.workers) as threads:  # threads only wait; the processes do the work
            return list(threads.map(lambda job: judge(job[0], job[1], self.isolation, self.limits), jobs))


def run(program: str, tests: str, limits: Limits = Limits()) -> Verdict:  # noqa: B008 - frozen
    """Judge one program in a `Sandbox` of its own."""
    return Sandbox(1, limits).run_many([(program, tests)])[0]


@functools.cache
def find_isolation() -> Layers:
    """Return the first set of layers in which a process starts.

    Raises `IsolationUnavailable` with the reason why each set failed.
    """
    if sys.platform not in ("linux", "darwin"):
        raise IsolationUnavailable(f"no sandbox on {sys.platform}: use Linux (on Windows: WSL)")
    complaints = []
    for layers in MACOS if sys.platform == "darwin" else LINUX:
        try:
            SandboxProcess(layers, Limits()).close()
            return layers
        except OSError as error:
            complaints.append(str(error))
    raise IsolationUnavailable(f"no isolation for untrusted programs ({'; '.join(complaints)})")


# The judge.

HELPERS = {helper.__name__: helper for helper in (abs, len, round, set, sorted)}
PLAIN = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.USub, ast.Load)
TESTING = (ast.Compare, ast.cmpop, ast.Not, ast.BinOp, ast.Sub)


@dataclass(frozen=True)
class Test:
    """One assertion: its source, the call that is sent to the program, and the compiled condition on `answer`."""

    source: str
    call: str
    condition: CodeType

    def holds(self, answer: Any) -> bool:
        try:
            return bool(eval(self.condition, {"__builtins__": {}, **HELPERS, "answer": answer}))
        except (TypeError, ValueError, ArithmeticError, RecursionError):  # such as a string where a number is expected
            return False


def parse(tests: str) -> list[Test]:
    """Parse lines such as `assert f(1, [2]) == 3`, `assert not f("a", n=2)`, `assert abs(f(0.5) - 0.25) <= 1e-6`.

    A line contains exactly one call of the program, with literal arguments. The rest may use comparisons, `not`, `-`,
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
    extractor = _CallExtractor()
    try:
        if not isinstance(statement, ast.Assert) or statement.msg is not None:
            raise ValueError("is not a plain assertion")
        condition = ast.fix_missing_locations(ast.Expression(extractor.visit(statement.test)))
        if len(extractor.calls) != 1:
            raise ValueError(f"contains {len(extractor.calls)} calls of the program, not one")
    except ValueError as error:
        raise ValueError(f"tests: {source!r} {error}; expected a line such as `assert f(1, 2) == 3`") from None
    return Test(source, extractor.calls[0], compile(condition, "<tests>", "eval"))


class _CallExtractor(ast.NodeTransformer):
    """Replace the program's calls in an expression by `answer`; refuse every form that `parse` does not allow."""

    def __init__(self):
        self.calls: list[str] = []

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, PLAIN + TESTING):
            raise ValueError(f"contains {type(node).__name__}")
        if isinstance(node, ast.Constant) and not isinstance(node.value, bool | int | float | str | None):
            raise ValueError(f"contains {node.value!r}, which no answer can equal")
        return super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not isinstance(node.func, ast.Name):
            raise ValueError("calls something that is not a name")
        if node.func.id in HELPERS and not node.keywords:
            node.args = [self.visit(argument) for argument in node.args]
            return node
        if hasattr(builtins, node.func.id):  # the program could redefine it, and so the expected result
            raise ValueError(f"calls {node.func.id}")
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            ast.literal_eval(argument)
        self.calls.append(ast.unparse(node))
        return ast.Name("answer", ast.Load())


def judge(program: str, tests: list[Test], layers: Layers, limits: Limits) -> Verdict:
    """Load the program in a fresh process and evaluate the tests on its answers, until one fails or time is up."""
    with closing(SandboxProcess(layers, limits)) as process:
        start = time.monotonic()
        deadline = start + limits.seconds
        try:
            process.ask(program, deadline)
            for test in tests:
                answer = process.ask(test.call, deadline)
                if not test.holds(answer):
                    raise Failed(f"{test.source}: {test.call} gave {ascii(answer)[:200]}")
        except (Failed, RecursionError) as failure:  # printing a deeply nested answer can exceed the limit
            return Verdict(False, str(failure), time.monotonic() - start)
        return Verdict(True, "passed", time.monotonic() - start)


def _rlimits(limits: Limits) -> dict[str, int]:
    """Limits that the kernel enforces even after the judge has exited. macOS has no limit on memory."""
    rlimits = {"CPU": math.ceil(limits.seconds) + 1, "FSIZE": limits.file, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    if sys.platform == "linux":
        rlimits["AS"] = limits.memory
    return {f"RLIMIT_{name}": value for name, value in rlimits.items()}


class SandboxProcess(IsolatedProcess):
    """One isolated process, ready for one program, until closed.

    Raises `IsolationUnavailable` where the layers cannot be applied.
    """

    def __init__(self, layers: Layers, limits: Limits):
        self.limits = limits
        self.received = b""
        access = Access([*SYSTEM, PYTHON], _rlimits(limits), 16 * limits.file)
        super().__init__(command(layers, access, [PYTHON, "-I", "-S"], ["sandbox/confine.py", "sandbox/worker.py"]))
        try:
            self._receive(time.monotonic() + START)
        except Failed as failure:
            complaint = self.close().decode(errors="replace").strip().splitlines()
            name = layers[0] if layers else "process"
            raise IsolationUnavailable(f"{name}: {complaint[-1] if complaint else failure}") from None

    def ask(self, source: str, deadline: float) -> Any:
        """Return the value of `source`, evaluated inside, as plain data. Raises `Failed` for every kind of failure."""
        try:
            self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            self.socket.sendall(ascii(source).encode() + b"\n")
        except TimeoutError:
            raise Failed("out of time") from None
        except OSError:
            pass  # the process closed the socket; an answer sent before that can still be read
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
    """Undo the worker's `encode` for one object. For any input, the result consists of Python's built-in types."""
    ((kind, content),) = tagged.items()
    if kind == "str":
        return bytes.fromhex(content).decode("utf-8", "surrogatepass")
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[kind](content)
