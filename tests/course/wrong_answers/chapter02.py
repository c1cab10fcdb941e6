"""Wrong answers to the exercises of chapter 02."""

import math

import torch
import torch.nn.functional as F

from minids.course.exercises.chapter02 import (
    attend_absorbed,
    change_base,
    compress,
    decode_step,
    step_milliseconds,
)


def compress_rows(h, w, rank):
    u, sizes, directions = torch.linalg.svd(h @ w.T, full_matrices=False)
    return (u[:, :rank] * sizes[:rank]) @ directions[:rank]


def compress_by_scale(h, w, rank):
    directions = torch.linalg.svd(h @ w.T, full_matrices=False).Vh
    return directions[:rank].T @ (directions[:rank] @ w) / 2


def compress_both(h, w, rank):
    return compress(h, compress(h, w, rank, spread=lambda h, w: w.T), rank)


def expanded(query, entries, up, temperature=1.0):
    heads, rank = len(query), up.shape[1]
    rope = entries.shape[1] - rank
    nope = query.shape[1] - rope
    latent, key_rope = entries[:, :rank], entries[:, rank:]
    both = (latent @ up.T).unflatten(-1, (heads, -1))  # slots, heads, nope + value
    keys = torch.cat((both[..., :nope], key_rope[:, None].expand(-1, heads, -1)), -1)
    scores = torch.einsum("hd,shd->hs", query, keys) * temperature**2 / math.sqrt(nope + rope)
    return torch.einsum("hs,shv->hv", scores.softmax(-1), both[..., nope:])


def expanded_head_by_head(query, entries, up, temperature=1.0):
    heads, rank = len(query), up.shape[1]
    rope = entries.shape[1] - rank
    nope = query.shape[1] - rope
    out = []
    for q, head in zip(query, up.chunk(heads), strict=True):
        keys = torch.cat((entries[:, :rank] @ head[:nope].T, entries[:, rank:]), -1)
        p = (temperature**2 * (keys @ q) / math.sqrt(nope + rope)).softmax(0)
        out.append(p @ (entries[:, :rank] @ head[nope:].T))
    return torch.stack(out)


def expanded_values(query, entries, up, temperature=1.0):
    heads, rank = len(query), up.shape[1]
    rope = entries.shape[1] - rank
    nope = query.shape[1] - rope
    latent, per_head = entries[:, :rank], up.unflatten(0, (heads, -1))
    content = torch.einsum("hn,hnr->hr", query[:, :nope], per_head[:, :nope]) @ latent.T
    scores = (content + query[:, nope:] @ entries[:, rank:].T) * temperature**2 / math.sqrt(nope + rope)
    return torch.stack([p @ (latent @ w.T) for p, w in zip(scores.softmax(-1), per_head[:, nope:], strict=True)])


def base_by_channels(dim, theta, factor, original):
    power = -torch.arange(dim // 2, dtype=torch.float64) / dim
    return (theta * factor ** (dim / (dim - 2))) ** power, change_base(dim, theta, factor, original)[1]


def base_found_for_a_pair_too_many(dim, theta, factor, original):
    return change_base(
        dim, theta, factor, original, base=lambda dim, theta, factor: theta * factor ** (dim / (dim - 4))
    )


def step_with_the_entry_first(h, cache, w, rotation):
    out, longer = decode_step(h, cache, w, rotation)
    return out, longer.roll(1, 0)


def _entry(make_entry, latent, key):
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1]])
    return make_entry(torch.cat((latent, key), -1), torch.eye(10), torch.ones(6), torch.polar(angles * 0 + 1, angles))


def only_the_width(make_entry):
    assert _entry(make_entry, torch.randn(2, 6), torch.randn(2, 4)).shape == (2, 10)


def only_the_latent(make_entry):
    latent = torch.randn(2, 6)
    got = _entry(make_entry, latent, torch.randn(2, 4))[:, :6]
    assert torch.allclose(got, F.rms_norm(latent, (6,), None, 1e-6), atol=1e-6)


def expects_a_key_without_rotation(make_entry):
    key = torch.randn(2, 4)
    assert torch.allclose(_entry(make_entry, torch.randn(2, 6), key)[:, 6:], key)


def expects_one_norm_for_all(make_entry):
    got = _entry(make_entry, torch.randn(2, 6), torch.randn(2, 4))
    assert torch.allclose(got.square().mean(-1), torch.ones(2), atol=1e-4)


def _compared(heads, slots, temperature, rope=2, tolerance=1e-4):
    def test(attend):
        arguments = torch.randn(heads, 3 + rope), torch.randn(slots, 6 + rope), torch.randn(heads * 7, 6), temperature
        assert torch.allclose(attend(*arguments), expanded(*arguments), atol=tolerance)

    return test


def expects_the_order_of_slots_to_matter(attend):
    query, entries, up = torch.randn(2, 5), torch.randn(4, 8), torch.randn(14, 6)
    assert not torch.allclose(attend(query, entries, up, 1.3), attend(query, entries.flip(0), up, 1.3), atol=1e-5)


