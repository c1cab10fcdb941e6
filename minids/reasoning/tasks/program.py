"""The task "program": write a function from a specification and examples, verified by hidden unit tests."""

import random
from collections.abc import Sequence

from minids.reasoning.tasks.chain import LARGEST, Chain, Instruction, apply
from minids.reasoning.tasks.steps import write_steps
from minids.reasoning.tasks.task import LABELS, WORDS, CorpusStyle, Problem, Task
from minids.reasoning.tasks.trace import TraceTask


class ProgramTask(Task):
    """Write the function: `a b times 2 c plus some, f(4)=13, f(1)=7?` asks for `def f(a): b=a*2; c=b+5; return c`.

    The last operand is not in the specification and has to be inferred from the examples. Hidden unit tests verify it.
    """

    name = "program"
    difficulties, document_difficulties = (1, 2, 3), (1, 2, 3)
    words = {"+": " plus ", "-": " minus ", "*": " times "}

    def fits(self, chain: Chain) -> bool:
        """Require that the first example determines the missing operand, and that another excludes a constant."""
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
        self, rng: random.Random, chain: Chain, style: CorpusStyle, width: int, languages: tuple[str, ...]
    ) -> tuple[str, str]:
        *known, last = chain.instructions
        goal, thought, value = chain.values[-1], "", chain.values[-2]
        if not width:
            if rng.random() < style.cheating:
                return "", f"def f(a): return {goal}"
            if any(rng.random() < style.slip for _ in chain.instructions):
                last = last[0], min(max(last[1] + rng.choice((-2, -1, 1, 2)), 1), 9)
            return "", self.program((*known, last))
        if known:
            thought, value = write_steps(rng, chain.start, known, style, width, languages)
            thought += WORDS[rng.choice(languages)][0]
        operands = range(2, 5) if last[0] == "*" else range(1, 10)  # below: the one whose result is nearest to the goal
        last = last[0], min(operands, key=lambda operand: abs(apply(value, (last[0], operand)) - goal))
        step, _ = write_steps(rng, value, (last,), style, width, languages, first_label=len(known) + 1)
        return thought + step, self.program((*known, last))

    def document(self, rng: random.Random, style: CorpusStyle = CorpusStyle()) -> str:  # noqa: B008 - frozen
        """Write a document: half of them trace programs, because arithmetic is learned from written steps."""
        return super().document(rng, style) if rng.random() < 0.5 else TraceTask().document(rng, style)

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
