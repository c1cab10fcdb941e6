"""Check an answer to an exercise: run it, and explain in words what is incorrect.

Kinds of exercises:
- `Function`: write a function. It is compared with a reference on examples. A known mistake is recognised, because it
  is itself an implementation, whose results are compared too;
- `SpotTheBug`: write a test. It has to accept the correct implementation and to reject each planted bug;
- `Experiment`: write a function of a seed that measures something. The median over seeds has to lie in a band;
- `OpenTask`: something to build or to explain, with a rubric, without a check and without points.

A check never raises, whatever the answer does: it returns a `Report`, which a notebook displays. It calls an answer
through an `Answer`, so that the same check serves a notebook (`LocalAnswer`) and a class (minids/course/judge.py).
"""

import importlib
import inspect
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minids.course import progress
from minids.course.answers import Answer, CodeRaised, Implementation, LocalAnswer, Report, carefully, complaint
from minids.course.compare import Wrong, compare, describe
from minids.course.observation import Observation
from minids.course.wire import NotDefined

Examples = Callable[[torch.Generator], Sequence[tuple]]
REPETITIONS = 3  # of each implementation, where a test might count how often it is called


@dataclass(frozen=True)
class Function:
    """An exercise to write the function `name`, worth `points`.

    `examples` makes the argument tuples from a generator, always the same ones. `mistakes` maps the description of a
    mistake, worded to follow "this is what comes out when ", to a function that makes it. `hints` are shown one by one
    on demand, then `section`. `outputs` names the parts of a tuple that the function returns. The gradients with
    respect to the arguments named in `gradients` are compared too. `cost` gets the arguments and the observed call,
    and returns what is wrong with the way in which the result was reached, or None.
    """

    id: str
    name: str
    reference: Implementation
    examples: Examples
    mistakes: Mapping[str, Implementation]
    hints: tuple[str, ...] = ()
    section: str = ""
    points: int = 1
    outputs: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    cost: Callable[[tuple, Observation], str | None] | None = None

    @property
    def parameters(self) -> list[str]:
        """The names of the arguments."""
        return list(inspect.signature(self.reference).parameters)

    def check(self, answer: Answer, careful: bool = False) -> Report:
        examples = self.examples(torch.Generator().manual_seed(0))
        seen: list[Observation] = []
        try:
            for number, arguments in enumerate(examples, start=1):
                seen.append(carefully(partial(self._observe, answer, arguments)))
                try:
                    self._compare(seen[-1], arguments)
                except Wrong as wrong:
                    names = self.parameters
                    shown = ", ".join(f"{n} = {describe(a)}" for n, a in zip(names, arguments, strict=False))
                    raise Wrong(f"on example {number} of {len(examples)}, {shown}:\n  {wrong}") from None
        except NotImplementedError:
            return Report(self.id, self.name, "todo", 0, self.points)
        except NotDefined as missing:
            return Report(self.id, self.name, "error", 0, self.points, (str(missing),))
        except CodeRaised as raised:  # their own error comes first: nothing about the algorithm
            return Report(self.id, self.name, "failed", 0, self.points, (str(raised),))
        except Wrong as wrong:
            diagnosis = self._diagnosis(answer, examples, seen)
            lines = [*str(wrong).splitlines(), diagnosis or f'for a hint, run hint("{self.id}")']
            return Report(self.id, self.name, "failed", 0, self.points, tuple(lines))
        return Report(self.id, self.name, "passed", self.points, self.points)

    def _observe(self, answer: Answer, arguments: tuple) -> Observation:
        differentiate = tuple(self.parameters.index(name) for name in self.gradients)
        return answer.observe(arguments, differentiate, self.cost is not None)

    def _compare(self, seen: Observation, arguments: tuple) -> None:
        for name, before, after in zip(self.parameters, arguments, seen.arguments, strict=False):
            try:
                compare(after, before, name)
            except Wrong:
                raise Wrong(f"your code changed the argument `{name}`; return a new value instead") from None
        wanted = self._observe(LocalAnswer(self.name, self.reference), arguments)
        compare(seen.result, wanted.result, "the result", self.outputs)
        for name, got, expected in zip(self.gradients, seen.gradients, wanted.gradients, strict=True):
            compare(got, expected, f"the gradient of the result with respect to `{name}`")
        objection = self.cost and self.cost(arguments, seen)
        if objection:
            raise Wrong(f"the result is correct, but {objection}")

    def _diagnosis(self, answer: Answer, examples: Sequence[tuple], seen: list[Observation]) -> str | None:
        """Describe the known mistake whose results equal the answer's on every example; None if there is none."""
        try:
            seen = seen + [self._observe(answer, arguments) for arguments in examples[len(seen) :]]
        except Exception:
            return None
        for words, mistake in self.mistakes.items():
            try:
                for arguments, own in zip(examples, seen, strict=True):
                    other = self._observe(LocalAnswer(self.name, mistake), arguments)
                    compare(own.result, other.result, "")
                    compare(own.gradients, other.gradients, "")
            except Exception:  # not this mistake, or it raises where the answer does not
                continue
            return f"this is what comes out when {words}"
        return None


