"""Which optimizer moves which parameter, and the schedule of V3 in fractions of a run."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from minids.model.transformer import MiniDS


@dataclass(frozen=True)
class Schedule:
    """V3's course of training, with its token counts as fractions of the run (FACTS.md section 7.1).

    Warm up linearly; hold the peak for 10 of 14.8 parts; fall along a cosine to `final_fraction` until part 14.3; hold.
    The MTP weight drops where the fall begins, and the balancing speed goes to 0 where it ends.
    """

    steps: int
    warmup_steps: int
    final_fraction: float = 0.1
    fall_begins: float = 10 / 14.8
    fall_ends: float = 14.3 / 14.8

    def learning_rate_factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by in step 0, 1, ..., steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        fallen = (self._part(step) - self.fall_begins) / (self.fall_ends - self.fall_begins)
        cosine = 0.5 * (1 + math.cos(math.pi * min(max(fallen, 0.0), 1.0)))
        return self.final_fraction + (1 - self.final_fraction) * cosine

    def is_falling(self, step: int) -> bool:
        """Whether the learning rate has begun to fall."""
        return self._part(step) >= self.fall_begins

    def has_fallen(self, step: int) -> bool:
        """Whether the learning rate has reached its end."""
        return self._part(step) >= self.fall_ends

    def _part(self, step: int) -> float:
        return step / self.steps


def make_optimizers(
    model: MiniDS, kind: str, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or with kind "muon" Muon for the plain matrices of the layers and AdamW for the rest.

    Norm weights are not decayed. `torch.optim.Muon` takes two-dimensional parameters only, so the stacked experts stay
    with AdamW; so do embedding and head, as is usual. Beta 0.9 and 0.95 as in V3 (FACTS.md section 7.1).
    """
    if kind not in ("adamw", "muon"):
        raise ValueError(f"optimizer={kind!r}: must be adamw or muon")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if _is_layer_matrix(name, p)] if kind == "muon" else []
    rest = [p for name, p in trained if not (kind == "muon" and _is_layer_matrix(name, p))]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    ]
    if matrices:
        # Scaled so that an update has the size of AdamW's, and one learning rate serves both.
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def _is_layer_matrix(name: str, p: nn.Parameter) -> bool:
    return p.ndim == 2 and not name.startswith(("embedding", "head"))
