"""The parts that every layer shares: RMSNorm, the SwiGLU feed-forward, and the rotary embedding with YaRN.

Notable choices: no biases anywhere; positions enter only by rotating neighbouring pairs (2i, 2i+1) of queries and keys;
the rotation is computed once per forward pass and shared by all layers, so no module holds a table of angles.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig, YaRN


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`x` in float32, or as it is where it is float64: what losses, affinities and log-probabilities are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale each channel: x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        if x.requires_grad and x.device.type == "cpu" and x.dtype == self.weight.dtype != torch.bfloat16:
            return _RMSNormWithGradient.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class _RMSNormWithGradient(torch.autograd.Function):
    """The same with its gradient written out: on a CPU torch has no fused one, and this takes a third of its passes.

    With y = x / rms, an incoming gradient g becomes (g * w - y * mean(g * w * y)) / rms.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1]
        inverse_rms = mean_square.add_(eps).rsqrt_()
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


class SwiGLU(nn.Module):
    """The gated feed-forward down(silu(gate(x)) * up(x)), used dense and as the shared expert."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner_dim, bias=False)
        self.up_proj = nn.Linear(dim, inner_dim, bias=False)
        self.down_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def yarn_ramp_bounds(dim: int, theta: float, yarn: YaRN) -> tuple[int, int]:
    """The pairs between which YaRN goes from keeping a frequency to interpolating it (FACTS.md section 2.2).

    A pair that turns `n` times over the original context is number dim * ln(context / (2 pi n)) / (2 ln theta).
    """

    def pair_turning(n: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * n)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    return low, high


@lru_cache(maxsize=32)
def rotary_frequencies(dim: int, theta: float, yarn: YaRN | None, device: torch.device) -> Float[Tensor, "pairs"]:
    """Radians per position of each of the dim / 2 pairs, in float64: theta^(-2i/dim), stretched by YaRN if asked.

    Fast pairs keep their frequency, slow pairs are divided by `factor`, those between are mixed linearly.
    """
    with torch.inference_mode(False):  # cached: must stay usable for training even if first asked for in generation
        pair = torch.arange(dim // 2, dtype=torch.float64, device=device)
        frequency = theta ** (-2 * pair / dim)
        if yarn is None:
            return frequency
        low, high = yarn_ramp_bounds(dim, theta, yarn)
        interpolated = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
        return frequency * (1 - interpolated) + frequency / yarn.factor * interpolated


def rotations(
    config: ModelConfig, positions: Int[Tensor, "batch seq"], dim: int, dtype: torch.dtype
) -> Complex[Tensor, "batch seq 1 pairs"]:
    """The unit complex number by which each pair of a query or key at each position is multiplied.

    Half precision is lifted to float32. With YaRN the released models keep the amplitude 1 on the rotation, because
    `mscale` equals `mscale_all_dim`, and put the temperature into the softmax scale (`softmax_scale`).
    """
    frequency = rotary_frequencies(dim, config.rope_theta, config.rope_scaling, positions.device)
    angle = (positions[..., None, None] * frequency).remainder(2 * math.pi)  # while it is still float64
    angle = angle.to(torch.promote_types(dtype, torch.float32))
    return torch.polar(torch.full_like(angle, _amplitude(config.rope_scaling)), angle)


def rotate(
    x: Float[Tensor, "batch seq heads dim"], rotation: Complex[Tensor, "batch seq 1 pairs"]
) -> Float[Tensor, "batch seq heads dim"]:
    """Turn each neighbouring pair (2i, 2i+1) of `x`, read as a complex number, by its position's angle."""
    pairs = torch.view_as_complex(x.to(rotation.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def softmax_scale(query_dim: int, yarn: YaRN | None) -> float:
    """What scores are multiplied by before the softmax: 1 / sqrt(query_dim), times the squared YaRN temperature.

    One scale for the rotated and the unrotated part together. The temperature 0.1 * mscale_all_dim * ln(factor) + 1
    belongs to queries and keys alike, hence the square (FACTS.md section 2.2; 0.1352338 for V3 at long context).
    """
    return query_dim**-0.5 * (1.0 if yarn is None else _temperature(yarn.factor, yarn.mscale_all_dim) ** 2)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _amplitude(yarn: YaRN | None) -> float:
    if yarn is None:
        return 1.0
    return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)
