"""Exercises of chapter 2: a cut that follows the data, absorbed attention, a decoding step, and tests that catch bugs.

Everything is for one sequence and one layer. A rotation is a unit complex number per pair of neighbouring channels.
Beyond its arguments, the keywords of a reference change one step of it, for the known mistakes and the planted bugs.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Generator, Tensor

from minids.cost import H800_PEAK_FLOPS
from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises.chapter02_mistakes import (
    ATTEND_MISTAKES,
    BASE_MISTAKES,
    COMPRESS_MISTAKES,
    SECONDS_MISTAKES,
    STEP_MISTAKES,
    across_heads,
    for_each_head,
    from_latent,
    norm,
    normalised,
    rotations,
    split_up,
    turn,
    turn_halves,
)
from minids.course.exercises.mistakes import variants
from minids.course.observation import Observation

Entries = Float[Tensor, "tokens entry"]
Heads = Float[Tensor, "heads value"]
HBM = 3.35e12  # bytes per second of an H800


# 2.1 A cut that follows the data ------------------------------------------------------------------------------------


def compress(
    h: Float[Tensor, "tokens hidden"],
    w: Float[Tensor, "out hidden"],
    rank: int,
    *,
    spread: Callable[[Tensor, Tensor], Tensor] = lambda h, w: h @ w.T,
    centred: bool = False,
    kept: Callable[[Tensor, int], Tensor] = lambda directions, rank: directions[:rank],
    before: bool = False,
) -> Float[Tensor, "out hidden"]:
    """The matrix of rank `rank` whose outputs are nearest to those of `w`: `w`, projected on their main directions."""
    outputs = spread(h, w)
    directions = torch.linalg.svd(outputs - outputs.mean(0) * centred, full_matrices=False).Vh
    directions = kept(directions, rank)
    return w @ directions.T @ directions if before else directions.T @ directions @ w


def compress_examples(g: Generator) -> list[tuple]:
    def example(tokens, hidden, out, rank):
        h = torch.randn(tokens, hidden, generator=g) * 2.0 ** -torch.arange(hidden) + 0.3
        return h, torch.randn(out, hidden, generator=g), rank

    return [example(12, 4, 4, 1), example(20, 5, 5, 2), example(40, 6, 6, 3)]


# 2.2 Absorbed attention of one query --------------------------------------------------------------------------------


def attend_absorbed(
    query, entries, up, temperature=1.0, *,
    split=split_up, width=lambda nope, rope, rank: nope + rope, position=1, power=(2, 2), apart=False, over=-1,
    warm_from=0,
) -> Heads:  # fmt: skip
    """Attention over the latents themselves (V2 section 2.1.2); `temperature` multiplies queries and keys."""
    heads, rank = len(query), up.shape[1]
    rope = entries.shape[1] - rank
    nope = query.shape[1] - rope
    key_up, value_up = split(up, heads, nope)
    latent, key = entries.tensor_split((rank,), -1)
    temperature = temperature if len(entries) >= warm_from else 1.0
    content = temperature ** power[0] * torch.einsum("hn,hnr,sr->hs", query[:, :nope], key_up, latent)
    turned = temperature ** power[1] * position * query[:, nope:] @ key.T
    scores = content / nope**0.5 + turned / rope**0.5 if apart else (content + turned) / width(nope, rope, rank) ** 0.5
    return torch.einsum("hvr,hs,sr->hv", value_up, scores.softmax(over), latent)


def variant(**changes) -> Callable[..., Heads]:
    return functools.partial(attend_absorbed, **changes)


def attend_examples(g: Generator) -> list[tuple]:
    def example(heads, slots, nope, rope, value, rank, temperature=1.0):
        shapes = (heads, nope + rope), (slots, rank + rope), (heads * (nope + value), rank)
        query, entries, up = (torch.randn(*shape, generator=g) for shape in shapes)
        return query, entries, up * min(1, 4 / nope), temperature

    sizes = (2, 5, 4, 2, 4, 6), (3, 7, 5, 4, 2, 8), (4, 1, 3, 2, 6, 5), (2, 9, 8, 4, 8, 4, 1.5), (2, 200, 40, 4, 32, 8)
    return [example(*size) for size in sizes]


def expanded(arguments: tuple, seen: Observation) -> str | None:
    """Object to a tensor as large as the keys or values of one head, where no absorbed form has one of that size."""
    query, entries, up, _ = arguments
    (heads, query_width), (slots, entry), rank = query.shape, entries.shape, up.shape[1]
    nope = query_width - (entry - rank)
    one_head = slots * min(nope, len(up) // heads - nope)
    if not max(heads * entries.numel(), up.numel()) < one_head <= seen.largest:
        return None
    return (
        f"it makes a tensor of {seen.largest} elements; keys or values of one head for {slots} slots have {one_head}. "
        "Multiply the query by W^UK, and the mean of the latents by W^UV, so that nothing is expanded per slot"
    )


# 2.3 A decoding step, split over GPUs -------------------------------------------------------------------------------


def step_milliseconds(
    tokens: int, gpus: int, queries: int, *,
    slots: Callable[[int, int], float] = lambda tokens, gpus: tokens, entry: int = 576, heads_of: int | None = None,
    widths: int = 576 + 512, counted: bool = True, together: Callable[[float, float], float] = max, layers: int = 61,
) -> float:  # fmt: skip
    """Attention of one step of V3: the latent is read by every GPU, the heads are split."""
    read = layers * slots(tokens, gpus) * entry * 2 / HBM
    heads = 128 / (gpus if heads_of is None else heads_of)
    compute = layers * tokens * (queries if counted else 1) * 2 * heads * widths / H800_PEAK_FLOPS
    return 1e3 * together(read, compute)


# 2.4 Another base instead of a ramp ---------------------------------------------------------------------------------


def change_base(
    dim: int, theta: float, factor: float, original: int, *,
    base: Callable[[int, float, float], float] = lambda dim, theta, factor: theta * factor ** (dim / (dim - 2)),
    turn: float = 2 * math.pi, old: bool = True, slowed: Callable[[Tensor], Tensor] = torch.max,
) -> tuple[Float[Tensor, "pairs"], float]:  # fmt: skip
    """Frequencies of the base at which the slowest pair is `factor` times slower, and what that does to fast pairs."""
    power = -2 * torch.arange(dim // 2, dtype=torch.float64) / dim
    before, after = theta**power, base(dim, theta, factor) ** power
    fast = (before if old else after) * original / turn >= 32
    return after, float(slowed((before / after)[fast]))


# 2.5 A decoding step, and 2.6 its cache entry -----------------------------------------------------------------------


def cache_entry(
    h: Float[Tensor, "tokens hidden"],
    w_down: Float[Tensor, "entry hidden"],
    norm_weight: Float[Tensor, "rank"],
    rotation: Complex[Tensor, "tokens pairs"],
    *,
    normalise: Callable[[Tensor, Tensor], Tensor] = norm,
    key_of: Callable[[Tensor, Tensor], Tensor] = lambda key, latent: key,
    rotated: Callable[[Tensor, Tensor], Tensor] = turn,
    key_first: bool = False,
) -> Entries:
    """The normalised latent, then the rotated key."""
    latent, key = (h @ w_down.T).tensor_split((len(norm_weight),), -1)
    latent = normalise(latent, norm_weight)
    parts = latent, rotated(key_of(key, latent), rotation)
    return torch.cat(parts[::-1] if key_first else parts, -1)


def entry(**changes) -> Callable[..., Entries]:
    return functools.partial(cache_entry, **changes)


class Weights(NamedTuple):
    """One layer's attention without query compression and output projection."""

    query: Float[Tensor, "heads query hidden"]
    down: Float[Tensor, "entry hidden"]
    norm: Float[Tensor, "rank"]
    up: Float[Tensor, "out rank"]


