"""Quantisation against tables of all numbers of a format, the tensor core against integers, the layers against loops.

The references are written from the formats' definitions with numpy and Python integers; none of them uses a float8
type or anything of minids.
"""

import copy
import json
import math
from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import NANO, build, random_tokens
from safetensors.torch import load_file, save_file
from torch import nn
from training.helpers import RECIPE, counting_data, nano

from minids.interop.hf import load_pretrained, save_pretrained
from minids.model import fp8_cuda
from minids.model.fp8 import Rounded, dequantize, gemm, quantize
from minids.model.fp8_linear import (
    AFTER_ATTENTION,
    Casting,
    Fp8Experts,
    Fp8Linear,
    convert_from_fp8,
    convert_to_fp8,
    in_fp8,
)
from minids.model.moe import Experts, Routing
from minids.training.loop import Trainer

BITS = {"e4m3": (4, 3), "e5m2": (5, 2), "e5m6": (5, 6)}
TILES = [(1, 128), (128, 1), (128, 128), (None, None), (1, None), (None, 1), (3, 5)]


# References --------------------------------------------------------------------------------------------------------


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


def through_package(x, tile, format="e4m3", power_of_two=False):
    q, scale = quantize(x, tile, format=format, power_of_two=power_of_two)
    return dequantize(q, scale, tile).double().numpy(), scale.double().numpy()


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


# Quantisation ------------------------------------------------------------------------------------------------------


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


# The tensor core ---------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("minids.model.fp8.BUFFER", 32 * 30 * 7)
    assert torch.equal(gemm(a, b), want)


def exact(a, b, b_tile=(128, 128), a_tile=(1, 128)):
    a, b = dequantize(*a, a_tile).double(), dequantize(*b, b_tile).double()
    return a @ b, a.abs() @ b.abs()


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


# The layers --------------------------------------------------------------------------------------------------------

FORMS = {
    "plain": Casting(),
    "after attention": AFTER_ATTENTION,
    "gradient sent": Casting(gradient_sent_in_fp8=True),
}


def fp8_linear(inner, out, casting=Casting()):  # noqa: B008 - frozen
    return in_fp8(nn.Linear(inner, out, bias=False), casting)


def three_products(x, weight, grad, casting):
    """Output and both gradients of x [tokens, in] @ weight [in, out], float64 on rounded operands."""
    pow2, sent = casting.power_of_two, casting.gradient_sent_in_fp8
    weight = round_trip(weight, (128, 128))[0]
    out = round_trip(x, (1, 128), power_of_two=pow2)[0] @ weight
    if sent:
        grad = round_trip(grad, (1, 128), power_of_two=True)[0]
    by_channel = round_trip(grad, (1, 128), power_of_two=sent)[0]
    cached = round_trip(x, (1, 128), casting.cached_as, pow2)[0]
    by_token = round_trip(grad, (128, 1), power_of_two=sent)[0]
    return out, by_channel @ weight.T, round_trip(cached, (128, 1), power_of_two=pow2)[0].T @ by_token


def close(got, want, tolerance=3e-6):
    """Within float32's accumulation error, as a share of the largest value."""
    want = torch.as_tensor(want)
    assert (got.detach().double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens, inner, out", [(300, 200, 150), (1, 64, 32), (256, 384, 128)])
def test_linear_multiplies_rounded_operands_in_all_three_products(name, tokens, inner, out):
    layer = fp8_linear(inner, out, FORMS[name])
    x, grad = matrix(tokens, inner, seed=1).requires_grad_(), matrix(tokens, out, 1e-3, seed=2)
    y = layer(x)
    y.backward(grad)
    want = three_products(x.detach().numpy(), layer.weight.detach().numpy().T, grad.numpy(), FORMS[name])
    close(y, want[0])
    close(x.grad, want[1])
    close(layer.weight.grad, want[2].T)


def test_linear_keeps_leading_dimensions_and_number_format():
    layer = fp8_linear(64, 32)
    x = matrix(30, 64).view(2, 3, 5, 64)
    assert torch.equal(layer(x), layer(x.view(-1, 64)).view(2, 3, 5, 32))
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x.double()).dtype == torch.float64
    assert layer(x[:0]).shape == (0, 3, 5, 32)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), want)


def test_weight_gradients_add_up_in_float32():
    layer = fp8_linear(64, 32)
    x = matrix(128, 64).bfloat16()
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    layer(x).sum().backward()
    assert once.dtype == torch.float32 and torch.equal(layer.weight.grad, 2 * once)


