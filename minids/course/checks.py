"""Check an answer to an exercise: run it, and explain in words what is incorrect.

Two kinds of exercise:
- `Function`: write a function. It is compared with a reference on examples. A known mistake is recognised, because it
  is itself an implementation, whose results are compared too;
- `SpotTheBug`: write a test. It has to accept the correct implementation and to reject each planted bug.

A check never raises, whatever the answer does: it returns a `Report`, which a notebook displays.
"""

import copy
import html
import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Answer = Callable[..., Any]
Examples = Callable[[torch.Generator], Sequence[tuple]]


class Wrong(Exception):
    """An incorrect answer; the message explains why to the learner."""


@dataclass(frozen=True)
class Report:
    """Outcome of one check: `status` is passed, failed or todo; `lines` explain it."""

    id: str
    name: str
    status: str
    points: int
    out_of: int
    lines: tuple[str, ...] = ()

    def __repr__(self) -> str:
        words = {"passed": "✓ {}: passed", "failed": "✗ {}: not yet", "todo": "○ {}: not started yet"}[self.status]
        return "\n".join((words.format(f"{self.id} {self.name}"), *(f"  {line}" for line in self.lines)))

    def _repr_html_(self) -> str:
        color = {"passed": "#009E73", "failed": "#D55E00", "todo": "#888888"}[self.status]
        return f'<pre style="border-left: 4px solid {color}; padding-left: 8px">{html.escape(repr(self))}</pre>'


@dataclass(frozen=True)
class Function:
    """An exercise to write the function `name`, worth `points`.

    `examples` makes the argument tuples from a generator, always the same ones. `mistakes` maps the description of a
    mistake, worded to follow "this is what comes out when ", to a function that makes it. `hint` is shown when no
    mistake is recognised. `outputs` names the parts of a tuple that the function returns.
    """

    id: str
    name: str
    reference: Answer
    examples: Examples
    mistakes: Mapping[str, Answer]
    hint: str
    points: int = 1
    outputs: tuple[str, ...] = ()

    def check(self, answer: Answer) -> Report:
        examples = self.examples(torch.Generator().manual_seed(0))
        results = []
        try:
            for number, arguments in enumerate(examples, start=1):
                given = copy.deepcopy(arguments)
                results.append(_run(answer, given, self.name))
                compare(given, arguments, "an argument, which your code changed in place")
                try:
                    compare(results[-1], self.reference(*arguments), "the result", self.outputs)
                except Wrong as wrong:
                    place = f"on example {number} of {len(examples)}, {describe(arguments)}:"
                    raise Wrong(f"{place}\n  {wrong}") from None
        except NotImplementedError:
            return Report(self.id, self.name, "todo", 0, self.points)
        except Wrong as wrong:
            lines = [*str(wrong).splitlines(), self._diagnosis(answer, examples) or f"hint: {self.hint}"]
            return Report(self.id, self.name, "failed", 0, self.points, tuple(lines))
        return Report(self.id, self.name, "passed", self.points, self.points)

    def _diagnosis(self, answer: Answer, examples: Sequence[tuple]) -> str | None:
        """Describe the known mistake whose results equal the answer's on every example; None if there is none."""
        for words, mistake in self.mistakes.items():
            try:
                for arguments in examples:
                    compare(_run(answer, copy.deepcopy(arguments), self.name), mistake(*copy.deepcopy(arguments)), "")
            except Exception:  # not this mistake, or it raises where the answer does not
                continue
            return f"this is what comes out when {words}"
        return None


@dataclass(frozen=True)
class Bug:
    """A planted mistake: `name` is shown once it is caught, `hint` (where to look) while it is missed."""

    name: str
    implementation: Answer
    hint: str


@dataclass(frozen=True)
class SpotTheBug:
    """An exercise to write a test, the function `name`, which is called with one implementation at a time.

    The test returns for `right` and raises for each of the `bugs`: `AssertionError`, or an error that the bug causes.
    Each rejected bug is one point; a test that rejects `right` earns none.
    """

    id: str
    name: str
    right: Answer
    bugs: tuple[Bug, ...]

    @property
    def points(self) -> int:
        return len(self.bugs)

    def check(self, answer: Answer) -> Report:
        try:
            complaint = _complaint(answer, self.right, self.name)
        except NotImplementedError:
            return Report(self.id, self.name, "todo", 0, self.points)
        if complaint is not None:
            lines = ("✗ it rejects the right implementation", f"  {complaint}")
            return Report(self.id, self.name, "failed", 0, self.points, lines)
        caught = [_complaint(answer, bug.implementation, self.name) is not None for bug in self.bugs]
        lines = ["✓ it accepts the right implementation"]
        for bug, was_caught in zip(self.bugs, caught, strict=True):
            lines.append(f"✓ it catches: {bug.name}" if was_caught else f"✗ it misses a bug; hint: {bug.hint}")
        if not any(caught):
            lines.append("it accepts everything so far: a test needs an assert that can fail")
        status = "passed" if all(caught) else "failed"
        return Report(self.id, self.name, status, sum(caught), self.points, tuple(lines))


