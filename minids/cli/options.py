"""Parse a command line into the arguments of a function; helpers that several commands share."""

import contextlib
import functools
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import tyro

Device = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")
LOOK = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.FlagCreatePairsOff)
MAY_BE_EMPTY = "--prompt"
# The parser's messages without its titles and repetitions: pattern, replacement.
REWORDED = (
    (r"^(Value error|Invalid choice|Missing argument|Required options|Unrecognized options(?= U)) ", ""),
    (
        r"Error parsing (--)?([\w.-]+): (?=(\w+=)?)",
        lambda found: "" if not found[1] and found[3] else f"{found[1] or ''}{found[2]}: ",
    ),
    (r" Argument helptext: .*(?= For full helptext)", ""),
    (r"no type matching .* <class '\w+'>: ", ""),
    (r"invalid literal for int\(\) with base 10: ('.*?')", r"\1 is not a whole number"),
    (r"could not convert string to float: ('.*?')", r"\1 is not a number"),
    (r"\.? For full helptext, (see|run:?) ", "; see "),
)


def parse(kind: type[T], command: str, arguments: list[str], default: T) -> T:
    """Parse command-line options into a dataclass. Raises `ValueError` with the parser's message on one line."""
    _check_not_empty(arguments)
    with _complaint_as_error():
        return tyro.cli(kind, prog=f"minids {command}", args=arguments, config=LOOK, default=default)


def call(function: Callable[..., None], command: str, arguments: list[str]) -> None:
    """Call `function` with the parsed `arguments`; its parameters are the options. Raises `ValueError` as `parse`."""

    @functools.wraps(function)
    def record(*positional: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(function, *positional, **named)  # called later: its errors are not the parser's

    _check_not_empty(arguments)
    with _complaint_as_error():
        parsed = tyro.cli(record, prog=f"minids {command}", args=arguments, config=LOOK)
    parsed()


@contextlib.contextmanager
def _complaint_as_error() -> Iterator[None]:
    """Raise `ValueError` with the parser's message on one line where the parser would print it and exit."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            yield
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ValueError(_on_one_line(message.getvalue())) from None


def _on_one_line(text: str) -> str:
    """Shorten a complaint of the parser, without the frame drawn around it in box characters or dashes."""
    line = " ".join(re.sub("[\u2500-\u257f]+|-{3,}", " ", text).split())
    for pattern, replacement in REWORDED:
        line = re.sub(pattern, replacement, line)
    return line


def _check_not_empty(arguments: list[str]) -> None:
    """Raise `ValueError` for an empty argument, which as a path would mean the current folder."""
    words = itertools.chain.from_iterable(word.split("=", 1) if word[:2] == "--" else [word] for word in arguments)
    for before, word in itertools.pairwise(("", *words)):
        if not word and before != MAY_BE_EMPTY:
            name = before if before.startswith("--") else "argument"
            raise ValueError(f"{name} '': must not be empty; is a variable of the shell unset?")


def given(arguments: list[str]) -> set[str]:
    """Return the options that a command line names, such as "--steps"."""
    return {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}


def check_resume(arguments: list[str], allowed: set[str], reason: str) -> None:
    """Raise `ValueError` for an option that is given together with --resume and is not among `allowed`."""
    named = given(arguments)
    if "--resume" in named and (others := sorted(named - allowed)):
        raise ValueError(f"{others[0]}: not allowed with --resume; {reason}")


def choose_device(device: Device) -> Literal["cpu", "cuda"]:
    """Return "cpu" or "cuda". Raises `ValueError` where CUDA is requested but not available."""
    import torch  # here, so that commands without a device start at once

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': there is no CUDA device here; use --device cpu")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def check_chapters(chapters: Iterable[int]) -> None:
    """Raise `ValueError` for a number that is no chapter's."""
    from minids.course.exercises import NAMES  # of the course, which training does not import

    for chapter in chapters:
        if chapter not in NAMES:
            raise ValueError(f"chapters={chapter}: must be from 0 to {max(NAMES)}")
