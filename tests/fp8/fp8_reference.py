"""Quantisation from tables of all numbers of a format, in numpy: what minids.fp8 is compared with.

The references are written from the formats' definitions with numpy and Python integers; none of them uses a float8
type or anything of minids, but `through_package` and `exact`, which call it.
"""

import math
from functools import lru_cache
from itertools import product

import numpy as np
import torch

from minids.fp8.formats import dequantize, quantize

BITS = {"e4m3": (4, 3), "e5m2": (5, 2), "e5m6": (5, 6)}
TILES = [(1, 128), (128, 1), (128, 128), (None, None), (1, None), (None, 1), (3, 5)]


@lru_cache
def numbers(format):
    """All finite numbers >= 0 of a format in the order of their codes, so that an even place is an even fraction."""
    exponent_bits, fraction_bits = BITS[format]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**fraction_bits
    values = [
        fraction / steps * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction / steps) * 2.0 ** (exponent - bias)
        for exponent, fraction in product(range(2**exponent_bits), range(steps))
    ]
    # E4M3 gives up its last code for NaN, the others their last exponent for infinity and NaN.
    return np.array(values[:-1] if format == "e4m3" else values[:-steps])


def nearest(x, format):
    """The number of a format that is nearest to each float64, ties to even."""
    table = numbers(format)
    above = np.searchsorted(table, np.abs(x)).clip(1, len(table) - 1)
    below = above - 1
    up, down = table[above] - np.abs(x), np.abs(x) - table[below]
    choose_up = (up < down) | ((up == down) & (above % 2 == 0))
    return np.where(np.isnan(x), np.nan, np.copysign(np.where(choose_up, table[above], table[below]), x))


def round_trip(x, tile, format="e4m3", power_of_two=False):
    """(dequantised values, scales) of a matrix; every operation in float64, then rounded to float32."""
    x = np.asarray(x, np.float64)
    rows, cols = (size or n for size, n in zip(tile, x.shape, strict=True))
    scales = np.empty((math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / cols)))
    for i, j in np.ndindex(scales.shape):
        amax = np.nan_to_num(np.abs(x[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols])).max()
        scales[i, j] = np.float32(max(amax, float(np.float32(1e-4))) / numbers(format)[-1])
        if power_of_two:
            mantissa, exponent = math.frexp(scales[i, j])
            scales[i, j] = 2.0 ** (exponent - (mantissa == 0.5))
    scale = per_element(scales, (rows, cols), x.shape)
    quotient = (x / scale).astype(np.float32).astype(np.float64)
    return (nearest(quotient, format) * scale).astype(np.float32).astype(np.float64), scales


def per_element(scales, tile, shape):
    rows, cols = (size or n for size, n in zip(tile, shape, strict=True))
    return np.asarray(scales).repeat(rows, 0).repeat(cols, 1)[: shape[0], : shape[1]]


def same_bits(got, want):
    """Equal, NaN where NaN, and -0 where -0."""
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])


def matrix(rows, cols, magnitude=1.0, seed=0):
    """Values over several powers of ten below `magnitude`, of both signs, with a few zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * 10 ** -(4 * torch.rand(rows, cols, generator=generator))
    x[torch.rand(rows, cols, generator=generator) < 0.02] = 0
    return x * magnitude


def through_package(x, tile, format="e4m3", power_of_two=False):
    q, scale = quantize(x, tile, format=format, power_of_two=power_of_two)
    return dequantize(q, scale, tile).double().numpy(), scale.double().numpy()


def exact(a, b, b_tile=(128, 128), a_tile=(1, 128)):
    a, b = dequantize(*a, a_tile).double(), dequantize(*b, b_tile).double()
    return a @ b, a.abs() @ b.abs()
