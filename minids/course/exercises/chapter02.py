"""Exercises of chapter 2: MLA by hand, from its cache entry to a decoding step, and tests that catch its bugs.

Everything is for one sequence and one layer. A rotation is a unit complex number per pair of neighbouring channels.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Generator, Tensor

from minids.config import YaRN
from minids.course.checks import Bug, Function, SpotTheBug
from minids.model.mla import LATENT_NORM_EPS
from minids.model.rope import rotary_frequencies, rotate, softmax_scale, yarn_ramp_bounds

Entries = Float[Tensor, "tokens entry"]
Heads = Float[Tensor, "heads value"]


def turn(x: Float[Tensor, "tokens rope"], rotation: Complex[Tensor, "tokens pairs"]) -> Float[Tensor, "tokens rope"]:
    """Rotate each token's neighbouring pairs (2i, 2i+1)."""
    return rotate(x[None, :, None], rotation[None, :, None])[0, :, 0]


def turn_halves(x, rotation):
    """PITFALLS 4: pair i with i + rope/2."""
    pairs = torch.complex(*x.chunk(2, -1)) * rotation
    return torch.cat((pairs.real, pairs.imag), -1)


def norm(x: Float[Tensor, "tokens dim"], weight: Float[Tensor, "dim"] | None = None) -> Float[Tensor, "tokens dim"]:
    return F.rms_norm(x, x.shape[-1:], weight, LATENT_NORM_EPS)


