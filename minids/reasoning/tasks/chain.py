"""Chains of instructions on small numbers: one step is easy, a whole chain without written steps is hard."""

import functools
import random
from dataclasses import dataclass

Instruction = tuple[str, int]  # "+", "-" or "*", and a digit


LARGEST = 20  # all intermediate values are in 0..20


def apply(value: int, instruction: Instruction) -> int:
    """Apply one instruction to a value."""
    sign, operand = instruction
    return value + operand if sign == "+" else value - operand if sign == "-" else value * operand


@dataclass(frozen=True)
class Chain:
    """A start value and instructions, from which both families of problems are built."""

    start: int
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def values(self) -> list[int]:
        """The start value and the value after each instruction."""
        values = [self.start]
        for instruction in self.instructions:
            values.append(apply(values[-1], instruction))
        return values

    @classmethod
    def draw(cls, rng: random.Random, length: int) -> "Chain":
        """Draw a random chain with all values in 0..`LARGEST`."""
        start = value = rng.randint(0, LARGEST)
        instructions: list[Instruction] = []
        while len(instructions) < length:
            sign = rng.choice("++--*")
            instruction = sign, rng.randint(2, 4) if sign == "*" else rng.randint(1, 9)
            if 0 <= apply(value, instruction) <= LARGEST:
                instructions.append(instruction)
                value = apply(value, instruction)
        return cls(start, tuple(instructions))
