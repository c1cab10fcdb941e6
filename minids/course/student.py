"""The process in which a student's notebook runs: run its cells, call its functions, and send back plain data.

`confine.py` and this file start it (`minids/course/judge.py` says how). Of this project it can open only the few files
that the exercises import: no reference, no solution. Its answers are only answers: what they are worth is the judge's.

Notable choices: IPython runs the cells, without a kernel, a network or a history; what they print is discarded; a call
has a limit of processor time, so that a busy machine takes no points, and one on the clock, so that nobody waits for a
call that sleeps; beyond either it is interrupted every second, and killed by the judge if that does not help.
"""

import builtins
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any


def serve(channel: int, modules: dict[str, str], folder: str) -> None:
    """Answer the judge's calls.

    `modules` maps the modules of minids that can be imported to their files; `folder` is for temporary files.
    """
    os.environ |= dict.fromkeys(("HOME", "TMPDIR", "IPYTHONDIR", "MPLCONFIGDIR"), folder)
    tempfile.tempdir = folder  # importing torch looks for one, and finds none once a notebook has filled it
    startup = os.path.join(folder, "profile_default", "startup")
    os.makedirs(startup)
    with open(os.path.join(startup, "README"), "w"):
        pass  # where there is none, IPython copies one, with its mode, which the system call filter forbids
    _make_importable(modules)
    from minids.course.observation import observe, place
    from minids.course.wire import NotDefined, Peer

    shell = _shell()

    def run_cell(source: str, seconds: float, on_the_clock: float) -> str:
        """Run a cell; return the error message, or ""."""
        with _interrupted_after(seconds, on_the_clock, peer):
            result = shell.run_cell(source, store_history=False)
        error = result.error_before_exec or result.error_in_exec
        if isinstance(error, KeyboardInterrupt):
            return "took too long"
        return "" if error is None else f"{type(error).__name__}: {error}"

    def answer(name: str) -> Callable[..., Any]:
        if name not in shell.user_ns:
            raise NotDefined(f"the notebook does not define {name}")
        if not callable(shell.user_ns[name]):
            raise TypeError(f"{name} should be a function")
        return shell.user_ns[name]

    def call(
        name: str, arguments: list, differentiate: list[int], watch: bool, seconds: float, on_the_clock: float
    ) -> Any:
        """Observe one call of the student's function `name`."""
        limit = _interrupted_after(seconds, on_the_clock, peer)
        return _carefully(lambda: observe(answer(name), arguments, differentiate, watch), limit, place)

    def test(name: str, implementation: Callable[..., Any], seconds: float, on_the_clock: float) -> None:
        """Call the student's test `name` with an implementation; raises what the test raises."""
        limit = _interrupted_after(seconds, on_the_clock, peer)
        _carefully(lambda: answer(name)(implementation), limit, place)

    peer = Peer(_Descriptor(channel), [run_cell, call, test])
    peer.serve()


class _Descriptor:
    """A connected socket, used like a file: of a socket's system calls this process may make none."""

    def __init__(self, number: int):
        self.number = number

    def recv(self, size: int) -> bytes:
        return os.read(self.number, size)

    def sendall(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.number, data) :]

    def settimeout(self, seconds: float | None) -> None:
        pass  # the judge measures the time


def _carefully(
    action: Callable[[], Any], limit: contextlib.AbstractContextManager, place: Callable[[BaseException], str]
) -> Any:
    """Do an action in its limit, always from the same random state; an error names the line of the student's code."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    try:
        with limit:
            return action()
    except NotImplementedError:
        raise
    except KeyboardInterrupt:
        raise TimeoutError("took too long") from None
    except BaseException as error:
        raise type(error)(f"{error}{place(error)}") if _takes_text(error) else error from None


def _takes_text(error: BaseException) -> bool:
    try:
        return isinstance(type(error)("text"), BaseException)
    except Exception:
        return False


@contextlib.contextmanager
def _interrupted_after(seconds: float, on_the_clock: float, peer: Any) -> Iterator[None]:
    """Raise KeyboardInterrupt after so much processor time, or so much time, and again every second.

    Once is not enough: an except may swallow it.
    """

    def interrupt(*_: object) -> None:
        if not peer.transferring:
            raise KeyboardInterrupt

    try:
        for each in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(each, interrupt)
        signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
        signal.setitimer(signal.ITIMER_REAL, on_the_clock, 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _shell() -> Any:
    """Return an IPython shell that displays nothing and outlives `exit()`."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        def ask_exit(self) -> None:
            pass

        def enable_gui(self, gui: str | None = None) -> None:
            pass

        @contextlib.contextmanager
        def _tee(self, channel: str) -> Iterator[None]:  # IPython's keeps all output, with no way to turn it off
            yield

    settings = Config()
    settings.HistoryManager.enabled = False
    shell = Shell.instance(config=settings)
    shell.user_ns |= {"exit": lambda *_: None, "quit": lambda *_: None}
    builtins.input = _no_input
    return shell


def _no_input(*_: object) -> str:
    raise EOFError("there is nobody to ask while a notebook is graded")


def _make_importable(modules: dict[str, str]) -> None:
    """Make importable what the exercises import from minids, and nothing that imports more."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
            return importlib.util.spec_from_file_location(name, modules[name]) if name in modules else None

    sys.meta_path.insert(0, Finder())
    for name in sorted({name.rpartition(".")[0] for name in modules} | {"minids", "minids.course.checks"}):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = []
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], package)
    vars(sys.modules["minids"]).update(ModelConfig=importlib.import_module("minids.config").ModelConfig)
    vars(sys.modules["minids.course"]).update(start=_start, show=lambda *_: None)
    for name in ("check", "hint", "predict"):  # the judge checks, after all cells have run
        setattr(sys.modules["minids.course.checks"], name, lambda *_, **__: types.SimpleNamespace(compare=print))


def _start(minutes: float, gigabytes: float = 1) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)
