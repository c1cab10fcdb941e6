"""Steps of FP8 quantisation, correct and changed, and the known mistakes of chapter 6's exercises.

A dictionary maps the description of a mistake to the keywords with which the reference makes it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from minids.course.exercises.mistakes import Changes
from minids.fp8.formats import dequantize, quantize

# 6.1 Encoding ---------------------------------------------------------------------------------------------------------

MAGNITUDES = [2.0 ** max((code >> 3) - 7, -6) * ((code & 7) / 8 + (code >= 8)) for code in range(127)]


def ties_to_even(code: int, above: float) -> int:
    """Move up from `code` if the value is `above` (a fraction) of the way to the next, 1/2 included for odd codes."""
    return code + (above > 0.5 or above == 0.5 and code % 2 == 1)


def ties_away(code: int, above: float) -> int:
    return code + (above >= 0.5)


def ties_towards_zero(code: int, above: float) -> int:
    return code + (above > 0.5)


def truncated(code: int, above: float) -> int:
    return code


def with_sign(magnitude: int, negative: bool) -> int:
    return magnitude + 128 * negative


def without_sign(magnitude: int, negative: bool) -> int:
    return magnitude


def zero_without_sign(magnitude: int, negative: bool) -> int:
    return magnitude + 128 * (negative and magnitude > 0)


def encode(values, *, round_up=ties_to_even, sign=with_sign, overflow=126, subnormals=True) -> list[int]:
    """Encode finite values as E4M3 codes by arithmetic."""
    codes = []
    for value in values:
        size = abs(value)
        code = max(code for code in range(127) if MAGNITUDES[code] <= size)
        if code < 126:
            code = round_up(code, (size - MAGNITUDES[code]) / (MAGNITUDES[code + 1] - MAGNITUDES[code]))
        elif size > 448:
            code = overflow
        if not subnormals and size < 2.0**-6:
            code = 0
        codes.append(sign(code, value < 0))
    return codes


ENCODE_MISTAKES: Changes = {
    "a tie goes to the larger magnitude": {"round_up": ties_away},
    "a tie goes to the smaller magnitude": {"round_up": ties_towards_zero},
    "values are truncated instead of rounded to the nearest": {"round_up": truncated},
    "the sign bit is missing": {"sign": without_sign},
    "a negative value that rounds to zero loses its sign": {"sign": zero_without_sign},
    "values above 448 become NaN": {"overflow": 127},
    "values below 2^-6 become zero": {"subnormals": False},
}


# 6.2 New tiles --------------------------------------------------------------------------------------------------------


def to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def to_integers(x: Tensor) -> Tensor:
    return x.round().clamp(-448, 448)


def power_above(amax: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(amax.clamp_min(1e-4) / 448)))


def along_tokens(x: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each tile of `height` tokens by one channel, and the place of each token's tile."""
    amax = torch.stack([part.abs().amax(0) for part in x.split(height)])
    return amax, torch.arange(len(x)) // height


def retile(
    q, scale, width, height, *, values=torch.mul, scale_of=power_above, cast=to_e4m3, inverse=False, channels=False
) -> tuple[Tensor, Tensor]:
    """Dequantise tiles of one token by `width` channels, and quantise in tiles of `height` tokens by one channel."""
    x = values(q, spread(scale, q, width))
    x = x.mT if channels else x
    amax, place = along_tokens(x, height)
    new = scale_of(amax)
    made = cast(x / new[place])
    new = 1 / new if inverse else new
    return (made.mT, new.mT) if channels else (made, new)


