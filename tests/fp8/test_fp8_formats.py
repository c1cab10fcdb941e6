"""Quantisation equals, bit for bit, tables of all numbers of a format."""

import math

import numpy as np
import pytest
import torch
from fp8_reference import BITS, TILES, matrix, nearest, numbers, per_element, round_trip, same_bits, through_package
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.fp8.formats import dequantize, quantize


@pytest.mark.parametrize(
    "format, largest, smallest", [("e4m3", 448, 2**-9), ("e5m2", 57344, 2**-16), ("e5m6", 65024, 2**-20)]
)
def test_every_number_of_a_format_and_every_midpoint_rounds_as_defined(format, largest, smallest):
    table = numbers(format)
    assert table[-1] == largest and table[1] == smallest
    middle = (table[1:] + table[:-1]) / 2
    values = np.concatenate([table, middle, np.nextafter(np.float32(middle), 0), np.nextafter(np.float32(middle), 1e9)])
    values = np.concatenate([values, -values, [largest, math.nan]])
    x = torch.tensor(values, dtype=torch.float32)[None]
    got, scale = through_package(x, (1, None), format)
    assert scale == 1
    same_bits(got[0], nearest(values, format))
    same_bits(got[0, : len(table)], table)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_dequantised_values_and_scales_equal_the_reference_bit_for_bit(tile, format, power_of_two):
    x = matrix(200, 300, magnitude=30)
    got, scale = through_package(x, tile, format, power_of_two)
    want, want_scale = round_trip(x, tile, format, power_of_two)
    same_bits(scale, want_scale)
    same_bits(got, want)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 140),
    cols=st.integers(1, 140),
    tile=st.sampled_from(TILES),
    magnitude=st.floats(-30, 30).map(lambda power: 10.0**power),
    power_of_two=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_magnitude_equals_the_reference_and_stays_within_the_bound(
    rows, cols, tile, magnitude, power_of_two, seed
):
    x = matrix(rows, cols, magnitude, seed)
    got, scale = through_package(x, tile, "e4m3", power_of_two)
    want, want_scale = round_trip(x, tile, "e4m3", power_of_two)
    same_bits(scale, want_scale)
    same_bits(got, want)
    scale_of_each = per_element(scale, tile, x.shape)
    # Half a step: 2^-4 of a normal number, 2^-10 of the scale below those; and float32's own rounding.
    bound = np.maximum(np.abs(x.double().numpy()) * 2.0**-4, scale_of_each * 2.0**-10) * (1 + 2.0**-20)
    assert (np.abs(got - x.double().numpy()) <= bound).all()


def test_scales_that_are_powers_of_two_already_stay():
    x = torch.tensor([[448 * 2.0**-5], [448 * 2.0**-5 * (1 + 2**-22)], [448 * 2.0**-5 * (1 - 2**-22)], [0.0]])
    scale = quantize(x, (1, 1), power_of_two=True)[1].flatten()
    assert scale.tolist() == [2**-5, 2**-4, 2**-5, 2.0 ** math.ceil(math.log2(1e-4 / 448))]


def test_zeros_have_the_least_scale_and_stay_zeros():
    q, scale = quantize(torch.tensor([[0.0, -0.0], [1e-5, -1e-4]]), (1, 2))
    assert (scale == torch.tensor(1e-4) / 448).all()
    same_bits(dequantize(q, scale, (1, 2))[0].numpy(), np.array([0.0, -0.0]))


def test_an_outlier_costs_its_own_tile_only():
    x = matrix(4, 512, seed=3)
    calm = through_package(x, (1, 128))[0]
    x[1, 200] = 1e6
    got = through_package(x, (1, 128))[0]
    changed = (got != calm).any(0).nonzero()[0], (got != calm).any(1).nonzero()[0]
    assert set(changed[0]) <= set(range(128, 256)) and list(changed[1]) == [1]
    assert (got[1, 128:256] == 0).sum() > 100


def test_nan_stays_and_leaves_its_tile_alone():
    x = matrix(2, 256)
    want = through_package(x, (1, 128))[0]
    place = int(x[0, :128].abs().argmin())
    x[0, place] = want[0, place] = math.nan
    same_bits(through_package(x, (1, 128))[0], want)
    assert np.isnan(through_package(torch.full((1, 3), math.nan), (1, 128))[0]).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinities_are_refused(bad):
    x = torch.ones(3, 200)
    x[2, 150] = bad
    with pytest.raises(ValueError, match="infinity"):
        quantize(x)
    x[2, 151] = math.nan  # does not hide it
    with pytest.raises(ValueError, match="infinity"):
        quantize(x)
    with pytest.raises(ValueError, match="overflows float32"):
        quantize(torch.full((1, 1), 1e300, dtype=torch.float64))


def test_leading_dimensions_are_batches():
    x = torch.stack([matrix(130, 140, seed=i) for i in range(3)])
    q, scale = quantize(x, (128, 128))
    assert q.shape == x.shape and q.dtype == torch.float8_e4m3fn and scale.shape == (3, 2, 2)
    together = dequantize(q, scale, (128, 128)).numpy()
    for i in range(3):
        same_bits(together[i], through_package(x[i], (128, 128))[0])


def test_empty_input_has_no_scales():
    for shape, scales in (((0, 300), (0, 3)), ((300, 0), (300, 0))):
        q, scale = quantize(torch.empty(shape))
        assert q.shape == shape and scale.shape == scales and dequantize(q, scale).shape == shape


def test_the_transpose_has_the_transposed_tiles():
    x = matrix(200, 150)
    q, scale = quantize(x, (128, 1))
    other, other_scale = quantize(x.T, (1, 128))
    assert torch.equal(q.float(), other.float().T) and torch.equal(scale, other_scale.T)


def test_bfloat16_and_gradients():
    x = matrix(3, 200).bfloat16()
    same_bits(through_package(x, (1, 128))[0], round_trip(x.double().numpy(), (1, 128))[0])
    q, scale = quantize(x.float().requires_grad_())
    assert not q.requires_grad and not scale.requires_grad


def test_bad_arguments_are_named():
    x = torch.ones(4, 200)
    with pytest.raises(ValueError, match="format='int8': must be one of e4m3, e5m2, e5m6"):
        quantize(x, format="int8")
    with pytest.raises(ValueError, match=r"tile=\(0, 128\)"):
        quantize(x, (0, 128))
    q, scale = quantize(x)
    with pytest.raises(ValueError, match=r"scale has shape \(4, 2\).*needs \(4, 200\)"):
        dequantize(q, scale, (1, 1))