def expert_layer(tokens=70, experts=5, dim=144, inner_dim=136):
    config = NANO.replace(
        hidden_size=dim, moe_intermediate_size=inner_dim, n_routed_experts=experts, n_group=1, topk_group=1
    )
    plain = Experts(config)
    for weight in plain.parameters():
        weight.data.normal_(0, weight.shape[1] ** -0.5)
    scores = torch.rand(1, tokens, experts)
    scores[..., 3] = -1  # an expert that nobody reads
    chosen = scores.topk(2).indices
    weights = torch.rand(1, tokens, 2).requires_grad_()
    x = (matrix(tokens, dim, seed=1) * 3)[None].requires_grad_()
    return plain, in_fp8(copy.deepcopy(plain)), x, Routing(chosen, weights, scores)


def swiglu(gate, up, weight):
    return gate / (1 + torch.exp(-gate)) * up * weight


def test_experts_equal_a_loop_over_experts_in_all_gradients():
    _, layer, x, routing = expert_layer()
    grad = matrix(70, 144, 1e-2, seed=5)
    layer(x, routing).backward(grad[None])

    rows, w = x.detach()[0].double(), {name: p.detach().double() for name, p in layer.named_parameters()}
    out, grad_x, grad_weights = (torch.zeros(70, width, dtype=torch.float64) for width in (144, 144, 2))
    grads = {name: torch.zeros_like(p) for name, p in w.items()}
    sent, combined = Casting(power_of_two=True), Casting(gradient_sent_in_fp8=True)
    for e in range(5):
        token, place = (routing.experts[0] == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        mine, weight = rows[token], routing.weights.detach()[0, token, place, None].double()
        gate = three_products(mine, w["gate_proj"][e], np.zeros((len(token), 136)), sent)[0]
        up = three_products(mine, w["up_proj"][e], np.zeros((len(token), 136)), sent)[0]
        gate, up = (torch.tensor(np.float32(t)).double() for t in (gate, up))
        inner = swiglu(gate, up, weight).float().double()
        y, grad_inner, grads["down_proj"][e] = map(
            torch.as_tensor, three_products(inner, w["down_proj"][e], grad[token], combined)
        )
        out.index_add_(0, token, y)
        cached = [torch.tensor(round_trip(t, (1, 128))[0]) for t in (gate, up)]
        inputs = [t.requires_grad_() for t in (*cached, weight)]
        grad_gate, grad_up, grad_weight = torch.autograd.grad(swiglu(*inputs), inputs, grad_inner)
        grad_weights[token, place] = grad_weight[:, 0]
        for name, g in (("gate_proj", grad_gate), ("up_proj", grad_up)):
            _, to_x, grads[name][e] = map(torch.as_tensor, three_products(mine, w[name][e], g.float(), sent))
            grad_x.index_add_(0, token, to_x)

    # A last bit of difference in what is rounded again may put single values on the next E4M3 number.
    for got, want in (
        (layer(x, routing)[0], out),
        (x.grad[0], grad_x),
        (routing.weights.grad[0], grad_weights),
        *((p.grad, grads[name]) for name, p in layer.named_parameters()),
    ):
        close(got, want, 1e-3)
        assert ((got.double() - want).abs() <= 3e-6 * want.abs().max()).double().mean() > 0.98


def test_few_tokens_without_gradient_see_the_same_experts():
    _, layer, x, routing = expert_layer(tokens=2)
    want = layer(x, routing)
    with torch.no_grad():
        assert torch.equal(layer(x, routing), want)


def test_tokens_of_an_expert_do_not_touch_another_experts_weight_gradient():
    _, layer, x, routing = expert_layer()
    grads = []
    for factor in (1.0, 1000.0):
        layer.zero_grad()
        scaled = x.detach().clone()
        only = Routing(routing.experts[..., :1], routing.weights[..., :1].detach(), routing.scores)
        scaled[0, only.experts[0, :, 0] == 0] *= factor
        layer(scaled, only).backward(torch.ones(1, 70, 144))
        grads.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name in grads[0]:
        first = only.experts[0, :, 0]
        others = [e for e in range(1, 5) if (first == e).any()]
        assert len(others) >= 3 and torch.equal(grads[0][name][others], grads[1][name][others])
        assert not torch.equal(grads[0][name][0], grads[1][name][0])


@pytest.mark.parametrize("casting, cached", [(Casting(), torch.float8_e4m3fn), (AFTER_ATTENTION, torch.float16)])
def test_what_waits_for_the_backward_pass_is_fp8_and_e5m6_after_attention(casting, cached):
    layer, saved = fp8_linear(256, 128, casting), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(matrix(128, 256))
    assert [(t.dtype, tuple(t.shape)) for t in saved] == [
        (cached, (128, 256)), (torch.float32, (128, 2)), (torch.float8_e4m3fn, (256, 128)), (torch.float32, (2, 1)),
    ]  # fmt: skip


# Tensor cores ------------------------------------------------------------------------------------------------------


def library(a, b, a_scale, a_recipe, b_scale, b_recipe, output_dtype):
    """What PyTorch demands of a product with V3's scales, and the product by its definition, in float64."""
    (m, k), (_, n) = a.shape, b.shape
    ceil = math.ceil
    assert a.dtype == b.dtype == torch.float8_e4m3fn and output_dtype == torch.float32
    assert a.is_contiguous() and b.mT.is_contiguous() and m % 16 == k % 16 == n % 16 == 0
    assert a_recipe == F.ScalingType.BlockWise1x128 and a_scale.shape == (m, ceil(k / 128))
    in_rows = b_recipe == F.ScalingType.BlockWise1x128
    assert in_rows or b_recipe == F.ScalingType.BlockWise128x128
    assert b_scale.shape == ((n, ceil(k / 128)) if in_rows else (ceil(k / 512) * 4, ceil(n / 128)))
    for scale in (a_scale, b_scale):
        assert scale.dtype == torch.float32 and scale.stride(0) == 1
        assert scale.stride(1) == scale.shape[0] or scale.stride() == (1, 1) and scale.shape[1] == 1
    b_scales = b_scale.T if in_rows else b_scale[: ceil(k / 128)]
    b_values = b.double() * torch.tensor(per_element(b_scales, (128, 1 if in_rows else 128), (k, n)))
    return ((a.double() * torch.tensor(per_element(a_scale, (1, 128), (m, k)))) @ b_values).to(output_dtype)


@pytest.fixture
def tensor_cores(monkeypatch):
    """The path of a Hopper GPU, with PyTorch's kernel replaced by its definition."""
    monkeypatch.setattr(fp8_cuda.F, "scaled_mm", library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choose = fp8_cuda.kernel
    monkeypatch.setattr(fp8_cuda, "kernel", lambda _: choose(torch.device("cuda")))


@pytest.mark.parametrize("b_tile", [(128, 128), (128, 1)])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (16, 128, 16), (130, 300, 200), (3, 640, 129), (0, 5, 3), (4, 0, 3)])
def test_the_product_on_tensor_cores_meets_the_demands_of_the_library_at_any_size(tensor_cores, m, k, n, b_tile):
    a, b = Rounded.of(matrix(m, k, seed=1), (1, 128)), Rounded.of(matrix(k, n, seed=2), b_tile)
    got = fp8_cuda.multiply(a, b)
    torch.testing.assert_close(got, (a.values().double() @ b.values().double()).float())


