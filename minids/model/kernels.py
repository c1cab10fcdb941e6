"""Operations with a hand-written backward, where PyTorch has no fused CPU kernel, or none that compiles."""

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm with a hand-written backward: PyTorch has no fused CPU kernel; this needs a third of the memory passes.

    With y = x / rms and the output gradient g, the input gradient is (g * w - y * mean(g * w * y)) / rms.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1]
        inverse_rms = mean_square.add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        y = x * inverse_rms
        grad_y = grad * y
        mean = (grad_y @ weight)[..., None] / x.shape[-1]
        grad_x = (grad * weight).addcmul_(y, mean, value=-1).mul_(inverse_rms)
        return grad_x, grad_y.reshape(-1, x.shape[-1]).sum(0), None


@torch.library.custom_op("minids::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`F.grouped_mm(x, weight, offs=ends)` for `torch.compile`, which takes that of bfloat16 only (PyTorch 2.13)."""
    return F.grouped_mm(x, weight, offs=ends)


@torch.library.custom_op("minids::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return F.grouped_mm(grad, weight.mT, offs=ends), F.grouped_mm(x.mT, grad, offs=ends)


@grouped_mm.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[2])


@_grouped_mm_backward.register_fake
def _(grad, x, weight, ends):
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return *_grouped_mm_backward(grad.contiguous(), *ctx.saved_tensors), None


grouped_mm.register_autograd(_backward, setup_context=_keep)
