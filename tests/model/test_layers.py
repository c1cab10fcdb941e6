"""RMSNorm, SwiGLU, the rotation and YaRN, against the formulas in float64 and the numbers of FACTS.md section 2.2."""

import math

import plain_model as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.config import ModelConfig, YaRN
from minids.model.layers import RMSNorm, SwiGLU
from minids.model.rope import rotary_frequencies, rotate, rotations, softmax_scale, yarn_ramp_bounds

CPU = torch.device("cpu")
V3 = ModelConfig.preset("v3")


def norm_with_weight(dim=6, eps=1e-6, dtype=torch.float64):
    norm = RMSNorm(dim, eps)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm.to(dtype)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_rms_norm_is_its_formula(needs_gradient, size):
    norm, x = norm_with_weight(), size * plain.random_stream(2, 3, 6)
    got = norm(x.clone().requires_grad_(needs_gradient))
    for vector, out in zip(x.flatten(0, 1), got.flatten(0, 1), strict=True):
        torch.testing.assert_close(out, plain.rms_norm(vector, norm.weight, 1e-6))


def test_rms_norm_epsilon_stands_inside_the_root():
    norm = RMSNorm(4, eps=3.0).double()
    x = torch.ones(1, 1, 4, dtype=torch.float64)
    expected = torch.full_like(x, 0.5)  # 1 / sqrt(1 + 3)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x.requires_grad_()), expected)


