"""The emulated tensor core equals integer arithmetic, and its error stays within the stated bound."""

import math

import numpy as np
import pytest
import torch
from fp8_reference import exact, matrix, per_element, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.fp8.formats import dequantize, quantize
from minids.fp8.gemm import gemm


def cut(integer, places):
    """Clear the lowest binary places of an integer, toward zero."""
    return int(math.copysign(1, integer)) * (abs(integer) >> places << places) if places > 0 else integer


def tensor_core(a, b, promote_every, bits):
    """One output from two lists of (number, scale), in Python integers: an E4M3 number counts units of 2^-9."""
    result = np.float32(0)
    for start in range(0, len(a), promote_every):
        register = 0
        for group in range(start, min(start + promote_every, len(a)), 32):
            stop = min(group + 32, start + promote_every)
            pairs = zip(a[group:stop], b[group:stop], strict=True)
            products = [int(x * 512) * int(y * 512) for (x, _), (y, _) in pairs]
            leading = max(abs(p) for p in products).bit_length() - 1
            register += sum(cut(p, leading - (bits - 1)) for p in products)
            register = cut(register, register.bit_length() - bits)
        scale_a, scale_b = np.float32(a[start][1]), np.float32(b[start][1])
        result += np.float32(math.ldexp(register, -18)) * scale_a * scale_b
    return result


def reference_gemm(a, b, a_tile, b_tile, promote_every, bits):
    """`tensor_core` for every output, from float matrices."""
    (qa, sa), (qb, sb) = a, b
    a = np.dstack((qa.float(), per_element(sa, a_tile, qa.shape)))
    b = np.dstack((qb.float(), per_element(sb, b_tile, qb.shape))).swapaxes(0, 1)
    return np.array([[tensor_core(row, col, promote_every, bits) for col in b] for row in a])


@pytest.mark.parametrize("bits", [2, 8, 14, 24])
@pytest.mark.parametrize("promote_every", [32, 128, None])
@pytest.mark.parametrize("k", [1, 33, 300])
def test_gemm_equals_integer_arithmetic_bit_for_bit(k, promote_every, bits):
    a_tile, b_tile = ((1, None), (None, 1)) if promote_every is None else ((1, 128), (128, 128))
    a, b = quantize(matrix(5, k, seed=1), a_tile), quantize(matrix(k, 7, seed=2), b_tile)
    want = reference_gemm(a, b, a_tile, b_tile, promote_every or k, bits)
    same_bits(gemm(a, b, promote_every, bits).numpy(), want)


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 4), k=st.integers(1, 200), n=st.integers(1, 4), bits=st.integers(2, 24),
    tiles=st.sampled_from([((1, 128), (128, 1)), ((None, None), (None, None)), ((128, 128), (128, 128))]),
    promote_every=st.sampled_from([32, 64, 128]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_gemm_equals_integer_arithmetic_for_any_codes(m, k, n, bits, tiles, promote_every, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in ((m, k), (k, n))]
    codes = [torch.where(code % 128 == 127, 0, code) for code in codes]  # no NaN
    pairs = []
    for code, tile in zip(codes, tiles, strict=True):
        scale = quantize(torch.zeros(code.shape), tile)[1]
        pairs.append((code.view(torch.float8_e4m3fn), torch.rand(scale.shape, generator=generator)))
    same_bits(gemm(*pairs, promote_every, bits).numpy(), reference_gemm(*pairs, *tiles, promote_every, bits))


def test_gemm_of_several_bands_of_rows_equals_one(monkeypatch):
    a, b = quantize(matrix(50, 256, seed=1), (1, 128)), quantize(matrix(256, 30, seed=2), (128, 128))
    want = gemm(a, b)
    monkeypatch.setattr("minids.fp8.gemm.BUFFER", 32 * 30 * 7)
    assert torch.equal(gemm(a, b), want)


@settings(deadline=None, max_examples=60)
@given(
    k=st.integers(1, 700), promoted=st.booleans(), bits=st.integers(6, 16), positive=st.booleans(),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_gemm_stays_within_its_stated_bound(k, promoted, bits, positive, seed):
    tile = (1, 128) if promoted else (1, None)
    x, y = matrix(8, k, seed=seed), matrix(8, k, seed=seed + 1)
    a, b = (quantize(t.abs() if positive else t, tile) for t in (x, y))
    b = b[0].T, b[1].T
    want, size = exact(a, b, tile[::-1], tile)
    groups = 4 if promoted else math.ceil(k / 32)
    promotions = math.ceil(k / 128) + 3
    bound = ((32 + groups) * 2.0 ** (1 - bits) + promotions * 2.0**-24) * size
    assert ((gemm(a, b, 128 if promoted else None, bits).double() - want).abs() <= bound).all()


def test_plain_path_equals_the_promoted_product_within_the_bound():
    a, b = quantize(matrix(32, 2048, seed=1), (1, 128)), quantize(matrix(2048, 32, seed=2), (128, 128))
    plain = dequantize(*a) @ dequantize(*b, (128, 128))
    difference = (gemm(a, b) - plain).abs() / exact(a, b)[1]
    assert 0 < difference.max() < 36 / 8192


def test_error_at_4096_has_the_published_order_and_promotion_removes_it():
    """V3 section 3.3.2 saw nearly 2 % at worst, in matrices that it does not describe; the bound is 160 * 2^-13."""
    a, b = quantize(torch.rand(64, 4096), (None, None)), quantize(torch.rand(4096, 64), (None, None))
    want = exact(a, b, (None, None), (None, None))[0]

    def error(promote_every, bits):
        return ((gemm(a, b, promote_every, bits) - want) / want).abs().max().item()

    without, promoted, wide = error(None, 14), error(128, 14), error(None, 24)
    assert 0.002 < without < 0.02
    assert promoted < without / 20
    assert wide < 2e-5


def test_gemm_passes_nan_on():
    a, b = quantize(matrix(3, 64), (1, 128)), quantize(matrix(64, 3), (128, 128))
    a[0].view(torch.uint8)[1, 5] = 127
    assert gemm(a, b).isnan().all(1).tolist() == [False, True, False]


def test_gemm_names_what_does_not_fit():
    a, b = quantize(torch.ones(4, 256), (1, 128)), quantize(torch.ones(256, 4), (128, 128))
    for arguments, message in (
        ((a, a), "must be"),
        ((a, b, 100), "promote_every=100: must be a positive multiple of 32"),
        ((a, b, 0), "promote_every=0"),
        ((a, b, 128, 1), "accumulator_bits=1: must be between 2 and 24"),
        ((a, b, None), "a_scale has 2 scales along 256 elements"),
        ((a, b, 96), "multiple of the 96 between promotions"),
        ((a, quantize(torch.ones(256, 4), (64, 1))), "b_scale has 4 scales along 256 elements"),
        ((a, quantize(torch.ones(256, 4), (128, 128), format="e5m2")), "b is torch.float8_e5m2"),
    ):
        with pytest.raises(ValueError, match=message):
            gemm(*arguments)
