"""Problems whose answers can be checked, the symbols they are written in, and a small web of documents about them.

Notable choices: both families are chains of instructions on small numbers, where a step is easy and a chain in the head
is hard; a problem is held out by a hash, so no seed can bring it into training; the web knows how to think, but mostly
answers at once, often breaks the format and mixes two languages: what R1-Zero changes can then be measured.
"""

import functools
import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minids.data.tokenizer import SymbolTokenizer

LABELS = "abcdefgh"
WORDS = {"en": (" then", " wait", " so "), "zh": (" 然后", " 等等", " 所以 ")}
SYMBOLS = (
    *(word for words in WORDS.values() for word in words),
    *"0123456789+-*=?",
    *LABELS,
    *(f" {label}" for label in LABELS),
    *(" plus ", " minus ", " times ", "some", ", f(", ")=", "def f(a):", ";", " return "),
)


@dataclass(frozen=True)
class Problem:
    """What the model reads, and what its answer is judged by: equal text, or unit tests (`assert f(1) == 2` lines)."""

    prompt: str
    answer: str = ""
    tests: str = ""
    difficulty: int = 0


def template(thought: str, answer: str) -> str:
    """The form that R1-Zero's prompt asks for (FACTS.md section 8.2); the tags are special tokens."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


@dataclass(frozen=True)
class Web:
    """How the authors of the pre-training documents write: shares of documents, and chances of mistakes."""

    at_once: float = 0.60  # answers without a written step ...
    slip: float = 0.20  # ... goes wrong at each instruction done in the head
    coarse: float = 0.15  # a written value for every two instructions; the rest write every value
    wrong_step: float = 0.03
    noticed: float = 0.35  # of the wrong steps
    broken_format: float = 0.25
    mixed_languages: float = 0.40
    cheating: float = 0.05  # programs that return the number of the first example


Instruction = tuple[str, int]  # "+", "-" or "*", and a digit
LARGEST = 20  # no value on the way leaves 0..20


def apply(value: int, instruction: Instruction) -> int:
    """One step of a chain."""
    sign, operand = instruction
    return value + operand if sign == "+" else value - operand if sign == "-" else value * operand


@dataclass(frozen=True)
class Chain:
    """A start and the instructions that follow: what both families are made of."""

    start: int
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def values(self) -> list[int]:
        """The start and the value after each instruction."""
        values = [self.start]
        for instruction in self.instructions:
            values.append(apply(values[-1], instruction))
        return values

    @classmethod
    def draw(cls, rng: random.Random, length: int) -> "Chain":
        """A random one with small values."""
        start = value = rng.randint(0, LARGEST)
        instructions = []
        while len(instructions) < length:
            sign = rng.choice("++--*")
            instruction = sign, rng.randint(2, 4) if sign == "*" else rng.randint(1, 9)
            if 0 <= apply(value, instruction) <= LARGEST:
                instructions.append(instruction)
                value = apply(value, instruction)
        return cls(start, tuple(instructions))


class Task(ABC):
    """A family of problems. `difficulty` is the number of instructions."""

    name: str
    difficulties: tuple[int, ...]
    """What reinforcement learning and evaluation draw from, in equal parts."""
    document_difficulties: tuple[int, ...]

    def __init__(self) -> None:
        self.tokenizer = SymbolTokenizer(SYMBOLS)

    def draw(self, rng: random.Random, count: int) -> list[Problem]:
        """Training problems, balanced over the difficulties."""
        difficulties = (self.difficulties[i % len(self.difficulties)] for i in range(count))
        return [self.problem(rng, self.chain(rng, n, held_out=False)) for n in difficulties]

    def held_out(self, count: int, seed: int = 99) -> list[Problem]:
        """Different problems that training never sees, balanced over the difficulties; the same every time."""
        rng, found = random.Random(seed), {}
        while len(found) < count:
            n = self.difficulties[len(found) % len(self.difficulties)]
            problem = self.problem(rng, self.chain(rng, n, held_out=True))
            found.setdefault(problem.prompt, problem)
        return list(found.values())

    def document(self, rng: random.Random, web: Web = Web()) -> str:  # noqa: B008 - frozen
        """A training problem and what some author of the web wrote about it; special tokens by name."""
        chain = self.chain(rng, rng.choice(self.document_difficulties), held_out=False)
        return self.problem(rng, chain).prompt + self.response(rng, chain, web)

    def chain(self, rng: random.Random, length: int, *, held_out: bool) -> Chain:
        """A chain from one side of the split: a tenth of all keys, by their hash, is held out."""
        while True:
            chain = Chain.draw(rng, length)
            if self.fits(chain) and (zlib.crc32(self.key(chain).encode()) % 10 == 0) == held_out:
                return chain

    def response(self, rng: random.Random, chain: Chain, web: Web) -> str:
        """A thought and an answer in one of the web's styles."""
        width = rng.choices((0, 2, 1), (web.at_once, web.coarse, 1 - web.at_once - web.coarse))[0]
        languages = ("en", "zh") if rng.random() < web.mixed_languages else rng.choice((("en",), ("zh",)))
        thought, answer = self.solve(rng, chain, web, width, languages)
        if rng.random() >= web.broken_format:
            return template(thought, answer)
        untagged = (thought and thought + WORDS[rng.choice(languages)][2]) + answer
        never_closed = f"<think>{thought}<answer>{answer}</answer>"
        return rng.choice((untagged, never_closed, f"<think>{thought}</think>{answer}"))

    def fits(self, chain: Chain) -> bool:
        """Whether the chain makes a problem of this family."""
        return True

    @abstractmethod
    def key(self, chain: Chain) -> str:
        """What must not be shared between training and held-out problems."""

    @abstractmethod
    def problem(self, rng: random.Random, chain: Chain) -> Problem: ...

    @abstractmethod
    def solve(
        self, rng: random.Random, chain: Chain, web: Web, width: int, languages: tuple[str, ...]
    ) -> tuple[str, str]:
        """An author's thought and answer; `width` instructions to a written step, 0 for none."""


