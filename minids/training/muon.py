"""Muon as V4 has it, also for stacks of matrices.

Muon (FACTS.md section 10) replaces the momentum of a matrix by the nearest matrix whose singular values are all 1, so
that an update moves all directions equally: M = 0.95 M + G; O = orthogonalize(0.95 M + G); W -= lr * 0.18 sqrt(max) O.
It keeps one moment instead of AdamW's two.

Notable choices:
- the last two dimensions are the matrix and all others are batch, so the experts of a layer, a stack of matrices, take
  one batched iteration (`torch.optim.Muon` refuses them);
- V4's ten Newton-Schulz steps: eight that raise small singular values fast, then two that converge, to within 5e-4 of
  1 from 1e-3 on. The usual five steps stop between 0.47 and 1.20.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minids.model.layers import at_least_float32
from minids.training.per_parameter import PerParameter

Quintic = tuple[float, float, float]
FAST: Quintic = (3.4445, -4.7750, 2.0315)
CONVERGING: Quintic = (2.0, -1.5, 0.5)
V4_STEPS: tuple[Quintic, ...] = (FAST,) * 8 + (CONVERGING,) * 2
UPDATE_RMS = 0.18  # of a square matrix's update at learning rate 1, as AdamW's: one learning rate serves both


def orthogonalize(
    matrices: Float[Tensor, "*stack rows columns"], steps: Sequence[Quintic] = V4_STEPS, eps: float = 1e-7
) -> Float[Tensor, "*stack rows columns"]:
    """Bring all singular values of each matrix close to 1, by Newton-Schulz iterations; in at least float32.

    A step X -> a X + b (X X^T) X + c (X X^T)^2 X maps each singular value s to a s + b s^3 + c s^5 and leaves the
    singular vectors. It starts from X / ||X||_F, whose singular values are at most 1.
    """
    x = at_least_float32(matrices)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(PerParameter):
    """Muon for matrices and stacks of matrices, with decoupled weight decay (V4, Algorithm 1)."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        steps: Sequence[Quintic] = V4_STEPS,
        update_rms: float = UPDATE_RMS,
    ):
        params = list(params)
        for p in params:
            if p.ndim < 2:
                raise ValueError(f"parameter of shape {tuple(p.shape)}: Muon needs matrices, or stacks of them")
        self.steps = tuple(steps)
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, update_rms=update_rms))

    def update(self, p: nn.Parameter, grad: Tensor, state: dict, group: dict) -> None:
        """V4's algorithm 1."""
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        ahead = grad.add(momentum, alpha=group["momentum"])  # Nesterov's
        scale = group["update_rms"] * math.sqrt(max(p.shape[-2:]))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(orthogonalize(ahead, self.steps).to(p.dtype), alpha=-group["lr"] * scale)
