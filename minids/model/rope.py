"""Rotary position embedding (RoPE), with YaRN for long contexts.

Notable choices: RoPE rotates adjacent pairs (2i, 2i+1) of channels, as DeepSeek does, not halves (i, i + dim/2); the
rotations are computed once per forward pass and shared by all layers, so no module holds a table of angles.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from minids.config import ModelConfig, YaRN


def yarn_ramp_bounds(dim: int, theta: float, yarn: YaRN) -> tuple[int, int]:
    """Indices of the pairs between which YaRN changes from keeping to interpolating frequencies (FACTS.md section 2.2).

    The pair that turns `n` times over the original context has index dim * ln(context / (2 pi n)) / (2 ln theta).
    """

    def pair_turning(n: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (n * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    return low, high


@lru_cache(maxsize=32)
def rotary_frequencies(dim: int, theta: float, yarn: YaRN | None, device: torch.device) -> Float[Tensor, "pairs"]:
    """Rotary frequencies of the dim / 2 pairs in radians per position, in float64: theta^(-2i/dim).

    With YaRN, high frequencies are kept, low ones are divided by `factor`, those between are interpolated linearly.
    """
    with torch.inference_mode(False):  # the cached tensor must be usable in training after a first call in generation
        pair = torch.arange(dim // 2, dtype=torch.float64, device=device)
        frequency = theta ** (-2 * pair / dim)
        if yarn is None:
            return frequency
        low, high = yarn_ramp_bounds(dim, theta, yarn)
        # The released code divides by high - low also where it is negative (no pair turns that slowly or that fast).
        interpolated = ((pair - low) / (high - low or 0.001)).clamp(0, 1)
        return frequency * (1 - interpolated) + frequency / yarn.factor * interpolated


def rotations(
    config: ModelConfig, positions: Int[Tensor, "batch seq"], dim: int, dtype: torch.dtype
) -> Complex[Tensor, "batch seq 1 pairs"]:
    """Compute the complex factor of each position and pair of channels of queries and keys.

    Angles are in float32 if `dtype` is a 16-bit type. With YaRN the factor has amplitude 1 in the released models,
    because `mscale` equals `mscale_all_dim`; the temperature is part of the softmax scale (`softmax_scale`).
    """
    frequency = rotary_frequencies(dim, config.rope_theta, config.rope_scaling, positions.device)
    angle = (positions[..., None, None] * frequency).remainder(2 * math.pi)  # reduced in float64
    angle = angle.to(torch.promote_types(dtype, torch.float32))
    return torch.polar(torch.full_like(angle, _amplitude(config.rope_scaling)), angle)


def rotate(
    x: Float[Tensor, "batch seq heads dim"], rotation: Complex[Tensor, "batch seq 1 pairs"]
) -> Float[Tensor, "batch seq heads dim"]:
    """Rotate each adjacent pair (2i, 2i+1) of `x`, as a complex number, by the angle of its position."""
    pairs = torch.view_as_complex(x.to(rotation.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def softmax_scale(query_dim: int, yarn: YaRN | None) -> float:
    """Factor of the attention scores before the softmax: 1 / sqrt(query_dim), times the squared YaRN temperature.

    The scale is the same for the rotated and the unrotated part. The temperature 0.1 * mscale_all_dim * ln(factor) + 1
    applies to both queries and keys, hence the square (FACTS.md section 2.2; 0.1352338 for V3 at long context).
    """
    return query_dim**-0.5 * (1.0 if yarn is None else _temperature(yarn.factor, yarn.mscale_all_dim) ** 2)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _amplitude(yarn: YaRN | None) -> float:
    if yarn is None:
        return 1.0
    return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)
