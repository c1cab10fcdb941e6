"""The task "signs": find the signs that make a number, a miniature Countdown, by trying, checking and backing up.

Notable choices: a calculation is easy, but which signs make the target cannot be seen at once, so an answer is guessed
or searched for, and nothing in the problem determines how long a search takes; all results of a thought are written
down, and the target is written beside each result, so every step needs only what is near; a number is one token, and
so is `=10`, hence the target and a result that equals it are the same token. The answer is judged by a rule: any signs
that make the target are correct, and nothing is executed.
"""

import functools
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from minids.config import require
from minids.data.tokenizer import SymbolTokenizer
from minids.reasoning.tasks.chain import Chain, apply
from minids.reasoning.tasks.task import CorpusStyle, Problem, Task, template
from minids.sandbox.judge import Verdict

SIGNS = "+-*"
NUMBERS = range(1, 6)
LARGEST = 25
"""All values of a written calculation are in 0..25; a calculation that would leave this range stops."""
NO, YES, SO, IS = " no ", " yes", " so ", " is"
SYMBOLS = (*map(str, range(LARGEST + 1)), *(f"={n}" for n in range(LARGEST + 1)), *SIGNS, " ", "?", NO, YES, SO, IS)

_NUMBER = "(?:0|[1-9][0-9]?)"
_EXPRESSION = re.compile(f"{_NUMBER}(?:[-+*]{_NUMBER})*")


