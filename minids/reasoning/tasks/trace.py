"""The task "trace": multi-step arithmetic, verified by comparison of the answer."""

import random

from minids.reasoning.tasks.chain import LARGEST, Chain, apply
from minids.reasoning.tasks.steps import write_steps, wrong_value
from minids.reasoning.tasks.task import LABELS, CorpusStyle, Problem, Task


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
        self, rng: random.Random, chain: Chain, style: CorpusStyle, width: int, languages: tuple[str, ...]
    ) -> tuple[str, str]:
        if not width:
            value = chain.start
            for instruction in chain.instructions:
                value = apply(value, instruction)
                if rng.random() < style.slip:
                    value = wrong_value(rng, value)
                value = min(max(value, 0), LARGEST)
            return "", str(value)
        thought, value = write_steps(rng, chain.start, chain.instructions, style, width, languages)
        return thought, str(value)