def decode_step(
    h, cache, w, rotation, *, turn_query=turn, normalise=norm, rotated=turn, sees_itself=True, apart=False
) -> tuple[Heads, Entries]:
    """The outputs of the heads for one new token, and the cache with its entry at the end."""
    nope_query, rope_query = (w.query @ h).tensor_split((-2 * len(rotation),), -1)
    query = torch.cat((nope_query, turn_query(rope_query, rotation.expand(len(w.query), -1))), -1)
    entry = cache_entry(h[None], w.down, w.norm, rotation[None], normalise=normalise, rotated=rotated)
    longer = torch.cat((cache, entry))
    return attend_absorbed(query, longer if sees_itself else cache, w.up, apart=apart), longer


def decode_examples(g: Generator) -> list[tuple]:
    def example(slots, hidden, heads, nope, rope, value, rank):
        shapes = (heads, nope + rope, hidden), (rank + rope, hidden), (rank,), (heads * (nope + value), rank)
        w = Weights(*(torch.randn(*shape, generator=g) for shape in shapes))
        h, cache = torch.randn(hidden, generator=g), torch.randn(slots, rank + rope, generator=g)
        return h, cache, w, rotations(1, rope, slots)[0]

    return [example(4, 8, 2, 4, 4, 4, 6), example(0, 6, 3, 2, 2, 5, 4), example(9, 5, 2, 6, 4, 2, 8)]