def test_rms_norm_gradient_passes_gradcheck():
    norm, x = norm_with_weight(), plain.random_stream(2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rms_norm_gradient_is_autograds_gradient_of_the_formula(dtype, tolerance):
    norm, x = norm_with_weight(16, 1e-2, dtype), plain.random_stream(2, 5, 16, dtype=dtype).requires_grad_()
    weigh = plain.random_stream(2, 5, 16, seed=9, dtype=dtype)
    got = torch.autograd.grad((norm(x) * weigh).sum(), (x, norm.weight))
    want = torch.autograd.grad((plain.rms_norm_differentiable(x, norm.weight, 1e-2) * weigh).sum(), (x, norm.weight))
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_rms_norm_leaves_its_input_alone_in_both_directions():
    norm, x = norm_with_weight(), plain.random_stream(2, 3, 6).requires_grad_()
    before, grad = x.detach().clone(), plain.random_stream(2, 3, 6, seed=4)
    grad_before = grad.clone()
    norm(x).backward(grad)
    assert torch.equal(x, before) and torch.equal(grad, grad_before)


def test_swiglu_is_its_formula_and_has_no_bias():
    ffn = SwiGLU(6, 10).double()
    assert [name for name, _ in ffn.named_parameters()] == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    x, w = plain.random_stream(2, 3, 6), dict(ffn.named_parameters())
    want = torch.stack([plain.swiglu(w, v) for v in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(ffn(x), want)


def turned(vector, position, yarn=None, dtype=torch.float64, theta=10000.0):
    """One vector at one position, through the package."""
    config = plain.NANO.replace(rope_theta=theta, rope_scaling=yarn)
    rotation = rotations(config, torch.tensor([[position]]), len(vector), dtype)
    return rotate(vector.view(1, 1, 1, -1), rotation).flatten()


def test_rotation_turns_pair_2i_2i_plus_1_by_position_times_its_frequency():
    dim = 8
    for i in range(dim // 2):
        angle = 3 * 10000.0 ** (-2 * i / dim)
        first, second = torch.zeros(2, dim, dtype=torch.float64)
        first[2 * i], second[2 * i + 1] = 1, 1
        want_first, want_second = torch.zeros(2, dim, dtype=torch.float64)
        want_first[2 * i], want_first[2 * i + 1] = math.cos(angle), math.sin(angle)
        want_second[2 * i], want_second[2 * i + 1] = -math.sin(angle), math.cos(angle)
        torch.testing.assert_close(turned(first, 3), want_first)
        torch.testing.assert_close(turned(second, 3), want_second)


@settings(deadline=None, max_examples=25)
@given(m=st.integers(0, 3000), n=st.integers(0, 3000), shift=st.integers(0, 1000), yarn=st.booleans())
def test_scores_see_only_how_far_apart_two_positions_are(m, n, shift, yarn):
    yarn = YaRN(original_max_position_embeddings=64) if yarn else None
    q, k = plain.random_stream(2, 8)
    score = turned(q, m, yarn) @ turned(k, n, yarn)
    torch.testing.assert_close(turned(q, m + shift, yarn) @ turned(k, n + shift, yarn), score, atol=1e-9, rtol=0)
    torch.testing.assert_close(turned(q, m, yarn).norm(), q.norm())


@pytest.mark.parametrize("yarn", [None, YaRN(original_max_position_embeddings=64), YaRN(mscale=0.5)])
def test_rotation_is_the_plain_one_and_nothing_at_position_0(yarn):
    x = plain.random_stream(8)
    for position in (0, 1, 7, 1000):
        torch.testing.assert_close(turned(x, position, yarn), plain.turn(x, position, 10000.0, yarn))
    if yarn is None:
        assert torch.equal(turned(x, 0), x)


def test_half_precision_is_turned_in_float32_and_comes_back_in_half_precision():
    x = plain.random_stream(8).bfloat16()
    out = turned(x, 1001, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    want = plain.turn(x.double(), 1001, 10000.0, None)
    torch.testing.assert_close(out.double(), want, atol=0, rtol=2**-8)  # one rounding to bfloat16, nothing more


def test_yarn_ramp_of_v3_runs_from_pair_10_to_pair_23():
    assert yarn_ramp_bounds(64, 10000.0, V3.rope_scaling) == (10, 23)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones_by_40():
    plain_frequency = rotary_frequencies(64, 10000.0, None, CPU)
    stretched = rotary_frequencies(64, 10000.0, V3.rope_scaling, CPU)
    assert torch.equal(stretched[:11], plain_frequency[:11])
    torch.testing.assert_close(stretched[23:], plain_frequency[23:] / 40, atol=0, rtol=1e-12)
    part = (14 - 10) / 13  # pair 14 on the ramp
    want = plain_frequency[14] * (1 - part) + plain_frequency[14] / 40 * part
    torch.testing.assert_close(stretched[14], want, atol=0, rtol=1e-12)
    assert (stretched.diff() < 0).all() and stretched.dtype == torch.float64


@pytest.mark.parametrize("dim, length, factor", [(8, 64, 4.0), (64, 4096, 40.0), (16, 4, 2.0), (6, 100000, 8.0)])
def test_yarn_frequencies_are_the_plain_ones(dim, length, factor):
    yarn = YaRN(factor=factor, original_max_position_embeddings=length)
    low, high = yarn_ramp_bounds(dim, 10000.0, yarn)
    if high > low:
        want = torch.tensor(plain.frequencies(dim, 10000.0, yarn), dtype=torch.float64)
        torch.testing.assert_close(rotary_frequencies(dim, 10000.0, yarn, CPU), want)
    assert rotary_frequencies(dim, 10000.0, yarn, CPU).isfinite().all()


def test_softmax_scale_of_v3_is_the_published_one():
    assert softmax_scale(V3.qk_head_dim, None) == pytest.approx(0.0721688, abs=5e-8)
    assert softmax_scale(V3.qk_head_dim, V3.rope_scaling) == pytest.approx(0.1352338, abs=5e-8)


def test_softmax_scale_takes_mscale_all_dim_and_the_rotation_the_ratio():
    yarn = YaRN(factor=10.0, mscale=0.7, mscale_all_dim=0.5)
    assert softmax_scale(16, yarn) == pytest.approx(0.25 * (0.05 * math.log(10) + 1) ** 2)
    config = plain.NANO.replace(rope_scaling=yarn)
    sizes = rotations(config, torch.tensor([[0, 5]]), 8, torch.float64).abs()
    want = (0.07 * math.log(10) + 1) / (0.05 * math.log(10) + 1)
    torch.testing.assert_close(sizes, torch.full_like(sizes, want))
    for name in ("v3", "v2", "v2_lite"):  # the released models keep the rotation a pure one
        sizes = rotations(ModelConfig.preset(name), torch.tensor([[0, 5]]), 64, torch.float64).abs()
        torch.testing.assert_close(sizes, torch.ones_like(sizes))


def test_frequencies_first_asked_for_in_inference_can_be_trained_with():
    rotary_frequencies.cache_clear()
    model = plain.build(dtype=torch.float32)
    with torch.inference_mode():
        model(plain.random_tokens(1, 4))
    model(plain.random_tokens(1, 4)).logits.sum().backward()