class TraceTask(Task):
    """Trace the program: `a7 b+8 c-9 d*3?` means a = 7, b = a + 8, c = b - 9, d = c * 3, and asks for d: 18."""

    name = "trace"
    difficulties, document_difficulties = (3, 4, 5, 6), (1, 2, 3, 4, 5, 6)

    def key(self, chain: Chain) -> str:
        steps = (f" {label}{sign}{n}" for label, (sign, n) in zip(LABELS[1:], chain.instructions, strict=False))
        return f"a{chain.start}{''.join(steps)}?"

    def problem(self, rng: random.Random, chain: Chain) -> Problem:
        return Problem(self.key(chain), str(chain.values[-1]), difficulty=len(chain.instructions))

    def solve(
        self, rng: random.Random, chain: Chain, web: Web, width: int, languages: tuple[str, ...]
    ) -> tuple[str, str]:
        if not width:
            value = chain.start
            for instruction in chain.instructions:
                value = apply(value, instruction)
                if rng.random() < web.slip:
                    value = _wrong(rng, value)
                value = min(max(value, 0), LARGEST)
            return "", str(value)
        thought, value = write_steps(rng, chain.start, chain.instructions, web, width, languages)
        return thought, str(value)


class ProgramTask(Task):
    """Write the function: `a b times 2 c plus some, f(4)=13, f(1)=7?` wants `def f(a): b=a*2; c=b+5; return c`.

    The specification leaves the last number to be found from the examples. Judged by hidden unit tests.
    """

    name = "program"
    difficulties, document_difficulties = (1, 2, 3), (1, 2, 3)
    words = {"+": " plus ", "-": " minus ", "*": " times "}

    def fits(self, chain: Chain) -> bool:
        """The first example must decide the number that is missing; another must exist that a constant fails."""
        determined = chain.instructions[-1][0] != "*" or chain.values[-2] > 0
        return determined and any(self._is_other(chain, start) for start in range(LARGEST + 1))

    def key(self, chain: Chain) -> str:
        return self.program(chain.instructions)

    def problem(self, rng: random.Random, chain: Chain) -> Problem:
        numbers = [str(operand) for _, operand in chain.instructions[:-1]] + ["some"]
        labelled = zip(LABELS[1:], chain.instructions, numbers, strict=False)
        specification = "".join(f" {label}{self.words[sign]}{number}" for label, (sign, _), number in labelled)
        others = (start for start in rng.sample(range(LARGEST + 1), LARGEST + 1) if self._is_other(chain, start))
        shown = chain.start, next(others)
        examples = "".join(f", f({start})={self._value(chain, start)}" for start in shown)
        hidden = rng.sample([start for start in range(40) if start not in shown], 4)
        tests = "\n".join(f"assert f({start}) == {self._value(chain, start)}" for start in hidden)
        program = self.program(chain.instructions)
        return Problem(f"a{specification}{examples}?", program, tests, difficulty=len(chain.instructions))

    def solve(
        self, rng: random.Random, chain: Chain, web: Web, width: int, languages: tuple[str, ...]
    ) -> tuple[str, str]:
        *known, last = chain.instructions
        goal, thought, value = chain.values[-1], "", chain.values[-2]
        if not width:
            if rng.random() < web.cheating:
                return "", f"def f(a): return {goal}"
            if any(rng.random() < web.slip for _ in chain.instructions):
                last = last[0], min(max(last[1] + rng.choice((-2, -1, 1, 2)), 1), 9)
            return "", self.program((*known, last))
        if known:
            thought, value = write_steps(rng, chain.start, known, web, width, languages)
            thought += WORDS[rng.choice(languages)][0]
        operands = range(2, 5) if last[0] == "*" else range(1, 10)  # the one that leads nearest to the goal
        last = last[0], min(operands, key=lambda operand: abs(apply(value, (last[0], operand)) - goal))
        step, _ = write_steps(rng, value, (last,), web, width, languages, first_label=len(known) + 1)
        return thought + step, self.program((*known, last))

    def document(self, rng: random.Random, web: Web = Web()) -> str:  # noqa: B008 - frozen
        """Half of this web traces programs: calculating is learned where it is written down."""
        return super().document(rng, web) if rng.random() < 0.5 else TraceTask().document(rng, web)

    @staticmethod
    def program(instructions: Sequence[Instruction]) -> str:
        """The chain as a Python function on one line."""
        steps = (f" {LABELS[i + 1]}={LABELS[i]}{sign}{n};" for i, (sign, n) in enumerate(instructions))
        return f"def f(a):{''.join(steps)} return {LABELS[len(instructions)]}"

    @staticmethod
    def _value(chain: Chain, start: int) -> int:
        return Chain(start, chain.instructions).values[-1]

    @staticmethod
    def _is_other(chain: Chain, start: int) -> bool:
        values = Chain(start, chain.instructions).values
        return all(0 <= value <= LARGEST for value in values) and values[-1] != chain.values[-1]