SIX_BITS = 0.013, 0.025

EXERCISES = [
    Function(
        id="2.1",
        name="compress",
        reference=compress,
        examples=compress_examples,
        mistakes=variants(compress, COMPRESS_MISTAKES),
        hints=(
            "the chapter takes the main directions of the matrix; take those of the outputs h @ w.T instead",
            "U, S, Vh = torch.linalg.svd(h @ w.T, full_matrices=False): the first `rank` rows of Vh are directions "
            "among the outputs. Project every output on them: which matrix goes in front of w?",
        ),
        section="chapter 02, sections 4.2 and 4.3: few directions, the cut",
        points=2,
    ),
    Function(
        id="2.2",
        name="attend_absorbed",
        reference=attend_absorbed,
        examples=attend_examples,
        mistakes=variants(attend_absorbed, ATTEND_MISTAKES),
        hints=(
            "find all widths from the shapes first; then: which matrix can be applied to the query instead of to every "
            "cached latent, and which one to the result instead?",
            "up.unflatten(0, (heads, -1)): the first nope rows of each head are W^UK, the others W^UV. Multiply the "
            "query by W^UK, score the latents, add the rotary scores, scale by temperature**2 / sqrt(nope + rope), "
            "and apply W^UV to the mean of the latents",
        ),
        section="chapter 02, sections 2.2, 2.4 and 5.5: absorption, the decoupled key, the temperature",
        points=2,
        cost=expanded,
    ),
    Function(
        id="2.3",
        name="step_milliseconds",
        reference=step_milliseconds,
        examples=lambda g: [(131072, 1, 1), (131072, 8, 1), (131072, 1, 2), (32768, 4, 8), (4096, 1, 16)],
        mistakes=variants(step_milliseconds, SECONDS_MISTAKES),
        hints=(
            "two times, of which the longer counts; only one of them becomes shorter with more GPUs",
            "read: 61 * tokens * 576 values of 2 bytes, on each GPU; compute: 61 * tokens * queries * 2 * (128 / gpus) "
            "* (576 + 512) FLOPs",
        ),
        section="chapter 02, sections 5.1 and 5.3: the table, the roofline and tensor parallelism",
    ),
    Function(
        id="2.4",
        name="change_base",
        reference=change_base,
        examples=lambda g: [(64, 10000.0, 40.0, 4096), (64, 10000.0, 8.0, 4096), (32, 500.0, 4.0, 1024)],
        mistakes=variants(change_base, BASE_MISTAKES),
        hints=(
            "the slowest pair has the number dim/2 - 1: write its old and its new frequency as powers, and solve for "
            "the new base",
            "theta' ** (-(dim - 2) / dim) = theta ** (-(dim - 2) / dim) / factor. A pair is fast if it turns at least "
            "32 times in `original` tokens with the old base; divide old by new frequencies and take the largest ratio",
        ),
        section="chapter 02, section 5.5: YaRN, which keeps the fast pairs",
        points=2,
        outputs=("the frequencies", "the slow-down of the fast pairs"),
    ),
    Function(
        id="2.5",
        name="decode_step",
        reference=decode_step,
        examples=decode_examples,
        mistakes=variants(decode_step, STEP_MISTAKES),
        hints=(
            "three steps: the new entry, the query, the attention; your function from 2.2 is the last of them",
            "of w.down @ h the first len(w.norm) channels get F.rms_norm with eps=1e-6, the others, as complex "
            "numbers, the rotation: append them first. Rotate the last 2 * len(rotation) channels of "
            "w.query @ h; then 2.2",
        ),
        section="chapter 02, sections 2.4 and 2.5: the decoupled key, the whole layer",
        points=3,
        outputs=("the heads' outputs", "the cache"),
    ),
    SpotTheBug(
        id="2.6",
        name="test_entry",
        right=cache_entry,
        bugs=(
            Bug("a rotary key for every head", entry(rotated=for_each_head), "how wide may an entry be?"),
            Bug("a rotary key made from the latent", entry(key_of=from_latent), "change the latent's rows of w_down"),
            Bug(
                "the rotation pairs the halves", entry(rotated=turn_halves), "rotate a vector that has a single 1 in it"
            ),
            Bug("a norm on the rotary key", entry(key_of=normalised), "double the key's rows of w_down"),
        ),
        hints=(
            "with w_down the identity, h itself is the latent and the key side by side: you control both",
            "assert the shape; change only the latent; double only the key; give the key a single 1 and compare with "
            "torch.view_as_real(rotation)",
        ),
        section="chapter 02, section 2.4: the decoupled rotary key",
    ),
    SpotTheBug(
        id="2.7",
        name="test_attend",
        right=attend_absorbed,
        bugs=(
            Bug("content and position scaled apart", variant(apart=True), "compare with keys made for each head"),
            Bug("the temperature is not squared", variant(power=(1, 1)), "use one that is not 1, several entries"),
            Bug("the temperature reaches the content only", variant(power=(2, 0)), "give the queries a rotary part"),
            Bug("the matrix is split across heads", variant(split=across_heads), "use two heads or more"),
            Bug("no temperature for short texts", variant(warm_from=4), "compare with few cached entries too"),
        ),
        hints=(
            "write the plain form: for each head its keys and values, then ordinary attention, and compare",
            "for each head: key_up, value_up = head.split((nope, value)); keys = cat(latent @ key_up.T, key_rope); the "
            "scores are temperature**2 * keys @ q / sqrt(nope + rope). Use a temperature that is not 1",
        ),
        section="chapter 02, sections 2.2 and 5.5: absorption, the temperature",
    ),
    Experiment(
        id="2.8",
        name="six_bits",
        what="relative error of the output with a cache of 6 bits",
        low=SIX_BITS[0],
        high=SIX_BITS[1],
        hints=(
            "6 bits with a sign are the whole numbers from -31 to 31; which scale maps a token's largest latent to 31?",
            "scale = latent.abs().amax(-1, keepdim=True) / 31; coarse = (latent / scale).round() * scale. Attend with "
            "both caches: (rough - exact).norm() / exact.norm()",
        ),
        section="chapter 02, section 5.2: the claim of 93.3 %",
    ),
    OpenTask(
        id="2.9",
        name="gqa_as_mla",
        rubric=(
            "the latent of each token is written down, with its rank in terms of n_g and d_h",
            "W^UK and W^UV of a head are given as matrices, and both layers give the same output on random weights",
            "it says why the layer has to be without RoPE, and what a rotary key would change",
            "it gives an MLA layer of the same rank that no GQA layer equals, and so says what MLA adds",
        ),
        hints=(
            "let the latent be all keys and values of the GQA layer side by side",
            "W^UK of a head only has to select the channels of its group's key: it consists of zeros and ones",
        ),
        section="chapter 02, sections 2.1 and 2.4: one latent for all heads, the decoupled key",
    ),
]
