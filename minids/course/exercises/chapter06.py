"""Exercises of chapter 06: values of eight bits, tiles with scales, promoted sums, and the weight gradient.

Rounding is by torch's own cast. A scale is what a stored value is multiplied by.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from minids.course.checks import Bug, Function, SpotTheBug
from minids.course.observation import Observation
from minids.fp8.formats import dequantize, quantize

# 6.1 -----------------------------------------------------------------------------------------------------------------


def decode(codes: list[int]) -> Float[Tensor, "codes"]:
    """The values that E4M3 codes, 0 to 255, stand for."""
    return torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def decode_by_arithmetic(codes, *, bias=7, lowest=-6, subnormals=True, signed=True, nan=True, infinities=False):
    def value(code: int) -> float:
        sign, e, m = (-1) ** (code >> 7) if signed else 1, code >> 3 & 15, code & 7
        if infinities and e == 15:
            return math.nan if m else sign * math.inf
        if nan and (e, m) == (15, 7):
            return math.nan
        return sign * (2.0 ** (e - bias) * (1 + m / 8) if e or not subnormals else 2.0**lowest * m / 8)

    return torch.tensor([value(code) for code in codes])


def by_arithmetic_only(arguments: tuple, seen: Observation) -> str | None:
    if {"view", "frombuffer"} & set(seen.functions):
        return "PyTorch's float8 type decoded the bits; compute the values from e and m"
    return None


def code_examples(_generator: torch.Generator) -> list[tuple]:
    return [([0x38, 0x39, 0xC0],), ([0, 1, 7, 8, 129],), ([126, 254, 120],), ([127, 255],), (list(range(256)),)]


# 6.2 -----------------------------------------------------------------------------------------------------------------


def quantize_tiles(x: Float[Tensor, "rows cols"], width: int):
    """V3's activations: tiles of one row and `width` columns; (values as float32, scales [rows, tiles])."""
    q, scale = quantize(x, (1, width))
    return q.float(), scale


def to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def to_integers(x: Tensor) -> Tensor:
    return x.round().clamp(-448, 448)


def floor_of_maximum(maximum: Tensor) -> Tensor:
    return maximum.clamp_min(1e-4) / 448


def tiles_by_hand(
    x: Tensor,
    width: int,
    magnitude: Callable[[Tensor], Tensor] = torch.abs,
    scale_of: Callable[[Tensor], Tensor] = floor_of_maximum,
    cast: Callable[[Tensor], Tensor] = to_e4m3,
    per_row: bool = False,
) -> tuple[Tensor, Tensor]:
    parts = [x] * math.ceil(x.shape[1] / width) if per_row else x.split(width, 1)
    scale = scale_of(torch.stack([magnitude(part).amax(1) for part in parts], 1))
    return cast(x / spread(scale, x, width)), scale