@pytest.mark.parametrize("casting", FORMS.values(), ids=FORMS)
def test_a_layer_on_tensor_cores_equals_the_emulated_one(tensor_cores, monkeypatch, casting):
    def products(x, weight):
        layer = fp8_linear(300, 200, casting)
        layer.weight.data, x = weight, x.clone().requires_grad_()
        out = layer(x)
        out.backward(matrix(70, 200, seed=3))
        return out, x.grad, layer.weight.grad

    x, weight = matrix(70, 300, seed=1), matrix(200, 300, seed=2)
    on_tensor_cores = products(x, weight)
    monkeypatch.setattr(fp8_cuda, "kernel", lambda *_: None)
    for got, want in zip(on_tensor_cores, products(x, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4 * want.abs().max().item())


def test_experts_on_tensor_cores_equal_the_emulated_ones(tensor_cores, monkeypatch):
    results = []
    for on_tensor_cores in (True, False):
        if not on_tensor_cores:
            monkeypatch.setattr(fp8_cuda, "kernel", lambda *_: None)
        torch.manual_seed(0)
        _, layer, x, routing = expert_layer()
        out = layer(x, routing)
        out.backward(torch.ones_like(out))
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
    for got, want in zip(*results, strict=True):
        # sums in another order may put single values on the next E4M3 number
        assert ((got - want).abs() <= 3e-6 * want.abs().max()).double().mean() > 0.98
        close(got, want, 1e-3)


def test_the_report_names_the_path_of_each_layer(tensor_cores):
    model = build(dtype=torch.float32)
    convert_to_fp8(model)
    assert set(model.precision_report().values()) == {"float32", "E4M3, on tensor cores (scaled_mm)"}


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("rows", [256, 70])
def test_a_hopper_gpu_computes_what_the_emulation_does(rows):
    """The tensor core's own sums are narrower: the bound is that of `gemm`."""
    a, b = Rounded.of(matrix(rows, 1024, seed=1), (1, 128)), Rounded.of(matrix(1024, 384, seed=2), (128, 128))
    want, size = exact((a.q, a.scale), (b.q, b.scale))
    got = fp8_cuda.multiply(*(Rounded(x.q.cuda(), x.scale.cuda(), x.tile) for x in (a, b))).cpu().double()
    assert ((got - want).abs() <= (36 / 8192 + 2**-20) * size).all()
    layers = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        layer = fp8_linear(1024, 384).to(device)
        x = matrix(rows, 1024, seed=1).to(device).requires_grad_()
        layer(x).backward(matrix(rows, 384, seed=3).to(device))
        layers.append((layer.computes_in, [t.cpu() for t in (layer(x), x.grad, layer.weight.grad)]))
    assert [path for path, _ in layers] == ["E4M3, on tensor cores (scaled_mm)", "E4M3, emulated in float32"]
    for got, want in zip(layers[0][1], layers[1][1], strict=True):
        assert (got - want).norm() < 0.01 * want.norm()


# The model ---------------------------------------------------------------------------------------------------------


def test_conversion_keeps_parameters_and_what_v3_keeps_precise():
    model = build(dtype=torch.float32)
    before, order = dict(model.named_parameters()), list(model.state_dict())
    convert_to_fp8(model)
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == order and all(after[name] is before[name] for name in before)
    report = model.precision_report()
    assert report.keys() == {name.rpartition(".")[0] for name in before}
    kept = {name for name, precision in report.items() if precision == "float32"}
    assert kept == {name for name in report if "norm" in name or name in ("embedding", "head")
                    or name.endswith((".router", "q_proj.1"))}  # fmt: skip
    assert {report[name] for name in report.keys() - kept} == {"E4M3, emulated in float32"}
    assert model.layers[1].attention.o_proj.casting == AFTER_ATTENTION
    assert model.layers[1].attention.kv_down_proj.casting == Casting()


def test_conversion_back_is_exact():
    model, tokens = build(dtype=torch.float32), random_tokens(2, 12)
    want = model(tokens, mtp=True)
    convert_to_fp8(model)
    assert not torch.equal(model(tokens).logits, want.logits)
    convert_from_fp8(model)
    got = model(tokens, mtp=True)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.mtp_logits[0], want.mtp_logits[0])
    assert set(model.precision_report().values()) == {"float32"}


