"""Exercises of chapter 06: numbers of eight bits, tiles with scales, promoted sums, and the weight gradient.

Rounding is by torch's own cast. A scale is what a stored number is multiplied by.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from minids.course.checks import Bug, Function, SpotTheBug
from minids.fp8.formats import dequantize, quantize


def decode(code: int) -> float:
    """The number that an E4M3 code, 0 to 255, stands for."""
    return torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).item()


def parts(code):
    return (-1) ** (code >> 7), code >> 3 & 15, code & 7


def decode_with_bias_8(code):
    sign, e, m = parts(code)
    if (e, m) == (15, 7):
        return math.nan
    return sign * (2.0 ** (e - 8) * (1 + m / 8) if e else 2.0**-7 * m / 8)


def decode_without_subnormals(code):
    sign, e, m = parts(code)
    return math.nan if (e, m) == (15, 7) else sign * 2.0 ** (e - 7) * (1 + m / 8)


def decode_with_infinities(code):
    sign, e, m = parts(code)
    if e == 15:
        return math.nan if m else sign * math.inf
    return decode(code)


def decode_nan_as_480(code):
    sign, e, m = parts(code)
    return sign * 480.0 if (e, m) == (15, 7) else decode(code)


def decode_table(decode_one):
    """`decode_one` for a list of codes, as a tensor, in which NaN can be compared."""
    return lambda codes: torch.tensor([float(decode_one(code)) for code in codes])


def code_examples(_generator: torch.Generator) -> list[tuple]:
    return [([0x38, 0x39, 0xC0],), ([0, 1, 7, 8, 129],), ([126, 254, 120],), ([127, 255],), (list(range(256)),)]


def quantize_tiles(x: Float[Tensor, "rows cols"], width: int):
    """V3's activations: tiles of one row and `width` columns; (numbers as float32, scales [rows, tiles])."""
    q, scale = quantize(x, (1, width))
    return q.float(), scale


def quantize_tiles_as_integers(x, width):
    scale = quantize(x, (1, width))[1]
    return (x / _spread(scale, x, width)).round().clamp(-448, 448), scale


def quantize_tiles_by_inverse(x, width):
    q, scale = quantize_tiles(x, width)
    return q, 1 / scale


def quantize_tiles_per_row(x, width):
    q, scale = quantize(x, (1, None))
    return q.float(), scale.expand(-1, math.ceil(x.shape[1] / width))


def quantize_tiles_by_signed_maximum(x, width):
    scale = torch.stack([t.amax(1) for t in x.split(width, 1)], 1).clamp_min(1e-4) / 448
    scaled = (x / _spread(scale, x, width)).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).float(), scale


def quantize_tiles_without_floor(x, width):
    scale = torch.stack([t.abs().amax(1) for t in x.split(width, 1)], 1) / 448
    return (x / _spread(scale, x, width)).to(torch.float8_e4m3fn).float(), scale


def _spread(scale, x, width):
    return scale.repeat_interleave(width, 1)[:, : x.shape[1]]


def tile_examples(generator: torch.Generator) -> list[tuple]:
    def one(rows, cols, width):
        return torch.randn(rows, cols, generator=generator) * torch.logspace(-3, 3, rows)[:, None], width

    lone = torch.tensor([[0.1, -0.2, 0.3, -50.0, 0.0, 0.0, 0.0, 0.0]])
    return [one(2, 8, 4), (lone, 4), one(3, 10, 4), one(5, 256, 128), one(1, 3, 128), one(4, 130, 128)]


def truncate(x: float, bits: int) -> float:
    """The `bits` leading significant bits of a number."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(math.trunc(math.ldexp(fraction, bits)), exponent - bits)


def round_to(x: float, bits: int) -> float:
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)


def promoted_sum(products: list[float], scales: list[float], bits: int, cut=truncate) -> float:
    """A register of `bits` bits, multiplied by the tile's scale and promoted once per tile, of equal sizes."""
    size, total = len(products) // len(scales), 0.0
    for i, scale in enumerate(scales):
        register = 0.0
        for product in products[i * size : (i + 1) * size]:
            register = cut(register + product, bits)
        total += register * scale
    return total


def promoted_sum_rounded(products, scales, bits):
    return promoted_sum(products, scales, bits, cut=round_to)


def promoted_sum_exactly(products, scales, bits):
    return promoted_sum(products, scales, 53)


def promoted_sum_not_cleared(products, scales, bits):
    size, total, register = len(products) // len(scales), 0.0, 0.0
    for i, scale in enumerate(scales):
        for product in products[i * size : (i + 1) * size]:
            register = truncate(register + product, bits)
        total += register * scale
    return total


