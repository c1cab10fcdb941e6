"""Dispatch a command line to the module of its command; report every error in one line.

Notable choices: torch and the commands are imported inside `main`, so that an interruption or an error while they are
imported is reported as any other.
"""

import importlib
import io
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from minids.freed_memory import keep_freed_memory
from minids.threads import openmp_settings

COMMANDS = {
    "train": "pre-train a model on text, on one device or many",
    "sample": "generate text with a trained model",
    "rl": "train a model with rule-based rewards, as R1-Zero",
    "r1": "train R1 stage by stage, and distil it",
    "import": "convert a Hugging Face DeepSeek-V2, V3 or V3.2 folder to a run",
    "export": "convert a run's model to a Hugging Face folder",
    "cost": "print parameters, FLOPs, memory and rental cost of a config",
    "schedule": "check, simulate and draw a pipeline schedule",
    "bench": "measure this package against transformers",
    "handout": "copy the exercise notebooks for a class",
    "grade": "judge the exercise notebooks of a class",
    "progress": "print which exercises are done in this checkout",
}
MODULES = {"import": "convert", "export": "convert"}

COURSE = "pip install 'minids[course]'"
NEEDED = dict.fromkeys(("matplotlib", "IPython", "nbformat", "jupyter_client", "ipywidgets"), COURSE)
NEEDED |= dict.fromkeys(("pyarrow", "datasets"), "pip install 'minids[data]'")

NARROWEST = 40  # columns of a terminal

LESS_MEMORY = {
    "train": "lower --micro-batch-size or --seq-len, or choose a smaller --preset",
    "sample": "lower --max-new-tokens",
    "rl": "lower --micro-batch-size, --max-cache-bytes or --prompts",
    "schedule": "lower --ranks or --micro-batches",
    "grade": "lower --workers",
}

HELP = "\n".join(
    [
        "usage: minids COMMAND [OPTIONS]",
        "",
        "Train, sample, convert and analyse small DeepSeek-V3/R1 models.",
        "",
        *(f"  {name:10}{purpose}" for name, purpose in COMMANDS.items()),
        "",
        "minids COMMAND --help lists the options of a command; minids --version prints the version.",
        "Every error is one line; set the environment variable MINIDS_TRACEBACK=1 to see where it was raised.",
    ]
)


def run(arguments: list[str]) -> None:
    """Run a command line. Raises `ValueError` for an unknown command, and whatever the command raises."""
    if not arguments:
        raise ValueError(f"no command: expected one of {', '.join(COMMANDS)}; see --help")
    command, *options = arguments
    if command in ("-h", "--help"):
        print(HELP)
    elif command == "--version":
        print(importlib.import_module("minids").__version__)
    elif command in COMMANDS:
        module = importlib.import_module(f"minids.cli.{MODULES.get(command, command)}")
        module.run(command, options)
    else:
        raise ValueError(f"unknown command {command!r}: expected one of {', '.join(COMMANDS)}; see --help")


def main() -> int:
    """Run this process's command line and return its exit status; every error prints one line.

    The status is 2 for a user's mistake, 1 for an error that was not foreseen, and 128 + n where signal n ended the
    command: 130 for Ctrl-C, 141 where the reader of the output has gone.
    """
    os.environ |= openmp_settings(os.environ)
    keep_freed_memory()
    if shutil.get_terminal_size().columns < NARROWEST:  # help on fewer columns is no text, and on one never ends
        os.environ["COLUMNS"] = str(NARROWEST)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # redirected on Windows, it may lack most letters: write ? for these
            stream.reconfigure(errors="replace")
    status, message = 0, ""
    try:
        with _interruptions() as received:
            try:
                run(sys.argv[1:])
                sys.stdout.flush()
            except Exception:
                if received:  # an import of torch or numpy that swallowed the interruption fails for odd reasons
                    raise KeyboardInterrupt(received[0]) from None
                raise
    except BaseException as error:
        status, message = _describe(error, sys.argv[1:])
        if os.environ.get("MINIDS_TRACEBACK", "0") not in ("", "0") and isinstance(error, Exception):
            importlib.import_module("traceback").print_exception(error)
    with suppress(OSError):  # the terminal may have gone
        if message:
            print(f"minids: {' '.join(message.split())}", file=sys.stderr)
    _discard_unwritten()
    return status


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Raise `KeyboardInterrupt` with the signal's number where SIGINT, SIGTERM or SIGHUP is received during the block.

    Signals that are ignored (nohup, background jobs) stay so. Yields the numbers of the signals received so far.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def interrupt(number, frame):
        received.append(number)
        raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.signal(n, interrupt) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(error: BaseException, arguments: list[str]) -> tuple[int, str]:
    """Return the exit status and the line for an error that a command raised; an empty line prints nothing."""
    match error:
        case SystemExit():  # --help
            return int(error.code or 0), ""
        case KeyboardInterrupt():
            number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
            return 128 + number, "interrupted" + (f" by {number.name}" if number != signal.SIGINT else "")
        case BrokenPipeError():
            return 141, ""
        case ModuleNotFoundError():
            return 2, f"{error.name} is not installed: {NEEDED.get(str(error.name), f'pip install {error.name}')}"
        case _ if _is_out_of_memory(error):
            remedy = LESS_MEMORY.get(arguments[0], "use a machine with more memory")
            return 2, f"out of memory: {remedy} ({error or type(error).__name__})"
        case OSError():
            return 2, str(error)
        case ValueError() | ArithmeticError():
            first = "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"
            return 2, str(error) if first else ""  # all processes of torchrun raise the same
    hint = "this is a fault of minids; set MINIDS_TRACEBACK=1 to see where it was raised"
    return 1, f"{type(error).__name__}: {error} ({hint})"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, in torch's CPU allocator or on a GPU; torch need not be imported."""
    allocators = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    torch_error = isinstance(error, RuntimeError) and any(name in str(error) for name in allocators)
    return torch_error or isinstance(error, MemoryError)


def _open_closed_streams() -> None:
    """Connect standard streams that the caller has closed (`>&-`) to the null device; Python has None in their place.

    Their descriptors are then taken, so that no file of a run gets one and is written to by a library's messages.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _discard_unwritten() -> None:
    """Discard output that cannot be written (closed pipe, full disk): at exit, Python would complain about it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
