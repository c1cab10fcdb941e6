"""RMSNorm, the SwiGLU feed-forward (no layer has a bias), and two kinds of modules without arithmetic of their own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minids.model.kernels import RMSNormOnCPU

M = TypeVar("M", bound=nn.Module)


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cast to float32, but keep float64: the dtype of losses, affinities and log-probabilities."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Root mean square normalisation with a weight per channel: x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        by_hand = x.requires_grad and x.device.type == "cpu" and x.dtype == self.weight.dtype != torch.bfloat16
        if by_hand and not torch.compiler.is_compiling():  # the compiler fuses the operations itself
            return RMSNormOnCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """Gated feed-forward, down(silu(gate(x)) * up(x)): the dense layers' and the shared experts'."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner_dim, bias=False)
        self.up_proj = nn.Linear(dim, inner_dim, bias=False)
        self.down_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class KeptInFloat32(nn.Module):
    """A module whose own parameters and buffers stay in float32 when the model is cast to a type of 16 bits."""

    def _apply(self, fn, recurse=True):
        own = {name: tensor.data for name, tensor in (*self._parameters.items(), *self._buffers.items())}
        super()._apply(fn, recurse)
        for name, before in own.items():
            tensor = getattr(self, name)
            if torch.finfo(tensor.dtype).bits < 32:
                tensor.data = before.to(tensor.device, torch.float32)
        return self


class ModuleList(nn.ModuleList, Generic[M]):
    """`nn.ModuleList` of modules of one type, which type checkers then know: `ModuleList[Block]`."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...

        def __getitem__(self, index): ...
