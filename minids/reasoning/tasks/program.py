"""The task "program": write a function from a specification and examples, verified by hidden unit tests.

Notable choices: the thought computes what is missing, so an answer that thinks is correct more often than one that does
not, and reinforcement learning has something to select. No document contains a held-out program, not even by mistake.
"""

import random
import re
from collections.abc import Sequence
from typing import Literal

from minids.data.tokenizer import SymbolTokenizer
from minids.reasoning.tasks.chain import LARGEST, Chain, Instruction, apply
from minids.reasoning.tasks.steps import write_steps, wrong_value
from minids.reasoning.tasks.task import LABELS, SYMBOLS, WORDS, CorpusStyle, Problem, Task
from minids.reasoning.tasks.trace import TraceTask

Thought = Literal["computed", "guessed"]
PROGRAM = re.compile(r"def f\(a\):(?: \w=\S+;)+ return \w")  # with at least one instruction
PROGRAMS = 0.7  # fraction of documents with a program; the rest are traces, from which arithmetic is learned


class ProgramTask(Task):
    """Write the function: `a b times 2 c plus some, f(4)=13, f(1)=7?` asks for `def f(a): b=a*2; c=b+5; return c`.

    The last operand is not in the specification, but follows from the first example. Hidden unit tests verify the
    answer. With thought="computed", thoughts trace the example and subtract: ` b4*2=8 then some=13-8=5`. With
    thought="guessed" (a control) the operand stands before the result, so the thought records a guess and computes
    nothing: ` b4*2=8 then c8+5=13`. Raises `ValueError` for any other thought.
    """

    name = "program"
    difficulties, document_difficulties = (2, 3), (1, 2, 3)
    words = {"+": " plus ", "-": " minus ", "*": " times "}

    def __init__(self, thought: Thought = "computed") -> None:
        if thought not in ("computed", "guessed"):
            raise ValueError(f'thought={thought!r}: must be "computed" or "guessed"')
        self.thought = thought
        numbers = map(str, range(10, LARGEST + 10))  # one token each: sums of whole numbers are learned sooner
        self.tokenizer = SymbolTokenizer((*SYMBOLS, *numbers, " some="))

    def fits(self, chain: Chain) -> bool:
        """Require that a subtraction finds the missing operand, and that another example excludes a constant."""
        return chain.instructions[-1][0] != "*" and any(self._is_other(chain, start) for start in range(LARGEST + 1))

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
        self, rng: random.Random, chain: Chain, style: CorpusStyle, width: int, languages: tuple[str, ...]
    ) -> tuple[str, str]:
        *known, (sign, operand) = chain.instructions
        goal, thought, value = chain.values[-1], "", chain.start
        if not width:
            if rng.random() < style.cheating:
                return "", f"def f(a): return {goal}"
            if any(rng.random() < style.slip for _ in chain.instructions):
                operand = min(max(operand + rng.choice((-2, -1, 1, 2)), 1), 9)
            return "", self.program((*known, (sign, operand)))
        if known:
            thought, value = write_steps(rng, value, known, style, width, languages)
            thought += WORDS[rng.choice(languages)][0]
        if self.thought == "guessed":  # the operand is written first, and its result is nearest to the goal
            operand = min(range(1, 10), key=lambda guess: abs(apply(value, (sign, guess)) - goal))
            last = (sign, operand)
            step, _ = write_steps(rng, value, (last,), style, width, languages, first_label=len(known) + 1)
        else:
            step, operand = _write_difference(rng, goal, value, sign, style, languages)
        return thought + step, self.program((*known, (sign, operand)))

    def document(self, rng: random.Random, style: CorpusStyle = CorpusStyle()) -> str:  # noqa: B008 - frozen
        """Write a document: 70 % programs, none of them held out, and 30 % traces."""
        if rng.random() >= PROGRAMS:
            return TraceTask().document(rng, style)
        while True:
            text = super().document(rng, style)
            program = PROGRAM.search(text)
            if program is None or not self.is_held_out(program[0]):
                return text

    @staticmethod
    def program(instructions: Sequence[Instruction]) -> str:
        """Return the chain as a Python function on one line."""
        steps = (f" {LABELS[i + 1]}={LABELS[i]}{sign}{n};" for i, (sign, n) in enumerate(instructions))
        return f"def f(a):{''.join(steps)} return {LABELS[len(instructions)]}"

    @staticmethod
    def _value(chain: Chain, start: int) -> int:
        return Chain(start, chain.instructions).values[-1]

    @staticmethod
    def _is_other(chain: Chain, start: int) -> bool:
        values = Chain(start, chain.instructions).values
        return all(0 <= value <= LARGEST for value in values) and values[-1] != chain.values[-1]


def _write_difference(
    rng: random.Random, goal: int, value: int, sign: str, style: CorpusStyle, languages: tuple[str, ...]
) -> tuple[str, int]:
    """Write the step that finds the missing operand, such as ` some=13-8=5`; return it and the operand found."""
    larger, smaller = (goal, value) if sign == "+" else (value, goal)
    left, operand = f" some={larger}-{smaller}=", max(larger - smaller, 0)
    if rng.random() >= style.wrong_step:
        return f"{left}{operand}", operand
    wrong = wrong_value(rng, operand)
    if rng.random() < style.noticed:
        return f"{left}{wrong}{WORDS[rng.choice(languages)][1]}{left}{operand}", operand
    return f"{left}{wrong}", wrong


def shown_test(problem: Problem) -> str:
    """Return the first example of the prompt as a unit test: a weak one, which a constant passes."""
    start, result = re.findall(r"f\((\d+)\)=(\d+)", problem.prompt)[0]
    return f"assert f({start}) == {result}"