@dataclass(frozen=True)
class HabitMix:
    """How the documents of the corpus find an answer: the fraction of each habit, and probabilities of mistakes.

    The rest of the documents, .30 by default, search: they calculate a candidate, compare it with the target, and after
    a failure back up and try another one. Raises `ValueError` for a value outside 0..1, and for habits that add up to
    more than 1.
    """

    guess: float = 0.40
    """Habit: answer at once, without a thought."""
    unchecked: float = 0.10
    """Habit: calculate one candidate and answer it, without comparing it with the target."""
    one_check: float = 0.20
    """Habit: calculate one candidate, compare it with the target, and answer it even if it fails."""
    lucky: float = 0.15
    """Probability that a guess is a solution; the other guesses are random."""
    patience: float = 0.65
    """Probability that a search tries another candidate after a failure; otherwise it answers the one that failed."""
    systematic: float = 0.50
    """Fraction of searches that take the candidates in counting order; the others draw them."""
    forgetful: float = 0.30
    """Fraction of searches that may draw a candidate that has failed before."""
    guess_after_failure: float = 0.0
    """Probability that, after a last failure, the answer has signs drawn at random."""
    answer_follows: bool = True
    """Whether the answer follows from the thought; if not, every answer after a thought has signs drawn at random."""
    wrong_step: float = 0.02
    """Probability per step that the written result is off by 1 or 2."""
    false_yes: float = 0.01
    """Probability that an incorrect result has the verdict "yes"."""
    overlooked: float = 0.03
    """Probability that a correct result has the verdict "no"."""
    homework: float = 0.20
    """Fraction of documents that are no problem but a list of calculations, all compared with the same target."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            require(0 <= value <= 1, field.name, value, "must be a probability, from 0 to 1")
        habits = self.guess + self.unchecked + self.one_check
        require(habits <= 1, "guess + unchecked + one_check", habits, "must be at most 1; the rest search")


class SignsTask(Task):
    """Find the signs: `3 4 2=10?` asks for 3, 4 and 2 in this order with signs between them that make 10: `3*4-2`.

    Calculated from left to right, without precedence. The difficulty is the number of signs n; there are 3**n
    candidates. A problem is a chain whose instructions are one solution; others may exist and are as correct.
    """

    name = "signs"
    difficulties, document_difficulties = (2, 3), (1, 2, 3)
    one_held_out_in = 5  # there are few problems with two signs, 728

    def __init__(self, mix: HabitMix = HabitMix()) -> None:  # noqa: B008 - frozen
        self.tokenizer, self.mix = SymbolTokenizer(SYMBOLS), mix

    def any_chain(self, rng: random.Random, length: int) -> Chain:
        return Chain(rng.choice(NUMBERS), tuple((rng.choice(SIGNS), rng.choice(NUMBERS)) for _ in range(length)))

    def fits(self, chain: Chain) -> bool:
        """Require values in range."""
        return all(0 <= value <= LARGEST for value in chain.values)

    def held_out(self, count: int, seed: int = 99) -> list[Problem]:
        """Return distinct held-out problems, as `Task.held_out`. Raises `ValueError` for more than there are."""
        most = len(self.difficulties) * len(self._held_out_prompts(min(self.difficulties)))
        require(count <= most, "held-out problems", count, f"must be at most {most}, so that difficulties are balanced")
        return super().held_out(count, seed)

    def _held_out_prompts(self, count: int) -> set[str]:
        """Return all held-out prompts with `count` signs."""
        every = (candidate(n, s) for n in itertools.product(NUMBERS, repeat=count + 1) for s in candidates(count))
        return {key for chain in every if self.fits(chain) and self.is_held_out(key := self.key(chain))}

    def key(self, chain: Chain) -> str:
        numbers = (chain.start, *(number for _, number in chain.instructions))
        return write_problem(numbers, chain.values[-1])

    def problem(self, rng: random.Random, chain: Chain) -> Problem:
        """Return the problem; `answer` is one solution, and `tests`, what `judge_signs` verifies by, the prompt."""
        prompt, signs = self.key(chain), "".join(sign for sign, _ in chain.instructions)
        return Problem(prompt, expression(read_problem(prompt)[0], signs), prompt, len(signs))

    def document(self, rng: random.Random, style: CorpusStyle = CorpusStyle()) -> str:  # noqa: B008 - frozen
        """Write a problem with a response of a random habit, or homework.

        Of `style` only `broken_format` applies: the habits are those of `mix`.
        """
        chain = self.chain(rng, rng.choice(self.document_difficulties), held_out=False)
        if rng.random() < self.mix.homework:
            return self._homework(rng, target=chain.values[-1])
        return self.key(chain) + self.response(rng, chain, style)

    def response(self, rng: random.Random, chain: Chain, style: CorpusStyle) -> str:
        thought, answer = self.solve(rng, chain, style)
        if rng.random() >= style.broken_format:
            return template(thought, answer)
        untagged = (thought and thought + SO) + answer
        return rng.choice((untagged, f"<think>{thought}<answer>{answer}</answer>", f"<think>{thought}</think>{answer}"))

    def solve(
        self, rng: random.Random, chain: Chain, style: CorpusStyle, width: int = 1, languages: tuple[str, ...] = ("en",)
    ) -> tuple[str, str]:
        """Write a thought and an answer of a random habit; `style`, `width` and `languages` do not apply."""
        mix = self.mix
        numbers, target = read_problem(self.key(chain))
        count = len(numbers) - 1
        habit_weights = (mix.guess, mix.unchecked, mix.one_check)
        habit = rng.choices(("guess", "unchecked", "one check", "search"), (*habit_weights, 1 - sum(habit_weights)))[0]
        signs = rng.choice(candidates(count))
        if habit == "guess":
            if rng.random() < mix.lucky:
                signs = "".join(sign for sign, _ in chain.instructions)
            return "", expression(numbers, signs)
        thought, signs = self._think(rng, numbers, target, habit, signs)
        if not mix.answer_follows:
            signs = rng.choice(candidates(count))
        return thought, expression(numbers, signs)

    def _think(
        self, rng: random.Random, numbers: Sequence[int], target: int, habit: str, signs: str
    ) -> tuple[str, str]:
        """Write a thought that begins with a candidate; return it and the signs it leads to."""
        mix, count = self.mix, len(signs)
        systematic, forgetful = rng.random() < mix.systematic, rng.random() < mix.forgetful
        thought, failed = "", []
        while True:
            text, tried, result = self._calculate(rng, numbers, signs)
            thought += text
            if habit == "unchecked":
                return thought, signs
            verdict = self._compare(rng, result, target)
            thought += verdict
            if verdict.endswith(YES):
                return thought, signs
            failed.append(tried)
            left = [other for other in candidates(count) if forgetful or not other.startswith(tuple(failed))]
            if habit == "one check" or not left or rng.random() >= mix.patience:
                guess = rng.random() < mix.guess_after_failure
                return thought, rng.choice(candidates(count)) if guess else signs
            signs = next_in_order(tried, count) if systematic else rng.choice(left)

    def _calculate(self, rng: random.Random, numbers: Sequence[int], signs: str) -> tuple[str, str, int | None]:
        """Write a calculation `3*4=12-2=10`; return it, the signs it has got to, and its result.

        A calculation that leaves 0..`LARGEST` ends before that value, and its result is None: `3-4`.
        """
        text, value = str(numbers[0]), numbers[0]
        for i, (sign, number) in enumerate(zip(signs, numbers[1:], strict=True)):
            text += f"{sign}{number}"
            value = apply(value, (sign, number))
            if not 0 <= value <= LARGEST:
                return text, signs[: i + 1], None
            if rng.random() < self.mix.wrong_step:
                value = min(max(value + rng.choice((-2, -1, 1, 2)), 0), LARGEST)
            text += f"={value}"
        return text, signs, value

    def _compare(self, rng: random.Random, result: int | None, target: int) -> str:
        """Write the target and the verdict; a calculation without a result fails without a comparison."""
        if result is None:
            return NO
        correct = result == target
        if rng.random() < (self.mix.overlooked if correct else self.mix.false_yes):
            correct = not correct
        return f"{IS}={target}{YES if correct else NO}"

    def _homework(self, rng: random.Random, target: int) -> str:
        """Write six calculations, each compared with the target: `=10?2*5=10 is=10 yes 3+4=7 is=10 no ...`.

        Four in ten are meant to make the target. None solves a held-out problem.
        """
        lines: list[str] = []
        while len(lines) < 6:
            hit = rng.random() < 0.4
            while True:
                numbers = [rng.choice(NUMBERS) for _ in range(rng.randint(2, 4))]
                signs = rng.choice(candidates(len(numbers) - 1))
                makes = candidate(numbers, signs).values[-1] == target
                if makes == hit and not self.is_held_out(write_problem(numbers, target)):
                    break
            text, _, result = self._calculate(rng, numbers, signs)
            lines.append(text + (NO if result is None else f"{IS}={target}{YES + ' ' if result == target else NO}"))
        return f"={target}?" + "".join(lines)


def read_problem(prompt: str) -> tuple[tuple[int, ...], int]:
    """Return the numbers and the target of a prompt such as `3 4 2=10?`."""
    numbers, target = prompt.removesuffix("?").split("=")
    return tuple(map(int, numbers.split())), int(target)


def write_problem(numbers: Sequence[int], target: int) -> str:
    """Return the prompt, the inverse of `read_problem`."""
    return f"{' '.join(map(str, numbers))}={target}?"


def candidate(numbers: Sequence[int], signs: str) -> Chain:
    """Return numbers and signs as a chain, which has the values after each step."""
    return Chain(numbers[0], tuple(zip(signs, numbers[1:], strict=True)))


def expression(numbers: Sequence[int], signs: str) -> str:
    """Return numbers and signs as an expression such as `3*4-2`."""
    return str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:], strict=True))


def evaluate(text: str) -> tuple[tuple[int, ...], int] | None:
    """Return the numbers and the value, from left to right, of an expression such as `3*4-2`; None for other text."""
    if not _EXPRESSION.fullmatch(text):
        return None
    first, *rest = re.findall(r"[-+*]?[0-9]+", text)
    value = int(first)
    for part in rest:
        value = apply(value, (part[0], int(part[1:])))
    return (int(first), *(int(part[1:]) for part in rest)), value


def judge_signs(jobs: list[tuple[str, str]]) -> list[Verdict]:
    """Judge (answer, prompt) pairs: an answer passes if it has the prompt's numbers in order and makes its target."""
    verdicts = []
    for answer, prompt in jobs:
        found, (numbers, target) = evaluate(answer.strip()), read_problem(prompt)
        if found is None:
            reason = f"{answer!r} is not an expression such as 3*4-2"
        elif found[0] != numbers:
            reason = f"the numbers are {found[0]}, must be {numbers}"
        else:
            reason = "" if found[1] == target else f"{answer.strip()} is {found[1]}, must be {target}"
        verdicts.append(Verdict(not reason, reason, 0.0))
    return verdicts


@functools.cache
def candidates(count: int) -> list[str]:
    """Return all strings of `count` signs in counting order: `++`, `+-`, `+*`, `-+`, ..."""
    return ["".join(signs) for signs in itertools.product(SIGNS, repeat=count)]


def next_in_order(failed: str, count: int) -> str:
    """Return the candidate that follows, in counting order, all those that begin with `failed`; first after last."""
    last = max(i for i, signs in enumerate(candidates(count)) if signs.startswith(failed))
    return candidates(count)[(last + 1) % 3**count]
