"""Written steps of a chain in a document of the pre-training corpus, with mistakes."""

import random
from collections.abc import Sequence

from minids.reasoning.tasks.chain import LARGEST, Instruction, apply
from minids.reasoning.tasks.task import LABELS, WORDS, CorpusStyle


def write_steps(
    rng: random.Random,
    value: int,
    instructions: Sequence[Instruction],
    style: CorpusStyle,
    width: int,
    languages: tuple[str, ...],
    first_label: int = 1,
) -> tuple[str, int]:
    """Write steps such as ` b7+8=15 then c15-9=6`; return them and their final value.

    A step combines `width` instructions. An incorrect value, unless it is corrected, is the input of the next step.
    """
    steps = []
    for first in range(0, len(instructions), width):
        taken = instructions[first : first + width]
        left = f" {LABELS[first_label + first + len(taken) - 1]}{value}" + "".join(f"{s}{n}" for s, n in taken)
        for instruction in taken:
            value = apply(value, instruction)
        value = max(value, 0)
        step = f"{left}={value}"
        if rng.random() < style.wrong_step:
            wrong = wrong_value(rng, value)
            if rng.random() < style.noticed:
                step = f"{left}={wrong}{WORDS[rng.choice(languages)][1]}{step}"
            else:
                value, step = wrong, f"{left}={wrong}"
        steps.append(step)
    connected = [steps[0], *(WORDS[rng.choice(languages)][0] + step for step in steps[1:])]
    return "".join(connected), value


def wrong_value(rng: random.Random, value: int) -> int:
    """Draw an incorrect value near `value`."""
    wrong = value + rng.choice((-10, 10, -1, 1, -2, 2))
    return wrong if 0 <= wrong <= LARGEST + 9 else value + 1
