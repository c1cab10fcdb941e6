"""Which optimizer moves which parameter, in what its memory is kept, and V3's schedule in fractions of a run."""

import functools
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


class AdamWWithBF16Moments(torch.optim.Optimizer):
    """AdamW whose two moments rest in bfloat16: 4 bytes per parameter instead of 8 (V3 section 3.3.3).

    They are computed in float32. With beta2 = 0.95 a step changes the second moment by up to a twentieth, far above
    bfloat16's step of 1/256; with the usual 0.999 a growing moment would round back to where it was, and stall.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient (Loshchilov and Hutter, algorithm 2)."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, self.state[p], group)

    def _move(self, p: nn.Parameter, state: dict, group: dict) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].float().lerp_(p.grad, 1 - beta1)
        second = state["exp_avg_sq"].float().lerp_(p.grad.square(), 1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        corrected = (second / (1 - beta2 ** state["step"].item())).sqrt_().add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(first, corrected, value=-group["lr"] / (1 - beta1 ** state["step"].item()))


def make_optimizers(
    model: MiniDS, kind: str, learning_rate: float, weight_decay: float, moments: str = "fp32"
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or with kind "muon" Muon for the plain matrices of the layers and AdamW for the rest.

    `moments` says whether AdamW's rest in "fp32" or "bf16".

    Norm weights are not decayed. `torch.optim.Muon` takes two-dimensional parameters only, so the stacked experts stay
    with AdamW; so do embedding and head, as is usual. Beta 0.9 and 0.95 as in V3 (FACTS.md section 7.1).
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if _is_layer_matrix(name, p)] if kind == "muon" else []
    rest = [p for name, p in trained if not (kind == "muon" and _is_layer_matrix(name, p))]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = AdamWWithBF16Moments if moments == "bf16" else functools.partial(torch.optim.AdamW, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)]
    if matrices:
        # Scaled so that an update has the size of AdamW's, and one learning rate serves both.
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def _is_layer_matrix(name: str, p: nn.Parameter) -> bool:
    return p.ndim == 2 and not name.startswith(("embedding", "head"))