def test_conversion_can_be_partial_and_refuses_half_precision():
    model = build(dtype=torch.float32)
    convert_to_fp8(model, where=lambda name: name.startswith("layers.0."))
    converted = {name for name, precision in model.precision_report().items() if precision != "float32"}
    assert converted and all(name.startswith("layers.0.") for name in converted)
    model = build(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="weights are torch.bfloat16"):
        convert_to_fp8(model)
    assert not any(isinstance(module, Fp8Linear | Fp8Experts) for module in model.modules())


def test_gradients_of_a_whole_model_point_where_float32_does():
    every_expert = NANO.replace(num_experts_per_tok=8, topk_group=4)  # no choice that rounding could change
    model, tokens = build(every_expert, dtype=torch.float32), random_tokens(8, 65)

    def loss_and_gradient():
        model.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want_loss, want = loss_and_gradient()
    convert_to_fp8(model)
    loss, got = loss_and_gradient()
    assert got.keys() == want.keys() and loss == pytest.approx(want_loss, rel=0.01)
    for name in want:
        assert F.cosine_similarity(got[name].flatten(), want[name].flatten(), dim=0) > 0.97, name


def test_a_run_in_fp8_resumes_bit_for_bit(tmp_path):
    def trainer():
        model = nano()
        convert_to_fp8(model)
        return Trainer(model, counting_data(), replace(RECIPE, steps=2, checkpoint_every=1))

    history = trainer().run(directory=tmp_path, progress=False)
    resumed = trainer()
    resumed.load(tmp_path / "checkpoints" / "step-00000001")
    for want in history[1:]:
        got = resumed.train_step()
        assert all(got[key] == want[key] for key in ("step", "loss", "mtp_loss", "gradient_norm", "max_violation"))


def test_an_fp8_model_is_exported_and_its_weights_load_as_fp8(tmp_path):
    """`weight_scale_inv` is the scale of `quantize`; the loader's own dequantisation agrees with `dequantize`."""
    model = build(NANO.replace(hidden_size=192, moe_intermediate_size=160), dtype=torch.float32)
    convert_to_fp8(model)
    save_pretrained(model, tmp_path)
    for name, parameter in load_pretrained(tmp_path).named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])

    tensors, want = load_file(tmp_path / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if "_proj" in name:
            tensors[name], scale = quantize(weight, (128, 128))
            tensors[f"{name}_scale_inv"] = scale
            want[name] = dequantize(tensors[name], scale, (128, 128))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_pretrained(tmp_path)
    assert torch.equal(loaded.layers[0].attention.o_proj.weight, want["model.layers.0.self_attn.o_proj.weight"])
    assert torch.equal(loaded.layers[1].ffn.experts.up_proj[3].T, want["model.layers.1.mlp.experts.3.up_proj.weight"])
    error = loaded.layers[0].attention.o_proj.weight - model.layers[0].attention.o_proj.weight
    assert 0 < error.abs().max() <= 2**-4 * model.layers[0].attention.o_proj.weight.abs().max()