@dataclass(frozen=True)
class Bug:
    """A planted mistake: `name` is shown once it is caught, `hint` (where to look) while it is missed."""

    name: str
    implementation: Implementation
    hint: str


@dataclass(frozen=True)
class SpotTheBug:
    """An exercise to write a test, the function `name`, which is called with one implementation at a time.

    The test returns for `right` and raises for each of the `bugs`: `AssertionError`, or an error that the bug causes.
    Each rejected bug is one point; a test that rejects `right` earns none.
    """

    id: str
    name: str
    right: Implementation
    bugs: tuple[Bug, ...]
    hints: tuple[str, ...] = ()
    section: str = ""

    @property
    def points(self) -> int:
        return len(self.bugs)

    def check(self, answer: Answer, careful: bool = False) -> Report:
        """Check the test; `careful` calls it in random order and repeatedly, so that counting calls earns nothing."""
        parameters = [p.name for p in inspect.signature(self.right).parameters.values() if p.kind != p.KEYWORD_ONLY]
        calls = [_opaque(each, parameters) for each in (self.right, *(bug.implementation for bug in self.bugs))]
        order = list(range(len(calls))) * (REPETITIONS if careful else 1)
        if careful:
            random.SystemRandom().shuffle(order)
        complaints: dict[int, list[str | None]] = {index: [] for index in range(len(calls))}
        try:
            for index in order:
                complaints[index].append(complaint(answer, calls[index]))
        except NotImplementedError:
            return Report(self.id, self.name, "todo", 0, self.points)
        except NotDefined as missing:
            return Report(self.id, self.name, "error", 0, self.points, (str(missing),))
        except Wrong as error:
            return Report(self.id, self.name, "failed", 0, self.points, (str(error),))
        rejected = [complaint for complaint in complaints[0] if complaint is not None]
        if rejected:
            refused = ("✗ it rejects the correct implementation", f"  {rejected[0]}")
            return Report(self.id, self.name, "failed", 0, self.points, refused)
        caught = [None not in complaints[index] for index in range(1, len(calls))]
        lines = ["✓ it accepts the correct implementation"]
        for bug, was_caught in zip(self.bugs, caught, strict=True):
            lines.append(f"✓ it catches: {bug.name}" if was_caught else f"✗ it misses a bug; hint: {bug.hint}")
        if not any(caught):
            lines.append("it accepts everything so far: a test needs an assert that can fail")
        status = "passed" if all(caught) else "failed"
        return Report(self.id, self.name, status, sum(caught), self.points, tuple(lines))


def _opaque(implementation: Implementation, parameters: list[str]) -> Implementation:
    """Return the same function of `parameters`, without its name, its options and the texts of its errors."""

    def opaque(*arguments: Any, **named: Any) -> Any:
        try:
            if len(arguments) > len(parameters) or not named.keys() <= set(parameters):
                raise TypeError
            return implementation(*arguments, **named)
        except Exception:
            raise RuntimeError("the implementation raised an error") from None

    return opaque