def spread(scale: Tensor, x: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(width, 1)[:, : x.shape[1]]


def tiles_by_inverse(x, width, **options):
    q, scale = tiles_by_hand(x, width, **options)
    return q, 1 / scale


def tiles_dequantised(x, width):
    q, scale = quantize_tiles(x, width)
    return q * spread(scale, x, width), scale


def without_package(arguments: tuple, seen: Observation) -> str | None:
    if "nan_to_num_" in seen.functions:  # which the package's function calls, and nobody else
        return "the package's `quantize` made it; cut, scale and cast the tiles with PyTorch alone"
    return None


def tile_examples(generator: torch.Generator) -> list[tuple]:
    def one(rows, cols, width):
        return torch.randn(rows, cols, generator=generator) * torch.logspace(-3, 3, rows)[:, None], width

    by_hand = torch.tensor([[0.1, -0.2, 0.3, -50.0, 0.0, 0.0, 0.0, 0.0]])
    small = torch.tensor([[3e-5, -1e-5, 0.0, 2e-5, 1.0, 2.0, 3.0, 4.0]])
    return [(by_hand, 4), (small, 4), one(2, 8, 4), one(3, 10, 4), one(5, 256, 128), one(1, 3, 128), one(4, 130, 128)]


# 6.3 -----------------------------------------------------------------------------------------------------------------


def truncate(x: float, bits: int) -> float:
    """The `bits` leading significant bits of a number."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(math.trunc(math.ldexp(fraction, bits)), exponent - bits)


def round_to(x: float, bits: int) -> float:
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)


def keep_all_bits(x: float, bits: int) -> float:
    return x


def promoted_sum(products: list[float], scales: list[float], bits: int) -> float:
    """An accumulator of `bits` bits, multiplied by the tile's scale and promoted once per tile of equal length."""
    return promoted(products, scales, bits)


def promoted(products, scales, bits, *, cut=truncate, cut_product=False, clear=True) -> float:
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


def sum_examples(generator: torch.Generator) -> list[tuple]:
    def one(k, tiles, bits):
        products = torch.randint(-8, 24, (k,), generator=generator).double().tolist()
        return products, (0.5 + torch.rand(tiles, generator=generator).double()).tolist(), bits

    falling = [-1.0, -2.0, -5.0, -7.0, -9.0, -11.0], [1.0, 3.0], 3  # negative sums: cut towards zero, not down
    mixed = one(16, 2, 4), one(64, 4, 5), one(7, 1, 3), one(6, 6, 4), one(256, 2, 8)
    return [([1.0] * 24, [1.0, 2.0, 0.5], 3), falling, *mixed]


# 6.4 -----------------------------------------------------------------------------------------------------------------


def weight_gradient(x: Float[Tensor, "tokens in"], grad: Float[Tensor, "tokens out"], height: int):
    """grad^T x with both rounded to E4M3 in tiles of `height` tokens by one channel: [out, in]."""
    return rounded(grad, (height, 1)).T @ rounded(x, (height, 1))


def weight_gradient_along_channels(x, grad, height):
    return rounded(grad, (1, height)).T @ rounded(x, (1, height))


def weight_gradient_of_input_only(x, grad, height):
    return grad.T @ rounded(x, (height, 1))


def weight_gradient_of_gradient_only(x, grad, height):
    return rounded(grad, (height, 1)).T @ x


def weight_gradient_unrounded(x, grad, height):
    return grad.T @ x


def weight_gradient_in_blocks(x, grad, height):
    return rounded(grad, (height, height)).T @ rounded(x, (height, height))


def transposed(function):
    return lambda x, grad, height: function(x, grad, height).T


def rounded(x, tile):
    return dequantize(*quantize(x, tile), tile)


def gradient_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, inputs, outputs, height):
        size = torch.logspace(0, 2, tokens)[:, None]
        x, grad = (torch.randn(tokens, n, generator=generator) for n in (inputs, outputs))
        return x * size, grad * size.flip(0), height

    return [one(4, 3, 2, 2), one(8, 6, 4, 4), one(10, 3, 5, 4), one(256, 12, 7, 128), one(130, 4, 9, 128)]


# 6.5 -----------------------------------------------------------------------------------------------------------------


def round_trip(x: Float[Tensor, "rows cols"], width: int) -> Float[Tensor, "rows cols"]:
    """Quantise in tiles of one row and `width` columns, and dequantise."""
    return dequantize(*quantize(x, (1, width)), (1, width))


def round_trip_of_integers(x, width):
    q, scale = tiles_by_hand(x, width, cast=to_integers)
    return q * spread(scale, x, width)


def round_trip_inverted(x, width):
    q, scale = quantize_tiles(x, width)
    return q / spread(scale, x, width)


def round_trip_per_tensor(x, width):
    return rounded(x, (None, None))


def round_trip_along_rows(x, width):
    return rounded(x, (width, 1))


def round_trip_without_floor(x, width):
    q, scale = tiles_by_hand(x, width, scale_of=lambda maximum: maximum / 448)
    return q * spread(scale, x, width)


