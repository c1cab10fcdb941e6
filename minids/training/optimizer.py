"""Optimizers: AdamW, with moments in FP32 or BF16, and Muon for the matrices of the layers."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from minids.model.transformer import MiniDS
from minids.training.muon import Muon
from minids.training.per_parameter import PerParameter

ENGRAM_TABLE = ".table.weight"


class AdamWWithBF16Moments(PerParameter):
    """AdamW with both moments stored in BF16: 4 bytes per parameter instead of 8 (V3 section 3.3.3).

    The update is computed in FP32. With beta2 = 0.95 a step changes the second moment by up to 1/20, far above
    BF16's relative spacing of 1/256; with the usual 0.999 rounding would undo small increases, and the moment would
    stall.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    def update(self, p: nn.Parameter, grad: Tensor, state: dict, group: dict) -> None:
        """Loshchilov and Hutter, algorithm 2."""
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].float().lerp_(grad.square(), 1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        corrected = (second / (1 - beta2 ** state["step"].item())).sqrt_().add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(first, corrected, value=-group["lr"] / (1 - beta1 ** state["step"].item()))


def make_optimizers(
    model: MiniDS, kind: str, learning_rate: float, weight_decay: float, moments: str = "fp32"
) -> list[torch.optim.Optimizer]:
    """Create AdamW for all parameters, or with kind "muon" Muon for the layers' matrices and AdamW for the others.

    `moments` is the dtype of AdamW's first and second moments, "fp32" or "bf16". Norm weights have no weight decay.
    `torch.optim.Muon` supports two-dimensional parameters only, so AdamW updates the stacked experts, and as usual
    embedding and head. With kind "muon_v4" the experts too are Muon's, in the form that V4 has (`training.muon`).
    The tables of an Engram have no weight decay and learn 5 times as fast, because a row has a gradient only when its
    n-gram occurs (V4.1). Betas are 0.9 and 0.95 as in V3 (FACTS.md section 7.1).
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    dimensions = {"adamw": (), "muon": (2,), "muon_v4": (2, 3)}[kind]
    matrices = [p for name, p in trained if p.ndim in dimensions and _is_layer_matrix(name)]
    tables = [p for name, p in trained if name.endswith(ENGRAM_TABLE)]
    rest = [p for p in model.parameters() if p.requires_grad and p not in {*matrices, *tables}]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    if tables:
        groups.append({"params": tables, "weight_decay": 0.0, "lr": 5 * learning_rate, "lr_factor": 5.0})
    adamw = AdamWWithBF16Moments if moments == "bf16" else functools.partial(torch.optim.AdamW, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)]
    if kind == "muon_v4":
        optimizers.append(Muon(matrices, lr=learning_rate, weight_decay=weight_decay))
    elif matrices:
        # Updates are scaled to the RMS of AdamW's, so that both use the same learning rate.
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def _is_layer_matrix(name: str) -> bool:
    return not name.startswith(("embedding", "head")) and not name.endswith(ENGRAM_TABLE)
