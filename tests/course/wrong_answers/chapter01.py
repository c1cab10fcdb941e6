"""Wrong answers to the exercises of chapter 01."""

import math

import torch
from torch.nn import functional as F

from minids.course.exercises.chapter01 import attend, cache_bytes, decode_step, rms_norm, rotate, to_halves

RECOGNISED = "this is what comes out when {}"


def norm_in_place(x, weight, eps):
    return x.mul_(torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)) * weight


def norm_without_keepdim(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1) + eps) * weight


def norm_centred_with_eps_outside(x, weight, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def rotate_with_cat(x, positions, theta, sign=1):
    dim = x.shape[-1]
    angle = sign * positions[:, None, None] * theta ** (-torch.arange(0, dim, 2) / dim)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def rotate_by_one_frequency(x, positions, theta):
    angle = (positions / theta)[:, None, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)


def attend_ready_made(query, key, value):
    new, slots = query.shape[1], key.shape[1]
    mask = torch.ones(new, slots, dtype=torch.bool).tril(slots - new)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def attend_is_causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def attend_twice_wrong(query, key, value):
    key, value = (x.repeat_interleave(len(query) // len(key), 0) for x in (key, value))
    scores = query @ key.mT
    mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ value


def attend_masked_after_the_softmax(query, key, value):
    key, value = (x.repeat_interleave(len(query) // len(key), 0) for x in (key, value))
    p = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
    return p.tril(key.shape[1] - query.shape[1]) @ value


def attend_without_itself(query, key, value):
    return attend(query, key, value, diagonal=lambda new, slots: slots - new - 1)


def decode_step_value_first(x, cache, *weights):
    out, longer = decode_step(x, cache, *weights)
    return out, torch.cat((longer[:, :, -1:], longer[:, :, :-1]), 2)


def cache_bytes_as_float(config, tokens, bits):
    return 2 * config.num_key_value_heads * config.v_head_dim * config.num_hidden_layers * tokens * bits / 8


def only_the_first_token(attend):
    query, key, value = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.allclose(attend(query, key, value)[:, 0], value[:, 0])


def only_the_shape(attend):
    assert attend(torch.randn(4, 2, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)).shape == (4, 2, 8)


def expects_bit_equality_with_sums(attend):
    value = torch.eye(3)[None]
    assert torch.equal(attend(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), value).sum(-1), torch.full((1, 3), 1.1))


def expects_a_square_mask(attend):
    query, key, value = torch.randn(1, 1, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    assert torch.allclose(attend(query, key, value), value[:, :1])


WRONG = {
    "1.1": [
        ("in place", norm_in_place, "your code changed the argument `x`; return a new value instead"),
        ("no keepdim", norm_without_keepdim, "your code raised RuntimeError"),
        ("float64", lambda *a: rms_norm(*a).double(), "should be of torch.float32, got torch.float64"),
        ("a list", lambda *a: rms_norm(*a).tolist(), "the result should be a tensor, got"),
        (
            "two mistakes: centred, eps outside",
            norm_centred_with_eps_outside,
            "the mean is subtracted first, as in LayerNorm and eps is added to the root instead of under it",
        ),
        ("torch's layer_norm", lambda x, w, eps: F.layer_norm(x, w.shape, w, None, eps), "as in LayerNorm"),
        ("eps squared", lambda x, w, eps: rms_norm(x, w, eps**2), r"the result: \d+ of \d+ values differ"),
    ],
    "1.2": [
        ("cat for stack", rotate_with_cat, "then concatenated"),
        (
            "cat, and clockwise",
            lambda x, p, t: rotate_with_cat(x, p, t, -1),
            "not interleaved and the pairs are rotated",
        ),
        ("one frequency", rotate_by_one_frequency, r"on example 2 of 4|values differ"),
        ("without flatten", lambda *a: rotate(*a).unflatten(-1, (-1, 2)), r"should have shape \(2, 1, 2\), got"),
        ("positions from 1", lambda x, p, t: rotate(x, p + 1, t), "every position is one too large"),
        ("complex result", lambda *a: rotate(*a) + 0j, "should be of torch.float32, got torch.complex64"),
    ],
    "1.3": [
        (
            "two mistakes: whole matrix, wrong way",
            lambda w, heads: to_halves(w, 1, order="(h pair i) d -> (h i pair) d"),
            "not from each head and the reordering goes the other way",
        ),
        ("nothing done", lambda weight, heads: weight, "values differ"),
        ("heads apart", lambda w, heads: to_halves(w, heads).unflatten(0, (heads, -1)), "should have shape"),
        ("a list of rows", lambda w, heads: list(to_halves(w, heads)), "the result should be a tensor"),
        ("halves swapped", lambda w, heads: torch.cat((w[1::2], w[0::2])), "and the odd rows come first"),
    ],
    "1.4": [
        ("torch's own attention", attend_ready_made, "the result is correct, but it calls torch's scaled_dot_product"),
        ("is_causal", attend_is_causal, "the mask of a chunk begins at column 0"),
        ("two mistakes: no scale, square mask", attend_twice_wrong, "root of dim and the mask of a chunk begins"),
        ("masked after the softmax", attend_masked_after_the_softmax, "example 1 of 4.*\n.*values differ"),
        ("a token does not see itself", attend_without_itself, r"got nan"),
        ("heads last", lambda *a: attend(*a).transpose(0, 1), "should have shape"),
    ],
    "1.5": [
        ("the entry goes in front", decode_step_value_first, "the new cache: .* values differ"),
        ("the output only", lambda *a: decode_step(*a)[0], "should be a tuple of 2: the output, the new cache"),
        (
            "two mistakes: position, unrotated key",
            lambda *a: decode_step(*a, shift=-1, turn_key=False),
            RECOGNISED.format("the new token gets the position of the last cached one and the new key is cached"),
        ),
        (
            "the old cache",
            lambda x, cache, *w: (decode_step(x, cache, *w)[0], cache),
            "the new cache should have shape",
        ),
        ("position one too far", lambda *a: decode_step(*a, shift=1), "the output: .*values differ"),
    ],
    "1.6": [
        ("a float", cache_bytes_as_float, "the value is correct, but return an int, not a float"),
        ("a tensor", lambda *a: torch.tensor(cache_bytes(*a)), "but return an int, not a tensor"),
        ("without the last token", lambda c, t, b: cache_bytes(c, t - 1, b), r"the result: got 0, expected 516096"),
        ("whole bytes a value", lambda c, t, b: cache_bytes(c, t, 1) * (b // 8) * 8, "example 4 of 4"),
        (
            "two mistakes: one layer, keys only",
            lambda c, t, b: cache_bytes(c, t, b) // (2 * c.num_hidden_layers),
            RECOGNISED.format("the layers are left out and only keys are counted, or only values"),
        ),
    ],
    "1.7": [
        ("first token, equal heads", only_the_first_token, "it misses a bug; hint: call it on a whole sequence"),
        ("the shape", only_the_shape, "it accepts everything so far"),
        ("too strict", expects_bit_equality_with_sums, "it rejects the correct implementation"),
        ("a bug as the rule", expects_a_square_mask, "it rejects the correct implementation"),
        ("no assert", lambda attend: attend(*torch.randn(3, 2, 2, 2)), "a test needs an assert that can fail"),
    ],
}
