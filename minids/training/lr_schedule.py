"""V3's learning-rate schedule in fractions of a run: linear warm-up, constant phase, cosine decay, constant end."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LRSchedule:
    """V3's learning-rate schedule, with its token counts as fractions of the run (FACTS.md section 7.1).

    Linear warm-up; constant until 10 of 14.8 parts; cosine decay to `final_fraction` until part 14.3; constant.
    The MTP weight decreases where the decay begins, and the balancing speed becomes 0 where it ends.
    """

    steps: int
    warmup_steps: int
    final_fraction: float = 0.1
    fall_begins: float = 10 / 14.8
    fall_ends: float = 14.3 / 14.8

    def learning_rate_factor(self, step: int) -> float:
        """Factor of the peak learning rate in step 0, 1, ..., steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        fallen = (self._part(step) - self.fall_begins) / (self.fall_ends - self.fall_begins)
        cosine = 0.5 * (1 + math.cos(math.pi * min(max(fallen, 0.0), 1.0)))
        return self.final_fraction + (1 - self.final_fraction) * cosine

    def is_falling(self, step: int) -> bool:
        """Whether the decay of the learning rate has begun."""
        return self._part(step) >= self.fall_begins

    def has_fallen(self, step: int) -> bool:
        """Whether the learning rate has reached its final value."""
        return self._part(step) >= self.fall_ends

    def _part(self, step: int) -> float:
        return step / self.steps