WRONG = {
    "2.1": [
        ("the outputs instead of the matrix", compress_rows, "the result should have shape"),
        ("half of it", compress_by_scale, "example 1 of 3.*\n.*values differ"),
        ("two cuts", compress_both, "example 1 of 3.*\n.*values differ"),
        ("the factors", lambda h, w, r: torch.linalg.svd(h @ w.T).Vh[:r], "should have shape"),
        (
            "two mistakes: centred, one direction too many",
            lambda h, w, r: compress(h, w, r + 1, centred=True),
            "the outputs are centred first and one direction too many is kept",
        ),
        ("the matrix", lambda h, w, r: w, "example 1 of 3.*\n.*values differ"),
    ],
    "2.2": [
        (
            "expanded for all heads",
            expanded,
            "the result is correct, but it makes a tensor of .* elements; keys or values of one head for 200 slots",
        ),
        (
            "expanded head by head",
            expanded_head_by_head,
            "the result is correct, but it makes a tensor of 8800 elements",
        ),
        ("only the values expanded", expanded_values, "the result is correct, but it makes a tensor of 6400 elements"),
        ("no temperature", lambda q, e, u, t: attend_absorbed(q, e, u), "the temperature is not used"),
        ("root of nope", lambda *a: attend_absorbed(*a, width=lambda n, r, k: n), "the scale is the root of nope only"),
        (
            "two mistakes: no scale, temperature not squared",
            lambda *a: attend_absorbed(*a, width=lambda n, r, k: 1, power=(1, 1)),
            "comes out when there is no scale and the temperature is not squared",
        ),
        ("all heads side by side", lambda *a: attend_absorbed(*a).flatten(), r"should have shape \(2, 4\), got \(8,\)"),
        (
            "a slot is left out",
            lambda q, e, u, t: attend_absorbed(q, e[:-1], u, t),
            "example 1 of 5.*\n.*values differ",
        ),
    ],
    "2.3": [
        ("seconds", lambda *a: step_milliseconds(*a) / 1e3, "the result: got 0.00274946, expected 2.74946"),
        ("everything split", lambda t, g, q: step_milliseconds(t, 1, q) / g, "the cache is split over the GPUs too"),
        (
            "one layer, heads not split",
            lambda t, g, q: step_milliseconds(t, 1, q) / 61,
            "the heads are not split over the GPUs and one layer is counted",
        ),
        ("a multiply-add is one FLOP", lambda t, g, q: step_milliseconds(t, 2 * g, q), "on example 3 of 5"),
        ("8 bits a value", lambda t, g, q: step_milliseconds(t, g, q, entry=288), "on example 1 of 5"),
    ],
    "2.4": [
        (
            "float32",
            lambda *a: (change_base(*a)[0].float(), change_base(*a)[1]),
            "the frequencies should be of torch.float64",
        ),
        (
            "frequencies of all channels",
            lambda *a: (change_base(*a)[0].repeat(2), change_base(*a)[1]),
            r"shape \(32,\), got",
        ),
        ("a pair is one channel wide", base_by_channels, "the frequencies: .* values differ"),
        (
            "the frequencies only",
            lambda *a: change_base(*a)[0],
            "should be a tuple of 2: the frequencies, the slow-down",
        ),
        ("another pair", base_found_for_a_pair_too_many, "the frequencies: .* values differ"),
        (
            "two mistakes: the factor itself, radians",
            lambda *a: change_base(*a, base=lambda dim, theta, factor: theta * factor, turn=1.0),
            "the base is multiplied by the factor and the turns are counted in radians",
        ),
        ("YaRN's answer", lambda *a: (change_base(*a)[0], 1.0), "the slow-down of the fast pairs: got 1"),
    ],
    "2.5": [
        ("the entry goes in front", step_with_the_entry_first, "the cache: .* values differ"),
        ("the output only", lambda *a: decode_step(*a)[0], "should be a tuple of 2: the heads' outputs, the cache"),
        ("the old cache", lambda h, c, w, r: (decode_step(h, c, w, r)[0], c), "the cache should have shape"),
        (
            "two mistakes: query unrotated, itself unseen",
            lambda *a: decode_step(*a, sees_itself=False, turn_query=lambda x, r: x),
            "the new token does not attend to itself and the query is not rotated",
        ),
        ("heads side by side", lambda *a: (decode_step(*a)[0].flatten(), decode_step(*a)[1]), "should have shape"),
    ],
    "2.6": [
        ("only the width", only_the_width, "it misses a bug; hint: change the latent's rows"),
        ("only the latent", only_the_latent, "it misses a bug; hint: double the key's rows"),
        ("too strict: no rotation", expects_a_key_without_rotation, "it rejects the correct implementation"),
        ("too strict: one norm", expects_one_norm_for_all, "it rejects the correct implementation"),
        ("no assert", lambda make_entry: only_the_width, "a test needs an assert that can fail"),
    ],
    "2.7": [
        ("one head", _compared(1, 5, 1.3), "it misses a bug; hint: use two heads or more"),
        ("no temperature", _compared(2, 5, 1.0), "it misses a bug; hint: use one that is not 1, several entries"),
        ("one entry", _compared(2, 1, 1.3), "it misses a bug; hint: use one that is not 1, several entries"),
        ("too tolerant", _compared(2, 5, 1.01, tolerance=10.0), "it accepts everything so far"),
        ("long texts only", _compared(2, 5, 1.3), "it misses a bug; hint: compare with few cached entries too"),
        ("too strict", expects_the_order_of_slots_to_matter, "it rejects the correct implementation"),
    ],
    "2.8": [
        ("four bits", lambda seed: 0.07, "with a cache of 6 bits: median 0.07"),
        ("compared with itself", lambda seed: 0.0, "expected: a median between 0.013 and 0.025"),
        ("eight bits", lambda seed: 0.0042, "median 0.0042"),
        ("a tensor", lambda seed: torch.tensor(0.018), "the function should return a float"),
        ("a percentage", lambda seed: 1.8, "expected: a median between"),
    ],
}