EXERCISES = [
    Function(
        "6.1", "decode", decode, code_examples, cost=by_arithmetic_only,
        mistakes={
            "the exponent's bias is 8 instead of 7": partial(decode_by_arithmetic, bias=8, lowest=-7),
            "codes with e = 0 have a leading one too": partial(decode_by_arithmetic, subnormals=False),
            "codes with e = 0 are multiples of 2^-7 / 8 instead of 2^-6 / 8": partial(decode_by_arithmetic, lowest=-7),
            "e = 15 stands for infinity and NaN, as in the larger formats":
                partial(decode_by_arithmetic, infinities=True),
            "the code with all bits of e and m set is taken for a finite value":
                partial(decode_by_arithmetic, nan=False),
            "the sign bit is ignored": partial(decode_by_arithmetic, signed=False),
            "codes with e = 0 have a leading one too, and the code with all bits of e and m set is a finite value":
                partial(decode_by_arithmetic, subnormals=False, nan=False),
        },
        hints=(
            "split a code into its three bit fields first; then ask which values of e and m are special",
            "sign: code >> 7, e: code >> 3 & 15, m: code & 7; e = 0 has no leading one, e = 15 with m = 7 is NaN",
        ),
        section="chapter 06, section 2.1: the values of E4M3",
    ),
    Function(
        "6.2", "quantize_tiles", quantize_tiles, tile_examples, cost=without_package,
        mistakes={
            "x / scale is rounded to integers": partial(tiles_by_hand, cast=to_integers),
            "the scale is what x is multiplied by, instead of what q is": tiles_by_inverse,
            "a row has one scale, not one per tile": partial(tiles_by_hand, per_row=True),
            "the scale is made from the largest value instead of the largest magnitude":
                partial(tiles_by_hand, magnitude=lambda x: x, scale_of=floor_of_maximum),
            "the floor of 1e-4 is missing, so a tile of zeros is divided by 0":
                partial(tiles_by_hand, scale_of=lambda maximum: maximum / 448),
            "the floor of 1e-4 holds for tiles of zeros only":
                partial(tiles_by_hand, scale_of=lambda maximum: torch.where(maximum == 0, 1e-4, maximum) / 448),
            "the floor of 1e-4 holds for the scale instead of the largest magnitude":
                partial(tiles_by_hand, scale_of=lambda maximum: (maximum / 448).clamp_min(1e-4)),
            "q is multiplied by the scales again, which is dequantisation": tiles_dequantised,
            "a row has one scale, and it is what x is multiplied by": partial(tiles_by_inverse, per_row=True),
            "x / scale is rounded to integers, and the scale is what x is multiplied by":
                partial(tiles_by_inverse, cast=to_integers),
        },
        hints=(
            "work on one tile at a time: its largest magnitude, the floor, the scale, the division, the cast",
            "for tile in x.split(width, 1), the last may be narrower: tile.abs().amax(1, keepdim=True).clamp_min(1e-4)",
        ),
        section="chapter 06, sections 2.3 and 2.4: a scale, and tiles",
        points=2, outputs=("q", "the scales"),
    ),
    Function(
        "6.3", "promoted_sum", promoted_sum, sum_examples,
        mistakes={
            "the accumulator rounds to nearest instead of cutting off": partial(promoted, cut=round_to),
            "the accumulator keeps all bits": partial(promoted, cut=keep_all_bits),
            "the accumulator is not cleared after a promotion": partial(promoted, clear=False),
            "the products are cut off before the addition, the sum is not": partial(promoted, cut_product=True),
            "only the last sum of each tile is cut off, not every addition": promoted_cut_once_per_tile,
            "the products are multiplied by the scales first, and the accumulator is never promoted": promoted_never,
            "the accumulator keeps all bits and is not cleared": partial(promoted, cut=keep_all_bits, clear=False),
            "the accumulator rounds to nearest and is not cleared": partial(promoted, cut=round_to, clear=False),
        },
        hints=(
            "there are two sums, one within a tile and one over tiles; which of them is cut off, and when?",
            "loop over tiles and, inside, over a tile's products: accumulator = truncate(accumulator + product, bits)",
        ),
        section="chapter 06, section 2.6: accumulation precision",
        points=2,
    ),
    Function(
        "6.4", "weight_gradient", weight_gradient, gradient_examples,
        mistakes={
            "the tiles run along channels, as in the forward pass": weight_gradient_along_channels,
            "only the input is rounded": weight_gradient_of_input_only,
            "only the gradient is rounded": weight_gradient_of_gradient_only,
            "nothing is rounded": weight_gradient_unrounded,
            "it is the gradient of the weight's transpose": transposed(weight_gradient),
            "square blocks share a scale": weight_gradient_in_blocks,
            "the tiles run along channels, and the result is transposed": transposed(weight_gradient_along_channels),
            "only the input is rounded, and the result is transposed": transposed(weight_gradient_of_input_only),
        },
        hints=(
            "which dimension do the two operands have in common? Tiles run along that one",
            "the contraction dimension is tokens: quantize(t, (height, 1)) for both, dequantize, then grad.T @ x",
        ),
        section="chapter 06, section 2.5: tiles run along the contraction dimension",
        points=2,
    ),
    SpotTheBug(
        "6.5", "test_round_trip", round_trip,
        (
            Bug("x / scale is rounded to integers", round_trip_of_integers, "try small values beside a large one"),
            Bug("the scale is inverted", round_trip_inverted, "should the result not be close to x?"),
            Bug("one scale for the whole tensor", round_trip_per_tensor, "add an outlier: what of the other tiles?"),
            Bug("tiles run along the other axis", round_trip_along_rows, "which values may an outlier change?"),
            Bug("a tile of zeros has no scale", round_trip_without_floor, "what can go wrong with zeros?"),
        ),
        hints=(
            "compare the result with x in three situations: ordinary values, one very large value, only zeros",
            "E4M3 errs by at most 1/16 of a value: demand that of all values outside the tile of one huge outlier, "
            "and zeros for zeros",
        ),
        section="chapter 06, sections 2.2 to 2.5 and section 7",
    ),
]  # fmt: skip