def promoted_sum_in_the_register(products, scales, bits):
    size = len(products) // len(scales)
    register = 0.0
    for k, product in enumerate(products):
        register = truncate(register + product * scales[k // size], bits)
    return register


def sum_examples(generator: torch.Generator) -> list[tuple]:
    def one(k, tiles, bits):
        products = torch.randint(-8, 24, (k,), generator=generator).double().tolist()
        return products, (0.5 + torch.rand(tiles, generator=generator).double()).tolist(), bits

    return [([1.0] * 24, [1.0, 2.0, 0.5], 3), one(16, 2, 4), one(64, 4, 5), one(7, 1, 3), one(6, 6, 4), one(256, 2, 8)]


def weight_gradient(x: Float[Tensor, "tokens in"], grad: Float[Tensor, "tokens out"], height: int):
    """grad^T x with both rounded to E4M3 in tiles of `height` tokens by one channel: [out, in]."""
    return _rounded(grad, (height, 1)).T @ _rounded(x, (height, 1))


def weight_gradient_along_channels(x, grad, height):
    return _rounded(grad, (1, height)).T @ _rounded(x, (1, height))


def weight_gradient_of_input_only(x, grad, height):
    return grad.T @ _rounded(x, (height, 1))


def weight_gradient_transposed(x, grad, height):
    return weight_gradient(x, grad, height).T


def weight_gradient_in_blocks(x, grad, height):
    return _rounded(grad, (height, height)).T @ _rounded(x, (height, height))


def _rounded(x, tile):
    return dequantize(*quantize(x, tile), tile)


def gradient_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, inputs, outputs, height):
        size = torch.logspace(0, 2, tokens)[:, None]
        x, grad = (torch.randn(tokens, n, generator=generator) for n in (inputs, outputs))
        return x * size, grad * size.flip(0), height

    return [one(8, 6, 4, 4), one(10, 3, 5, 4), one(256, 12, 7, 128), one(130, 4, 9, 128)]


def round_trip(x: Float[Tensor, "rows cols"], width: int) -> Float[Tensor, "rows cols"]:
    """Quantise in tiles of one row and `width` columns, and dequantise."""
    return dequantize(*quantize(x, (1, width)), (1, width))


def round_trip_of_integers(x, width):
    q, scale = quantize_tiles_as_integers(x, width)
    return q * _spread(scale, x, width)


def round_trip_inverted(x, width):
    q, scale = quantize_tiles(x, width)
    return q / _spread(scale, x, width)


def round_trip_per_tensor(x, width):
    return _rounded(x, (None, None))


def round_trip_along_rows(x, width):
    return _rounded(x, (width, 1))


def round_trip_without_floor(x, width):
    q, scale = quantize_tiles_without_floor(x, width)
    return q * _spread(scale, x, width)


EXERCISES = [
    Function(
        "6.1", "decode", decode_table(decode), code_examples,
        mistakes={
            "the exponent's offset is 8 instead of 7": decode_table(decode_with_bias_8),
            "codes with e = 0 have a leading one too": decode_table(decode_without_subnormals),
            "e = 15 stands for infinity and NaN, as in the larger formats": decode_table(decode_with_infinities),
            "the code with all bits of e and m set is taken for a number": decode_table(decode_nan_as_480),
        },
        hint="code >> 7 is the sign, code >> 3 & 15 is e, code & 7 is m; two cases for e, and one code that is NaN",
    ),
    Function(
        "6.2", "quantize_tiles", quantize_tiles, tile_examples,
        mistakes={
            "x / scale is rounded to whole numbers": quantize_tiles_as_integers,
            "the scale is what x is multiplied by, instead of what q is": quantize_tiles_by_inverse,
            "a row has one scale, not one per tile": quantize_tiles_per_row,
            "the scale is made from the largest number without taking sizes first": quantize_tiles_by_signed_maximum,
            "a tile of zeros is divided by 0": quantize_tiles_without_floor,
        },
        hint="x.split(width, 1) gives the tiles, the last of which may be narrower; one scale per row of each",
        points=2, outputs=("q", "the scales"),
    ),
    Function(
        "6.3", "promoted_sum", promoted_sum, sum_examples,
        mistakes={
            "the register rounds to nearest instead of cutting off": promoted_sum_rounded,
            "the register keeps all bits": promoted_sum_exactly,
            "the register is not cleared after a promotion": promoted_sum_not_cleared,
            "the scales are multiplied into the products, and all is added up in the register":
                promoted_sum_in_the_register,
        },
        hint="two loops: over tiles with their scales, and over the products of a tile; truncate after each addition",
        points=2,
    ),
    Function(
        "6.4", "weight_gradient", weight_gradient, gradient_examples,
        mistakes={
            "the tiles lie along channels, as in the forward pass": weight_gradient_along_channels,
            "only the input is rounded": weight_gradient_of_input_only,
            "it is the gradient of the weight's transpose": weight_gradient_transposed,
            "square blocks share a scale": weight_gradient_in_blocks,
        },
        hint="the product sums over tokens; quantize(x, (height, 1)) cuts tiles of `height` tokens and one channel",
        points=2,
    ),
    SpotTheBug(
        "6.5", "test_round_trip", round_trip,
        (
            Bug("numbers are rounded to integers", round_trip_of_integers, "give it a number between two of the grid"),
            Bug("the scale is inverted", round_trip_inverted, "should the result not be close to x?"),
            Bug("one scale for the whole tensor", round_trip_per_tensor, "plant an outlier: what of the other tiles?"),
            Bug("tiles lie along the other axis", round_trip_along_rows, "whom may an outlier in a row disturb?"),
            Bug("a tile of zeros has no scale", round_trip_without_floor, "what can go wrong with zeros?"),
        ),
    ),
]  # fmt: skip