@dataclass(frozen=True)
class Experiment:
    """An exercise to write `name(seed)`, which returns a measured float; `what` says of what, with its unit.

    The median over `seeds` has to lie between `low` and `high`, which the spread over seeds and processors supports.
    """

    id: str
    name: str
    what: str
    low: float
    high: float
    seeds: tuple[int, ...] = (0, 1, 2)
    points: int = 2
    hints: tuple[str, ...] = ()
    section: str = ""

    def check(self, answer: Answer, careful: bool = False) -> Report:
        values = []
        try:
            for seed in self.seeds:
                result = carefully(partial(answer.observe, (seed,))).result
                if isinstance(result, bool) or not isinstance(result, int | float) or result != result:
                    raise Wrong(f"the function should return a float, got {describe(result)}")
                values.append(float(result))
        except NotImplementedError:
            return Report(self.id, self.name, "todo", 0, self.points)
        except NotDefined as missing:
            return Report(self.id, self.name, "error", 0, self.points, (str(missing),))
        except Wrong as error:
            return Report(self.id, self.name, "failed", 0, self.points, (str(error),))
        median = statistics.median(values)
        passed = self.low <= median <= self.high
        lines = (
            f"{self.what}: median {median:.4g}, from {min(values):.4g} to {max(values):.4g} over {len(values)} seeds",
            f"expected: a median between {self.low:g} and {self.high:g}",
        )
        return Report(self.id, self.name, "passed" if passed else "failed", self.points * passed, self.points, lines)


@dataclass(frozen=True)
class OpenTask:
    """A task without a check: `rubric` says what a good solution shows."""

    id: str
    name: str
    rubric: tuple[str, ...]
    points: int = 0
    hints: tuple[str, ...] = ()
    section: str = ""

    def check(self, answer: Answer, careful: bool = False) -> Report:
        return Report(self.id, self.name, "open", 0, 0, tuple(f"- {line}" for line in self.rubric))


Exercise = Function | SpotTheBug | Experiment | OpenTask


@dataclass(frozen=True)
class Prediction:
    """A number that the learner wrote down before running the code that computes it."""

    question: str
    value: float

    def __repr__(self) -> str:
        return f"{self.question} Your prediction: {self.value:g}. Now run the next cell."

    def compare(self, measured: float) -> None:
        """Print the measured value beside the prediction."""
        ratio = f" ({self.value / measured:.2g} times it)" if measured else ""
        print(f"{self.question} You predicted {self.value:g}{ratio}; it is {measured:.4g}.")


def predict(question: str, value: float) -> Prediction:
    """Write a prediction down; call its `compare` with the result."""
    return Prediction(question, value)


def exercises(chapter: int) -> list[Exercise]:
    """Return the exercises of a chapter, in order. Raises `ValueError` if it has none."""
    try:
        return importlib.import_module(f"minids.course.exercises.chapter{chapter:02d}").EXERCISES
    except ModuleNotFoundError:
        raise ValueError(f"chapter {chapter} has no exercises") from None


def graded(chapter: int) -> list[Exercise]:
    """Return the exercises of a chapter that are worth points: all but open tasks."""
    return [exercise for exercise in exercises(chapter) if exercise.points]


def find(id: str) -> Exercise:
    """Return exercise `id`, such as "2.1". Raises `ValueError` if there is none."""
    chapter = id.split(".")[0]
    for exercise in exercises(int(chapter)) if chapter.isdecimal() else []:
        if exercise.id == id:
            return exercise
    raise ValueError(f"there is no exercise {id!r}")


def check(id: str, answer: Any = None) -> Report:
    """Check an answer to exercise `id`, such as "2.1"; the random state of the notebook is preserved."""
    exercise = find(id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        report = exercise.check(LocalAnswer(exercise.name, answer))
    return progress.noted(report, graded(int(id.split(".")[0])))


_hints_given: Counter[str] = Counter()


def hint(id: str) -> None:
    """Print the next hint for exercise `id`; after the last one, the section of the chapter to read again."""
    exercise = find(id)
    number = _hints_given[id] = _hints_given[id] + 1
    if number <= len(exercise.hints):
        print(f"{id}, hint {number} of {len(exercise.hints)}: {exercise.hints[number - 1]}")
    else:
        print(f"{id}: {exercise.section}")
