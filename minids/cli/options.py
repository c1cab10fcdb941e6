"""Parse a command line into the arguments of a function; helpers that several commands share."""

import contextlib
import functools
import io
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import tyro

Device = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")
LOOK = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.FlagCreatePairsOff)


def parse(kind: Callable[..., T], command: str, arguments: list[str], default: T | None = None) -> T:
    """Parse command-line options into `kind`, a dataclass or a function.

    Raises `ValueError` with the parser's message on one line.
    """
    message, start = io.StringIO(), {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(kind, prog=f"minids {command}", args=arguments, config=LOOK, **start)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ValueError(f"{_on_one_line(message.getvalue())}") from None


def call(function: Callable[..., None], command: str, arguments: list[str]) -> None:
    """Call `function` with the parsed `arguments`; its parameters are the options."""

    @functools.wraps(function)
    def record(*positional: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(function, *positional, **named)  # called later: its errors are not the parser's

    parse(record, command, arguments)()


def _on_one_line(text: str) -> str:
    """A complaint without the frame that is drawn around it, in box characters or in dashes."""
    return " ".join(re.sub("[\u2500-\u257f]+|-{3,}", " ", text).split())


def given(arguments: list[str]) -> set[str]:
    """Return the options that a command line names, such as "--steps"."""
    return {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}


def check_resume(arguments: list[str], allowed: set[str], reason: str) -> None:
    """Raise `ValueError` for an option that is given together with --resume and is not among `allowed`."""
    named = given(arguments)
    if "--resume" in named and (others := sorted(named - allowed)):
        raise ValueError(f"{others[0]}: not allowed with --resume; {reason}")


def choose_device(device: Device) -> str:
    """Return "cpu" or "cuda". Raises `ValueError` where CUDA is requested but not available."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': there is no CUDA device here; use --device cpu")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
