"""Exercises of chapter 2: MLA by hand, from its cache entry to a decoding step, and tests that catch its bugs.

Everything is for one sequence and one layer. A rotation is a unit complex number per pair of neighbouring channels.
Beyond its arguments, the keywords of a reference change one step of it, for the known mistakes and the planted bugs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Generator, Tensor

from minids.config import YaRN
from minids.course.checks import Bug, Function, SpotTheBug
from minids.course.exercises.chapter02_mistakes import (
    ATTEND_MISTAKES,
    ENTRY_MISTAKES,
    STEP_MISTAKES,
    YARN_MISTAKES,
    across_heads,
    for_each_head,
    from_latent,
    norm,
    normalised,
    split_up,
    turn,
    turn_halves,
    wrong_yarn,
)
from minids.course.exercises.mistakes import variants
from minids.course.observation import Observation
from minids.model.rope import rotary_frequencies, softmax_scale

Entries = Float[Tensor, "tokens entry"]
Heads = Float[Tensor, "heads value"]


def rotations(tokens: int, rope: int, start: int = 0) -> Complex[Tensor, "tokens pairs"]:
    """Of `tokens` positions from `start` on, fast enough that few tokens show the difference."""
    angle = torch.arange(start, start + tokens)[:, None] * 10.0 ** -(2 * torch.arange(rope // 2) / rope)
    return torch.polar(torch.ones_like(angle), angle)


# 2.1 The cache entry ------------------------------------------------------------------------------------------------


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


def entry_examples(g: Generator) -> list[tuple]:
    def example(tokens, hidden, rank, rope, start=0, size=1.0):
        h, w = size * torch.randn(tokens, hidden, generator=g), torch.randn(rank + rope, hidden, generator=g)
        return h, w, torch.rand(rank, generator=g) + 0.5, rotations(tokens, rope, start)

    small = example(2, 4, 8, 6, start=1, size=1e-3)  # eps matters beside it
    return [example(3, 8, 6, 4), example(1, 5, 4, 2, start=9), example(6, 10, 8, 8), small]


# 2.2 Absorbed attention of one query --------------------------------------------------------------------------------


def attend_absorbed(
    query, entries, up, temperature=1.0, *,
    split=split_up, width=lambda nope, rope, rank: nope + rope, position=1, power=(2, 2), apart=False, over=-1,
) -> Heads:  # fmt: skip
    """Attention over the latents themselves (V2 section 2.1.2); `temperature` multiplies queries and keys."""
    heads, rank = len(query), up.shape[1]
    rope = entries.shape[1] - rank
    nope = query.shape[1] - rope
    key_up, value_up = split(up, heads, nope)
    latent, key = entries.tensor_split((rank,), -1)
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


# 2.3 Which form is cheaper ------------------------------------------------------------------------------------------


def most_queries_absorbed(
    nope: int, rope: int, value: int, rank: int, *, strict: bool = True, values_too: bool = True, sums: bool = True
) -> int:
    """The largest q with q * (2 * rank + rope) < q * (nope + rope + value) + rank * (nope + value)."""
    once = rank * (nope + value * values_too)
    more = 2 * rank - nope - value if sums else rank - nope
    return (once - strict) // more


# 2.4 YaRN -----------------------------------------------------------------------------------------------------------


def yarn(dim: int, theta: float, factor: float, original: int) -> tuple[Float[Tensor, "pairs"], float]:
    """Frequencies, and the factor on the softmax scale, at beta 32 and 1 (YaRN; V3 section 4.3)."""
    scaling = YaRN(factor=factor, original_max_position_embeddings=original)
    return rotary_frequencies(dim, theta, scaling, torch.device("cpu")), softmax_scale(1, scaling)


# 2.5 A decoding step ------------------------------------------------------------------------------------------------


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


EXERCISES = [
    Function(
        id="2.1",
        name="cache_entry",
        reference=cache_entry,
        examples=entry_examples,
        mistakes=variants(cache_entry, ENTRY_MISTAKES),
        hints=(
            "one product makes both parts; what happens then to the latent, and what to the key?",
            "h @ w_down.T holds both: its first len(norm_weight) columns are the latent, which gets F.rms_norm with "
            "eps=1e-6; the others, as complex numbers, are multiplied by `rotation`",
        ),
        section="chapter 02, sections 2.5 and 2.6: the decoupled key, the whole layer",
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
        section="chapter 02, sections 2.2, 2.5 and 5.4: absorption, the decoupled key, the temperature",
        points=2,
        cost=expanded,
    ),
    Function(
        id="2.3",
        name="most_queries_absorbed",
        reference=most_queries_absorbed,
        examples=lambda g: [(128, 64, 128, 512), (16, 8, 16, 32), (64, 32, 64, 128), (3, 2, 5, 7)],
        mistakes=variants(
            most_queries_absorbed,
            {
                "an equal number counts as fewer": {"strict": False},
                "only the keys are recomputed": {"values_too": False},
                "the sum over the values is left out": {"sums": False},
            },
        ),
        hints=(
            "write both counts for q queries as an inequality; one of its terms does not contain q",
            "absorbed: q * (2 * rank + rope); expanded: q * (nope + rope + value) + rank * (nope + value). The first "
            "has to be smaller, not equal",
        ),
        section="chapter 02, section 3.1: which form, when",
    ),
    Function(
        id="2.4",
        name="yarn",
        reference=yarn,
        examples=lambda g: [(64, 10000.0, 40.0, 4096), (64, 10000.0, 8.0, 4096), (32, 500.0, 4.0, 1024)],
        mistakes=variants(wrong_yarn, YARN_MISTAKES),
        hints=(
            "compute the two bounds and print them for dim=64, theta=10000, original=4096: they are 10 and 23",
            "work in torch.float64; ramp = ((pair - low) / (high - low)).clamp(0, 1) is the share of the divided "
            "frequency; the temperature 0.1 * ln(factor) + 1 applies to queries and to keys",
        ),
        section="chapter 02, section 5.4: YaRN and a temperature",
        points=2,
        outputs=("the frequencies", "the factor on the softmax scale"),
    ),
    Function(
        id="2.5",
        name="decode_step",
        reference=decode_step,
        examples=decode_examples,
        mistakes=variants(decode_step, STEP_MISTAKES),
        hints=(
            "three steps: the new entry, the query, the attention; your functions from 2.1 and 2.2 are two of them",
            "append cache_entry(h[None], w.down, w.norm, rotation[None]) first; rotate the last 2 * len(rotation) "
            "channels of w.query @ h; then 2.2 over the longer cache",
        ),
        section="chapter 02, section 2.6: the whole layer",
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
        section="chapter 02, section 2.5: the decoupled rotary key",
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
        ),
        hints=(
            "write the plain form: for each head its keys and values, then ordinary attention, and compare",
            "for each head: key_up, value_up = head.split((nope, value)); keys = cat(latent @ key_up.T, key_rope); the "
            "scores are temperature**2 * keys @ q / sqrt(nope + rope). Use a temperature that is not 1",
        ),
        section="chapter 02, sections 2.2 and 5.4: absorption, the temperature",
    ),
]
