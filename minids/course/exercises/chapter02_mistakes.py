"""Steps of MLA, correct and changed, and the known mistakes of chapter 2's exercises, which are made of them.

A dictionary maps the description of a mistake to the keywords with which the reference makes it.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from minids.course.exercises.mistakes import Changes
from minids.model.mla import LATENT_NORM_EPS
from minids.model.rope import rotate

# 2.1 The cache entry ------------------------------------------------------------------------------------------------


def turn(x: Float[Tensor, "tokens rope"], rotation: Complex[Tensor, "tokens pairs"]) -> Float[Tensor, "tokens rope"]:
    """Rotate each token's neighbouring pairs (2i, 2i+1)."""
    return rotate(x[None, :, None], rotation[None, :, None])[0, :, 0]


def turn_halves(x, rotation):
    """Rotate pair i with i + rope/2."""
    pairs = torch.complex(*x.chunk(2, -1)) * rotation
    return torch.cat((pairs.real, pairs.imag), -1)


def no_turn(x, rotation):
    return x


def turn_back(x, rotation):
    return turn(x, rotation.conj())


def norm(x: Float[Tensor, "tokens dim"], weight: Float[Tensor, "dim"] | None = None) -> Float[Tensor, "tokens dim"]:
    return F.rms_norm(x, x.shape[-1:], weight, LATENT_NORM_EPS)


def from_latent(key, latent):
    return latent[:, : key.shape[1]]


def normalised(key, latent):
    return norm(key)


def for_each_head(key, rotation):
    return turn(key, rotation).repeat(1, 4)


ENTRY_MISTAKES: Changes = {
    "the latent is stored before its norm": {"normalise": lambda latent, weight: latent},
    "the norm of the latent is not scaled by `norm_weight`": {"normalise": lambda latent, weight: norm(latent)},
    "the norm of the latent has no eps=1e-6": {"normalise": lambda c, w: F.rms_norm(c, w.shape, w)},
    "the key is stored before its rotation": {"rotated": no_turn},
    "the key is rotated backwards": {"rotated": turn_back},
    "the rotation pairs the first half with the second, not neighbours": {"rotated": turn_halves},
    "the key is normalised too": {"key_of": normalised},
    "the key is taken from the latent instead of from h": {"key_of": from_latent},
    "the key comes before the latent": {"key_first": True},
}


# 2.2 Absorbed attention of one query --------------------------------------------------------------------------------


def split_up(up: Float[Tensor, "out rank"], heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """W^UK and W^UV of each head."""
    return up.unflatten(0, (heads, -1)).tensor_split((nope,), 1)


def values_first(up, heads, nope):
    value, key = up.unflatten(0, (heads, -1)).tensor_split((-nope,), 1)
    return key, value


def across_heads(up, heads, nope):
    """All heads' keys first, as if the matrix were [W^UK; W^UV]."""
    key, value = up.tensor_split((heads * nope,))
    return key.unflatten(0, (heads, -1)), value.unflatten(0, (heads, -1))


ATTEND_MISTAKES: Changes = {
    "the rotary part is left out of the score": {"position": 0},
    "content and position have a scale each": {"apart": True, "position": 1, "width": None},
    "the scale is that of the absorbed query's width, rank + rope": {"width": lambda nope, rope, rank: rank + rope},
    "the scale is the root of nope only": {"width": lambda nope, rope, rank: nope},
    "there is no scale": {"width": lambda nope, rope, rank: 1},
    "the values' rows of each head are taken for the keys'": {"split": values_first},
    "the rows are split into keys and values before they are split into heads": {"split": across_heads},
    "the softmax runs over the heads": {"over": 0},
    "the temperature is not squared": {"power": (1, 1)},
    "the temperature is not used": {"power": (0, 0)},
    "the temperature multiplies the content part only": {"power": (2, 0), "position": 1},
}


# 2.4 YaRN -----------------------------------------------------------------------------------------------------------


def wrong_yarn(
    dim: int, theta: float, factor: float, original: int, *,
    rounded: tuple[Callable, Callable] = (math.floor, math.ceil), turns: tuple[float, float] = (32, 1),
    shape: Callable[[Tensor], Tensor] = lambda ramp: ramp.clamp(0, 1), power: int = 2,
    log: Callable[[float], float] = math.log,
) -> tuple[Tensor, float]:  # fmt: skip
    """YaRN as written in the exercise; the keywords change one step of it."""
    pair = torch.arange(dim // 2, dtype=torch.float64)
    low, high = (
        at(dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(theta)))
        for at, n in zip(rounded, turns, strict=True)
    )
    stretched = shape((pair - low) / (high - low))
    frequency = theta ** (-2 * pair / dim)
    return frequency * (1 - stretched + stretched / factor), (0.1 * log(factor) + 1) ** power


YARN_MISTAKES: Changes = {
    "the bounds are rounded inwards": {"rounded": (math.ceil, math.floor)},
    "the bounds are rounded to the nearest whole number": {"rounded": (round, round)},
    "the bounds are not rounded": {"rounded": (float, float)},
    "the fast pairs are stretched and the slow ones kept": {"shape": lambda ramp: 1 - ramp.clamp(0, 1)},
    "all pairs are stretched alike": {"shape": torch.ones_like, "rounded": (math.floor, math.ceil)},
    "the share is not kept between 0 and 1": {"shape": lambda ramp: ramp},
    "the temperature is not squared": {"power": 1},
    "the temperature is left out": {"power": 0, "log": math.log},
    "the temperature takes the logarithm to base 10": {"log": math.log10},
}


# 2.5 A decoding step ------------------------------------------------------------------------------------------------

STEP_MISTAKES: Changes = {
    "the new token does not attend to itself": {"sees_itself": False},
    "the query is not rotated": {"turn_query": no_turn},
    "the query is rotated backwards": {"turn_query": turn_back},
    "the latent is stored before its norm": {"normalise": lambda latent, weight: latent},
    "the key is stored before its rotation": {"rotated": no_turn},
    "content and position have a scale each": {"apart": True},
}