def rotations(tokens: int, rope: int, start: int = 0) -> Complex[Tensor, "tokens pairs"]:
    """Of `tokens` positions from `start` on, fast enough that few tokens show the difference."""
    angle = torch.arange(start, start + tokens)[:, None] * 10.0 ** -(2 * torch.arange(rope // 2) / rope)
    return torch.polar(torch.ones_like(angle), angle)


# 2.1 The cache entry ------------------------------------------------------------------------------------------------


def entry_from(parts: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Entries]:
    """A `cache_entry`, right or wrong: `parts` makes both parts from latent, key, norm weight and rotation."""

    def entry(
        h: Float[Tensor, "tokens hidden"],
        w_down: Float[Tensor, "entry hidden"],
        norm_weight: Float[Tensor, "rank"],
        rotation: Complex[Tensor, "tokens pairs"],
    ) -> Entries:
        latent, key = (h @ w_down.T).tensor_split((len(norm_weight),), -1)
        return torch.cat(parts(latent, key, norm_weight, rotation), -1)

    return entry


cache_entry = entry_from(lambda c, k, w, r: (norm(c, w), turn(k, r)))  # V3 eq. 1 and 3
latent_before_norm = entry_from(lambda c, k, w, r: (c, turn(k, r)))
key_before_rotation = entry_from(lambda c, k, w, r: (norm(c, w), k))
key_normalised = entry_from(lambda c, k, w, r: (norm(c, w), turn(norm(k), r)))
key_from_latent = entry_from(lambda c, k, w, r: (norm(c, w), turn(norm(c, w)[:, : k.shape[1]], r)))
key_per_head = entry_from(lambda c, k, w, r: (norm(c, w), turn(k, r).repeat(1, 4)))
key_in_halves = entry_from(lambda c, k, w, r: (norm(c, w), turn_halves(k, r)))


def entry_examples(g: Generator) -> list[tuple]:
    def example(tokens, hidden, rank, rope, start=0):
        h, w = torch.randn(tokens, hidden, generator=g), torch.randn(rank + rope, hidden, generator=g)
        return h, w, torch.rand(rank, generator=g) + 0.5, rotations(tokens, rope, start)

    return [example(3, 8, 6, 4), example(1, 5, 4, 2, start=9), example(6, 10, 8, 8)]


# 2.2 Absorbed attention of one query --------------------------------------------------------------------------------


def split_up(up: Float[Tensor, "out rank"], heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """W^UK and W^UV of each head."""
    return up.unflatten(0, (heads, -1)).tensor_split((nope,), 1)


def values_first(up, heads, nope):
    value, key = up.unflatten(0, (heads, -1)).tensor_split((-nope,), 1)
    return key, value


def across_heads(up, heads, nope):
    """PITFALLS 7: all heads' keys first, as if the matrix were [W^UK; W^UV]."""
    key, value = up.tensor_split((heads * nope,))
    return key.unflatten(0, (heads, -1)), value.unflatten(0, (heads, -1))


def one_scale(content, position, nope, rope, rank, t):
    return t**2 * (content + position) / (nope + rope) ** 0.5


def attend_absorbed(query, entries, up, temperature=1.0, *, split=split_up, score=one_scale, over=-1) -> Heads:
    """Attention over the latents themselves (V2 section 2.1.2); `temperature` multiplies queries and keys."""
    heads, rank = len(query), up.shape[1]
    rope = entries.shape[1] - rank
    nope = query.shape[1] - rope
    key_up, value_up = split(up, heads, nope)
    latent, key = entries.tensor_split((rank,), -1)
    content = torch.einsum("hn,hnr,sr->hs", query[:, :nope], key_up, latent)
    p = score(content, query[:, nope:] @ key.T, nope, rope, rank, temperature).softmax(over)
    return torch.einsum("hvr,hs,sr->hv", value_up, p, latent)


def variant(**changes) -> Callable[..., Heads]:
    return functools.partial(attend_absorbed, **changes)


no_position = variant(score=lambda c, p, n, r, k, t: t**2 * c / (n + r) ** 0.5)
two_scales = variant(score=lambda c, p, n, r, k, t: t**2 * (c / n**0.5 + p / r**0.5))
scale_of_latent = variant(score=lambda c, p, n, r, k, t: t**2 * (c + p) / (k + r) ** 0.5)
not_squared = variant(score=lambda c, p, n, r, k, t: t * (c + p) / (n + r) ** 0.5)
content_only = variant(score=lambda c, p, n, r, k, t: (t**2 * c + p) / (n + r) ** 0.5)


def attend_examples(g: Generator) -> list[tuple]:
    def example(heads, slots, nope, rope, value, rank, temperature=1.0):
        shapes = (heads, nope + rope), (slots, rank + rope), (heads * (nope + value), rank)
        return *(torch.randn(*shape, generator=g) for shape in shapes), temperature

    return [example(*s) for s in ((2, 5, 4, 2, 4, 6), (3, 7, 5, 4, 2, 8), (4, 1, 3, 2, 6, 5), (2, 9, 8, 4, 8, 4, 1.5))]


# 2.3 Which form is cheaper ------------------------------------------------------------------------------------------


def most_queries_absorbed(nope: int, rope: int, value: int, rank: int) -> int:
    """The largest q with q * (2 * rank + rope) < q * (nope + rope + value) + rank * (nope + value)."""
    return (rank * (nope + value) - 1) // (2 * rank - nope - value)


# 2.4 YaRN -----------------------------------------------------------------------------------------------------------


def yarn(dim: int, theta: float, factor: float, original: int) -> tuple[Float[Tensor, "pairs"], float]:
    """Frequencies and what the softmax scale is multiplied by, at beta 32 and 1 (YaRN; V3 section 4.3)."""
    scaling = YaRN(factor=factor, original_max_position_embeddings=original)
    return rotary_frequencies(dim, theta, scaling, torch.device("cpu")), softmax_scale(1, scaling)


def yarn_with(ramp: Callable[..., Tensor], power: int = 2) -> Callable[..., tuple[Tensor, float]]:
    """A wrong `yarn`; `ramp` gets the pairs' numbers, the exact bounds before rounding, and the right ramp."""

    def wrong(dim, theta, factor, original):
        pair = torch.arange(dim // 2, dtype=torch.float64)
        exact = [dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (32, 1)]
        low, high = yarn_ramp_bounds(dim, theta, YaRN(factor=factor, original_max_position_embeddings=original))
        stretched = ramp(pair, exact, ((pair - low) / (high - low)).clamp(0, 1))
        frequency = theta ** (-2 * pair / dim)
        return frequency * (1 - stretched + stretched / factor), (0.1 * math.log(factor) + 1) ** power

    return wrong


def rounded_inwards(pair, exact, ramp):
    low, high = math.ceil(exact[0]), math.floor(exact[1])
    return ((pair - low) / (high - low)).clamp(0, 1)


# 2.5 A decoding step ------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """One layer's attention without query compression and output projection."""

    query: Float[Tensor, "heads query hidden"]
    down: Float[Tensor, "entry hidden"]
    norm: Float[Tensor, "rank"]
    up: Float[Tensor, "out rank"]


def decode_step(
    h, cache, w, rotation, *, turn_query=turn, make_entry=cache_entry, sees_itself=True, attend=attend_absorbed
) -> tuple[Heads, Entries]:
    """The outputs of the heads for one new token, and the cache with its entry at the end."""
    nope_query, rope_query = (w.query @ h).tensor_split((-2 * len(rotation),), -1)
    query = torch.cat((nope_query, turn_query(rope_query, rotation.expand(len(w.query), -1))), -1)
    longer = torch.cat((cache, make_entry(h[None], w.down, w.norm, rotation[None])))
    return attend(query, longer if sees_itself else cache, w.up), longer


def decode_examples(g: Generator) -> list[tuple]:
    def example(slots, hidden, heads, nope, rope, value, rank):
        shapes = (heads, nope + rope, hidden), (rank + rope, hidden), (rank,), (heads * (nope + value), rank)
        w = Weights(*(torch.randn(*shape, generator=g) for shape in shapes))
        h, cache = torch.randn(hidden, generator=g), torch.randn(slots, rank + rope, generator=g)
        return h, cache, w, rotations(1, rope, slots)[0]

    return [example(4, 8, 2, 4, 4, 4, 6), example(0, 6, 3, 2, 2, 5, 4), example(9, 5, 2, 6, 4, 2, 8)]


EXERCISES = [
    Function(
        id="2.1",
        name="cache_entry",
        reference=cache_entry,
        examples=entry_examples,
        mistakes={
            "the latent is stored before its norm": latent_before_norm,
            "the key is stored before its rotation": key_before_rotation,
            "the key is normalised too": key_normalised,
            "the key is taken from the latent instead of from h": key_from_latent,
            "the rotation pairs the first half with the second, not neighbours": key_in_halves,
        },
        hint="one product, h @ w_down.T, holds both: its first len(norm_weight) columns are the latent",
    ),
    Function(
        id="2.2",
        name="attend_absorbed",
        reference=attend_absorbed,
        examples=attend_examples,
        mistakes={
            "the rotary part is left out of the score": no_position,
            "content and position have a scale each": two_scales,
            "the scale is that of the absorbed query's width": scale_of_latent,
            "the values' rows of each head are taken for the keys'": variant(split=values_first),
            "the rows are split into keys and values before they are split into heads": variant(split=across_heads),
            "the softmax runs over the heads": variant(over=0),
            "the temperature is not squared": not_squared,
        },
        hint="first up.unflatten(0, (heads, -1)); then the first nope rows of each head are W^UK, the others W^UV",
        points=2,
    ),
    Function(
        id="2.3",
        name="most_queries_absorbed",
        reference=most_queries_absorbed,
        examples=lambda g: [(128, 64, 128, 512), (16, 8, 16, 32), (64, 32, 64, 128), (3, 2, 5, 7)],
        mistakes={
            "an equal number counts as fewer": lambda n, r, v, k: k * (n + v) // (2 * k - n - v),
            "only the keys are re-made": lambda n, r, v, k: (k * n - 1) // (2 * k - n - v),
            "the sum over the values is forgotten": lambda n, r, v, k: (k * (n + v) - 1) // (k - n),
        },
        hint="write both counts for q queries; per head and cached token, re-making costs rank * (nope + value), once",
    ),
    Function(
        id="2.4",
        name="yarn",
        reference=yarn,
        examples=lambda g: [(64, 10000.0, 40.0, 4096), (64, 10000.0, 8.0, 4096), (32, 500.0, 4.0, 1024)],
        mistakes={
            "the bounds are rounded inwards": yarn_with(rounded_inwards),
            "the fast pairs are stretched and the slow ones kept": yarn_with(lambda pair, exact, ramp: 1 - ramp),
            "all pairs are stretched alike": yarn_with(lambda pair, exact, ramp: torch.ones_like(ramp)),
            "the temperature is not squared": yarn_with(lambda pair, exact, ramp: ramp, power=1),
        },
        hint="work in torch.float64; a pair at the lower bound keeps its frequency, one at the upper has it divided",
        points=2,
        outputs=("the frequencies", "the factor on the softmax scale"),
    ),
    Function(
        id="2.5",
        name="decode_step",
        reference=decode_step,
        examples=decode_examples,
        mistakes={
            "the new token does not see itself": functools.partial(decode_step, sees_itself=False),
            "the query is not rotated": functools.partial(decode_step, turn_query=lambda x, rotation: x),
            "the latent is stored before its norm": functools.partial(decode_step, make_entry=latent_before_norm),
            "the key is stored before its rotation": functools.partial(decode_step, make_entry=key_before_rotation),
            "content and position have a scale each": functools.partial(decode_step, attend=two_scales),
        },
        hint="entry first, then the longer cache, then 2.2 over all of it",
        points=3,
        outputs=("the heads' outputs", "the cache"),
    ),
    SpotTheBug(
        id="2.6",
        name="test_entry",
        right=cache_entry,
        bugs=(
            Bug("a rotary key for every head", key_per_head, "how wide may an entry be?"),
            Bug("a rotary key made from the latent", key_from_latent, "change the latent's rows of w_down"),
            Bug("the rotation pairs the halves", key_in_halves, "turn a vector that has a single 1 in it"),
            Bug("a norm on the rotary key", key_normalised, "double the key's rows of w_down"),
        ),
    ),
    SpotTheBug(
        id="2.7",
        name="test_attend",
        right=attend_absorbed,
        bugs=(
            Bug("content and position scaled apart", two_scales, "compare with keys made for each head"),
            Bug("the temperature is not squared", not_squared, "use one that is not 1, several entries"),
            Bug("the temperature reaches the content only", content_only, "give the queries a rotary part"),
            Bug("the matrix is split across heads", variant(split=across_heads), "use two heads or more"),
        ),
    ),
]