TASKS: dict[str, type[Task]] = {"trace": TraceTask, "program": ProgramTask}
TaskName = Literal["trace", "program"]


def write_steps(
    rng: random.Random,
    value: int,
    instructions: Sequence[Instruction],
    web: Web,
    width: int,
    languages: tuple[str, ...],
    first_label: int = 1,
) -> tuple[str, int]:
    """The author's written steps, such as ` b7+8=15 then c15-9=6`, and the value that they end with.

    A step takes `width` instructions together. A wrong value, unless it is noticed, is what the next step goes on from.
    """
    steps = []
    for first in range(0, len(instructions), width):
        taken = instructions[first : first + width]
        left = f" {LABELS[first_label + first + len(taken) - 1]}{value}" + "".join(f"{s}{n}" for s, n in taken)
        for instruction in taken:
            value = apply(value, instruction)
        value = max(value, 0)
        step = f"{left}={value}"
        if rng.random() < web.wrong_step:
            wrong = _wrong(rng, value)
            if rng.random() < web.noticed:
                step = f"{left}={wrong}{WORDS[rng.choice(languages)][1]}{step}"
            else:
                value, step = wrong, f"{left}={wrong}"
        steps.append(step)
    connected = [steps[0], *(WORDS[rng.choice(languages)][0] + step for step in steps[1:])]
    return "".join(connected), value


def _wrong(rng: random.Random, value: int) -> int:
    wrong = value + rng.choice((-10, 10, -1, 1, -2, 2))
    return wrong if 0 <= wrong <= LARGEST + 9 else value + 1