def spread(scale: Tensor, x: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(width, 1)[:, : x.shape[1]]


RETILE_MISTAKES: Changes = {
    "the old scales are left out": {"values": lambda q, scale: q},
    "q is divided by the old scales": {"values": torch.div},
    "the new scales are not powers of two": {"scale_of": lambda amax: amax.clamp_min(1e-4) / 448},
    "the new scales are rounded down to a power of two": {
        "scale_of": lambda amax: torch.exp2(torch.floor(torch.log2(amax.clamp_min(1e-4) / 448)))
    },
    "the new scales are rounded to the nearest exponent": {
        "scale_of": lambda amax: torch.exp2(torch.round(torch.log2(amax.clamp_min(1e-4) / 448)))
    },
    "the floor of 1e-4 is missing": {"scale_of": lambda amax: torch.exp2(torch.ceil(torch.log2(amax / 448)))},
    "x / scale is rounded to integers": {"cast": to_integers},
    "the new scale is what x is multiplied by, instead of what q is": {"inverse": True},
    "the new tiles run along channels": {"channels": True},
}


# 6.3 Promotion --------------------------------------------------------------------------------------------------------


def truncate(x: float, bits: int) -> float:
    """The `bits` leading significant bits of a value."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(math.trunc(math.ldexp(fraction, bits)), exponent - bits)


def round_to(x: float, bits: int) -> float:
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)


def keep_all_bits(x: float, bits: int) -> float:
    return x


def promoted(products, scales, bits, *, cut=truncate, cut_product=False, clear=True) -> float:
    """Promote an accumulator of `bits` bits once per tile of equal length."""
    size, total, accumulator = len(products) // len(scales), 0.0, 0.0
    for i, scale in enumerate(scales):
        accumulator = 0.0 if clear else accumulator
        for product in products[i * size : (i + 1) * size]:
            accumulator = accumulator + cut(product, bits) if cut_product else cut(accumulator + product, bits)
        total += accumulator * scale
    return total


def promoted_never(products, scales, bits):
    size = len(products) // len(scales)
    accumulator = 0.0
    for k, product in enumerate(products):
        accumulator = truncate(accumulator + product * scales[k // size], bits)
    return accumulator


def promoted_cut_once_per_tile(products, scales, bits):
    size = len(products) // len(scales)
    sums = [sum(products[i * size : (i + 1) * size]) for i in range(len(scales))]
    return sum(truncate(one, bits) * scale for one, scale in zip(sums, scales, strict=True))


# 6.4 The weight gradients of experts ----------------------------------------------------------------------------------


def rounded(x, tile):
    return dequantize(*quantize(x, tile), tile)


def along_tokens_tile(height: int) -> tuple[int, int]:
    return height, 1


def expert_gradients(
    x, grad, tokens_per_expert, height, *, tile=along_tokens_tile, which=("x", "grad"), across=False, transpose=False
) -> Float[Tensor, "experts out in"]:
    """grad^T x of each expert's tokens, both rounded to E4M3 in tiles that hold tokens of one expert only."""
    parts = []
    for name, t in (("x", x), ("grad", grad)):
        t = rounded(t, tile(height)) if across and name in which else t
        split = t.split(tokens_per_expert)
        parts.append([rounded(one, tile(height)) if not across and name in which else one for one in split])
    products = [g.T @ one for one, g in zip(*parts, strict=True)]
    return torch.stack([product.T if transpose else product for product in products])


GRADIENT_MISTAKES: Changes = {
    "a tile holds tokens of two experts": {"across": True},
    "the tiles run along channels, as in the forward pass": {
        "tile": lambda height: (1, height), "across": False,  # one token each: never of two experts
    },
    "square blocks share a scale": {"tile": lambda height: (height, height)},
    "only the input is rounded": {"which": ("x",)},
    "only the gradient is rounded": {"which": ("grad",)},
    "nothing is rounded": {"which": (), "tile": along_tokens_tile, "across": False},
    "they are the gradients of the weights' transposes": {"transpose": True},
}  # fmt: skip


# 6.6 Stochastic rounding ----------------------------------------------------------------------------------------------


def neighbours(x: Float[Tensor, "n"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """The E4M3 values just below (or equal) and above, for x from 1 to 448."""
    step = torch.exp2(torch.floor(torch.log2(x))) / 8
    below = torch.floor(x / step) * step
    return below, below + step


def mean_weight(seed: int, chance=lambda x, below, above: (x - below) / (above - below)) -> float:
    """Mean of 1,000 weights after 1,000 updates by 0.001, from 1, each rounded up with the given probability."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(1000)
    for _ in range(1000):
        x = weights + 0.001
        below, above = neighbours(x)
        weights = torch.where(torch.rand(1000, generator=generator) < chance(x, below, above), above, below)
    return weights.mean().item()
