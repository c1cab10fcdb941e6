"""Wrong answers to the exercises of chapter 01."""

import math

import torch
from torch.nn import functional as F

from minids.course.exercises.chapter01 import attend, cache_bytes, decode_step
from minids.course.exercises.chapter01_rope import rotate, to_neighbours

RECOGNISED = "this is what comes out when {}"


def rotate_with_cat(x, positions, theta, rotary_dim, sign=1):
    angle = sign * positions[:, None, None] * theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    a, b = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.cat((*turned, x[..., rotary_dim:]), -1)


def rotate_by_one_frequency(x, positions, theta, rotary_dim):
    angle = (positions / theta)[:, None, None]
    a, b = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    turned = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)
    return torch.cat((turned, x[..., rotary_dim:]), -1)


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


def cache_bytes_as_float(config, tokens, window, every, bits):
    return cache_bytes(config, tokens, window, every, 1) * float(bits)


def slope(mean_score, seed, widths=(16, 32, 64, 128, 256, 512, 1024)):
    random = torch.Generator().manual_seed(seed)
    points = []
    for width in widths:
        query, noise = torch.randn(2, 1000, width, generator=random)
        points.append((math.log(width), math.log(mean_score(query, noise))))
    x, y = torch.tensor(points).T
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def of_independent_keys(seed):
    return slope(lambda query, noise: (query * noise).sum(-1).abs().mean(), seed)


def of_the_spread(seed):
    return slope(lambda query, noise: (query * (query + noise) / math.sqrt(2)).sum(-1).std(), seed)


def of_divided_scores(seed):
    return slope(lambda query, noise: (query * (query + noise)).sum(-1).mean() / math.sqrt(query.shape[1]), seed)


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
        ("a float", cache_bytes_as_float, "the value is correct, but return an int, not a float"),
        ("a tensor", lambda *a: torch.tensor(cache_bytes(*a)), "but return an int, not a tensor"),
        (
            "the first layer is full",
            lambda c, t, w, e, b: cache_bytes(c, t, w, e, b, full=lambda n, k: n // k + 1),
            "got",
        ),
        ("whole bytes a value", lambda c, t, w, e, b: cache_bytes(c, t, w, e, 8) * (b // 8), "example 4 of 4"),
        (
            "two mistakes: a full window, keys only",
            lambda *a: cache_bytes(*a, shorter=False) // 2,
            RECOGNISED.format("a layer with a window holds a full window .* and only keys are counted"),
        ),
    ],
    "1.2": [
        ("cat for stack", rotate_with_cat, "then concatenated"),
        (
            "cat, and clockwise",
            lambda x, p, t, r: rotate_with_cat(x, p, t, r, -1),
            "not interleaved and the pairs are rotated",
        ),
        ("all channels", lambda x, p, t, r: rotate(x, p, t, x.shape[-1]), "all channels are rotated"),
        ("one frequency", rotate_by_one_frequency, r"values differ"),
        (
            "only the rotated part",
            lambda x, p, t, r: rotate(x, p, t, r)[..., :r],
            r"should have shape \(3, 1, 4\), got",
        ),
        ("positions from 1", lambda x, p, t, r: rotate(x, p + 1, t, r), "values differ"),
        ("complex result", lambda *a: rotate(*a) + 0j, "should be of torch.float32, got torch.complex64"),
    ],
    "1.3": [
        (
            "two mistakes: whole matrix, wrong way",
            lambda w, heads: to_neighbours(w, 1, order="(h i pair) d -> (h pair i) d"),
            "not of each head and the reordering goes the other way",
        ),
        ("nothing done", lambda weight, heads: weight, "values differ"),
        ("heads apart", lambda w, heads: to_neighbours(w, heads).unflatten(0, (heads, -1)), "should have shape"),
        ("a list of rows", lambda w, heads: list(to_neighbours(w, heads)), "the result should be a tensor"),
        ("rows swapped", lambda w, heads: to_neighbours(w, heads, odd_first=True), "the second half comes first"),
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
        ("independent keys", of_independent_keys, r"median 0\.(49|50)"),
        ("the spread of the scores", of_the_spread, r"median 0\.(49|50)"),
        ("scores already divided", of_divided_scores, r"median 0\.(49|50)"),
        ("a tensor", lambda seed: torch.tensor(1.0), "the function should return a float, got"),
        ("another base", lambda seed: of_divided_scores(seed) + 1, "expected: a median between"),
    ],
    "1.7": [
        ("first token, equal heads", only_the_first_token, "it misses a bug; hint: call it on a whole sequence"),
        ("the shape", only_the_shape, "it accepts everything so far"),
        ("too strict", expects_bit_equality_with_sums, "it rejects the correct implementation"),
        ("a bug as the rule", expects_a_square_mask, "it rejects the correct implementation"),
        ("no assert", lambda attend: attend(*torch.randn(3, 2, 2, 2)), "a test needs an assert that can fail"),
    ],
}