Exercise = Function | SpotTheBug


def exercises(chapter: int) -> list[Exercise]:
    """Return the exercises of a chapter, in order. Raises `ValueError` if it has none."""
    try:
        return importlib.import_module(f"minids.course.exercises.chapter{chapter:02d}").EXERCISES
    except ModuleNotFoundError:
        raise ValueError(f"chapter {chapter} has no exercises") from None


def check(id: str, answer: Answer) -> Report:
    """Check an answer to exercise `id`, such as "2.1"; the random state of the notebook is preserved."""
    for exercise in exercises(int(id.split(".")[0])):
        if exercise.id == id:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return exercise.check(answer)
    raise ValueError(f"there is no exercise {id!r}")


def compare(got: Any, wanted: Any, what: str, parts: Sequence[str] = ()) -> None:
    """Raise `Wrong` with the first difference: type, then shape, then dtype, then the first value that differs."""
    if isinstance(wanted, tuple | list):
        names = parts or [f"part {i + 1} of {what}" for i in range(len(wanted))]
        if not isinstance(got, tuple | list) or len(got) != len(wanted):
            raise Wrong(f"{what} should be {len(wanted)} things ({', '.join(names)}), got {describe(got)}")
        for one, other, name in zip(got, wanted, names, strict=True):
            compare(one, other, name)
    elif isinstance(wanted, Tensor):
        _compare_tensors(got, wanted, what)
    elif isinstance(wanted, float):
        if isinstance(got, bool) or not isinstance(got, int | float | Tensor) or torch.as_tensor(got).numel() != 1:
            raise Wrong(f"{what} should be a number, got {describe(got)}")
        if not torch.isclose(torch.as_tensor(got, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)):
            raise Wrong(f"{what} should be {wanted:.6g}, got {float(got):.6g}")
    elif type(got) is not type(wanted) or got != wanted:
        raise Wrong(f"{what} should be {wanted!r}, got {describe(got) if isinstance(got, Tensor) else repr(got)}")


def _compare_tensors(got: Any, wanted: Tensor, what: str) -> None:
    if not isinstance(got, Tensor):
        raise Wrong(f"{what} should be a tensor, got {describe(got)}")
    if got.shape != wanted.shape:
        raise Wrong(f"{what} should have shape {tuple(wanted.shape)}, got {tuple(got.shape)}")
    if got.dtype != wanted.dtype:
        raise Wrong(f"{what} should be of {wanted.dtype}, got {got.dtype}")
    if wanted.dtype.is_complex:
        got, wanted = torch.view_as_real(got), torch.view_as_real(wanted)
    off = ~torch.isclose(got.double(), wanted.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
    if off.any():
        first = tuple(off.nonzero()[0].tolist())
        values = f"got {got[first].item():.4g}, expected {wanted[first].item():.4g}"
        raise Wrong(f"{what}: {int(off.sum())} of {off.numel()} values differ; the first at {list(first)}: {values}")


def describe(value: Any) -> str:
    """Describe a value briefly: the shape of a tensor, the parts of a tuple."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    words = repr(value)
    return words if len(words) <= 40 else f"{type(value).__name__}"


def _run(answer: Answer, arguments: tuple, name: str) -> Any:
    """Return the answer's result. Raises `Wrong` for an error in it, with the line of the learner's code."""
    if not callable(answer):
        raise Wrong(f"{name} should be a function, got {describe(answer)}")
    try:
        return answer(*arguments)
    except NotImplementedError:
        raise
    except Exception as error:
        raise Wrong(f"your code raised {_in_words(error)}") from None


def _complaint(test: Answer, implementation: Answer, name: str) -> str | None:
    """Return the error of a learner's test on an implementation, None if it passes; a lambda hides which one it is."""
    try:
        _run(test, (lambda *arguments, **named: implementation(*arguments, **named),), name)
    except Wrong as wrong:
        return str(wrong)
    return None


def _in_words(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "ipykernel" in frame.filename or frame.filename.startswith("<")]
    line = f" (your line {own[-1].lineno}: {own[-1].line})" if own and own[-1].line else ""
    return f"{type(error).__name__}: {error}{line}".replace("\n", " ")
