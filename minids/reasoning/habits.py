"""Habits of thought in answers to the task "signs": how many candidates are tried, and what follows a failure.

Notable choices: the counts describe a thought and are no part of any reward; an unclosed thought is read too, so an
answer that the token limit cut off counts with what it has tried until then.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from minids.reasoning.rewards import Response
from minids.reasoning.rollout import Sample
from minids.reasoning.tasks import Problem
from minids.reasoning.tasks.chain import apply
from minids.reasoning.tasks.signs import IS, SO, next_in_order, read_problem

Way = Literal["at once", "unchecked", "one check", "backs up"]
_PART = re.compile(r"([-+*])([0-9]+)(?:=([0-9]+))?")  # sign, number, result


@dataclass(frozen=True)
class Attempt:
    """A written candidate: its calculation, such as `3*4=12-2=10`, and its verdict, "yes", "no" or ""."""

    calculation: str
    verdict: str

    @property
    def parts(self) -> list[tuple[str, int, int | None]]:
        """Sign, number and written result of each step; the result is None where none is written."""
        found = _PART.findall(self.calculation)
        return [(sign, int(number), int(result) if result else None) for sign, number, result in found]

    @property
    def signs(self) -> str:
        """The signs tried; a calculation that leaves the range has tried its first signs only."""
        return "".join(sign for sign, _, _ in self.parts)

    @property
    def expression(self) -> str:
        """The calculation without its results."""
        return re.sub("=[0-9]*", "", self.calculation)

    @property
    def numbers(self) -> tuple[int, ...]:
        first = re.match("[0-9]+", self.calculation)
        return (*((int(first[0]),) if first else ()), *(number for _, number, _ in self.parts))


def attempts(text: str) -> list[Attempt]:
    """Return the attempts of a thought. An expression with neither a result nor a verdict is none: it is a guess."""
    pieces = re.split("( no| yes)", text)
    pairs = zip(pieces[::2], [*pieces[1::2], ""], strict=True)
    found = [Attempt(before.split(IS)[0].strip(), verdict.strip()) for before, verdict in pairs]
    return [one for one in found if one.parts and ("=" in one.calculation or one.verdict)]


@dataclass(frozen=True)
class Habits:
    """What one answer does. The counts are of attempts, unless they are said to be of steps or verdicts."""

    attempts: int
    backing_up: int
    """Attempts that follow a failed one, whose verdict is "no"."""
    verified: bool
    """The last attempt has the verdict "yes", and the answer is that attempt."""
    repeats: int
    """Attempts that begin with the signs of an earlier one, so they cannot succeed where that one failed."""
    in_order: int
    """Attempts that follow the one before in counting order."""
    own_numbers: int
    """Attempts with the numbers of the problem in their order."""
    hits: int
    """Attempts that write the target as the result of all signs."""
    steps: int
    correct_steps: int
    verdicts: int
    correct_verdicts: int
    """Verdicts that compare the written result with the target correctly; without a result, "no" is correct."""

    @property
    def way(self) -> Way:
        """How the answer was found."""
        if self.backing_up:
            return "backs up"
        return "one check" if self.verdicts else "unchecked" if self.attempts else "at once"


def habits(problem: Problem, response: Response) -> Habits:
    """Count what an answer to a problem of the task "signs" does."""
    thought = response.thought
    if thought is None:  # never closed, or without tags
        thought = re.sub("<[^>]*>", "", re.split(f"<answer>|{SO}", response.text)[0])
    tried = attempts(thought)
    numbers, target = read_problem(problem.prompt)
    count = len(numbers) - 1
    repeats = in_order = hits = steps = correct_steps = correct_verdicts = 0
    for i, attempt in enumerate(tried):
        signs = attempt.signs
        repeats += any(signs.startswith(earlier.signs) for earlier in tried[:i])
        if i and len(tried[i - 1].signs) <= count:
            in_order += next_in_order(tried[i - 1].signs, count).startswith(signs)
        value, result = attempt.numbers[0] if attempt.numbers else 0, None
        for sign, number, result in attempt.parts:
            if result is not None:
                steps += 1
                correct_steps += apply(value, (sign, number)) == result
                value = result
        hit = len(signs) == count and result == target
        hits += hit
        correct_verdicts += bool(attempt.verdict) and hit == (attempt.verdict == "yes")
    last = tried[-1] if tried else Attempt("", "")
    answer = (response.answer or "").strip()
    return Habits(
        attempts=len(tried),
        backing_up=sum(attempt.verdict == "no" for attempt in tried[:-1]),
        verified=last.verdict == "yes" and answer == last.expression,
        repeats=repeats,
        in_order=in_order,
        own_numbers=sum(attempt.numbers == numbers[: len(attempt.numbers)] for attempt in tried),
        hits=hits,
        steps=steps,
        correct_steps=correct_steps,
        verdicts=sum(bool(attempt.verdict) for attempt in tried),
        correct_verdicts=correct_verdicts,
    )


def mean_habits(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the means of many answers, as numbers per answer and as fractions; a fraction of nothing is 0.

    Per answer: attempts. Fractions of answers: checks (any verdict), backs_up, verified. Fractions of the attempts that
    have one before them: repeats, in_order. Fractions of attempts: hits, own_numbers. Fractions of steps and of
    verdicts: correct_steps, correct_verdicts.
    """
    found = [habits(sample.problem, sample.response) for sample in samples]
    later = sum(max(one.attempts - 1, 0) for one in found)
    total = {name: sum(getattr(one, name) for one in found) for name in Habits.__dataclass_fields__}
    share = lambda part, whole: part / whole if whole else 0.0  # noqa: E731
    return {
        "attempts": fmean(one.attempts for one in found),
        "checks": fmean(one.verdicts > 0 for one in found),
        "backs_up": fmean(one.backing_up > 0 for one in found),
        "verified": fmean(one.verified for one in found),
        "repeats": share(total["repeats"], later),
        "in_order": share(total["in_order"], later),
        "hits": share(total["hits"], total["attempts"]),
        "own_numbers": share(total["own_numbers"], total["attempts"]),
        "correct_steps": share(total["correct_steps"], total["steps"]),
        "correct_verdicts": share(total["correct_verdicts"], total["verdicts"]),
    }


def by_way(samples: Sequence[Sample]) -> dict[Way, tuple[float, float]]:
    """Return, by how answers were found, the fraction of all answers and the accuracy among them."""
    groups: dict[Way, list[float]] = {}
    for sample in samples:
        accuracy = sample.score.parts["accuracy"]
        groups.setdefault(habits(sample.problem, sample.response).way, []).append(accuracy)
    return {way: (len(right) / len(samples), fmean(right)) for way, right in groups.items()}
