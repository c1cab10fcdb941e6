"""Steps of MLA, correct and changed, and the known mistakes of chapter 2's exercises, which are made of them.

A dictionary maps the description of a mistake to the keywords with which the reference makes it.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from minids.course.exercises.mistakes import Changes
from minids.model.mla import LATENT_NORM_EPS
from minids.model.rope import rotate

# The cache entry ----------------------------------------------------------------------------------------------------


def rotations(tokens: int, rope: int, start: int = 0) -> Complex[Tensor, "tokens pairs"]:
    """Of `tokens` positions from `start` on, fast enough that few tokens show the difference."""
    angle = torch.arange(start, start + tokens)[:, None] * 10.0 ** -(2 * torch.arange(rope // 2) / rope)
    return torch.polar(torch.ones_like(angle), angle)


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


# 2.1 A cut that follows the data ------------------------------------------------------------------------------------

COMPRESS_MISTAKES: Changes = {
    "the matrix itself is cut, whatever the data": {"spread": lambda h, w: w.T},
    "the directions are those of the inputs, not of the outputs": {"spread": lambda h, w: h, "before": True},
    "the outputs are centred first": {"centred": True},
    "the weakest directions are kept": {"kept": lambda directions, rank: directions[-rank:]},
    "one direction too many is kept": {"kept": lambda directions, rank: directions[: rank + 1]},
}


# 2.3 A decoding step, split over GPUs -------------------------------------------------------------------------------

SECONDS_MISTAKES: Changes = {
    "the cache is split over the GPUs too": {"slots": lambda tokens, gpus: tokens / gpus},
    "the heads are not split over the GPUs": {"heads_of": 1},
    "the two times are added": {"together": lambda read, compute: read + compute},
    "the shorter time counts": {"together": min},
    "the queries of one step are not counted": {"counted": False, "heads_of": None, "widths": 576 + 512},
    "the widths are those of the expanded form": {"widths": 192 + 128},
    "keys and values are read separately": {"entry": 576 + 512},
    "the rotary key is not cached": {"entry": 512},
    "one layer is counted": {"layers": 1},
}


# 2.4 Another base instead of a ramp ---------------------------------------------------------------------------------

BASE_MISTAKES: Changes = {
    "the base is multiplied by the factor": {"base": lambda dim, theta, factor: theta * factor},
    "the exponent is inverted": {"base": lambda dim, theta, factor: theta * factor ** ((dim - 2) / dim)},
    "the turns are counted in radians": {"turn": 1.0},
    "the fast pairs are chosen by their new frequencies": {"old": False},
    "the slow-down is that of the fastest pair": {"slowed": torch.min, "turn": 2 * math.pi, "old": True},
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
