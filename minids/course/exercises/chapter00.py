"""Chapter 0, the price of a model: parameters of a layer, hours of a run, a cache, a day of serving, own or rent."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from minids.course.checks import Bug, Function, SpotTheBug

# Beyond its arguments, the keywords of a reference are ways to go wrong, for the mistakes.


def with_examples(*examples: tuple) -> Callable[[Any], list[tuple]]:
    """Examples that need no chance."""
    return lambda generator: list(examples)


# 0.1 A layer of experts ---------------------------------------------------------------------------------------------


def moe_layer(
    hidden: int, inner: int, routed: int, shared: int, chosen: int, *,
    matrices: int = 3, router_rows: Callable[[int, int], tuple[int, int]] = lambda routed, chosen: (routed, routed),
    shared_used: Callable[[int], int] = lambda shared: shared,
) -> tuple[int, int]:  # fmt: skip
    """Parameters stored, and used by one token (V3 section 2.1.2)."""
    expert = matrices * hidden * inner
    stored_rows, used_rows = router_rows(routed, chosen)
    stored = (routed + shared) * expert + stored_rows * hidden
    return stored, (chosen + shared_used(shared)) * expert + used_rows * hidden


MOE_LAYER = Function(
    id="0.1",
    name="moe_layer",
    reference=moe_layer,
    examples=with_examples((7168, 2048, 256, 1, 8), (2048, 1408, 64, 2, 6), (16, 8, 4, 0, 1), (10, 3, 5, 2, 2)),
    mistakes={
        "the router's own matrix is left out": partial(moe_layer, router_rows=lambda routed, chosen: (0, 0)),
        "the router scores only the experts that it then chooses": partial(
            moe_layer, router_rows=lambda routed, chosen: (routed, chosen)
        ),
        "an expert has two matrices": partial(moe_layer, matrices=2),
        "a token does not use the shared experts": partial(moe_layer, shared_used=lambda shared: 0),
    },
    hint="the router has a row of `hidden` weights for each routed expert, and needs all the scores to find the best",
    outputs=("the parameters stored", "the parameters used"),
)

# 0.2 The hours of a training run ------------------------------------------------------------------------------------


def training_hours(
    weights: float, layers: int, heads: int, width: int, seq_len: int, tokens: float, mfu: float, peak: float, *,
    passes: int = 3, seen: float = 0.5, per_multiply_add: int = 2, attention: bool = True, seconds: int = 3600,
) -> float:  # fmt: skip
    """GPU-hours, where `width` is that of a key and a value together (ISCA Table 2 counts so)."""
    multiply_adds = weights + attention * layers * heads * width * seq_len * seen
    return tokens * passes * per_multiply_add * multiply_adds / (mfu * peak) / seconds


TRAINING_HOURS = Function(
    id="0.2",
    name="training_hours",
    reference=training_hours,
    examples=with_examples(
        (36.62e9, 61, 128, 320, 4096, 14.8e12, 0.39, 989.5e12),
        (403.8e9, 126, 128, 256, 4096, 15e12, 0.34, 989.5e12),
        (1e6, 3, 4, 40, 512, 1e9, 1.0, 1e12),
    ),
    mistakes={
        "only the forward pass is counted": partial(training_hours, passes=1),
        "the backward pass is taken to cost as much as the forward pass, not twice as much": partial(
            training_hours, passes=2
        ),
        "every token sees the whole sequence, also what comes after it": partial(training_hours, seen=1),
        "attention is left out": partial(training_hours, attention=False),
        "a multiply-add is counted as one operation": partial(training_hours, per_multiply_add=1),
        "the result is in seconds": partial(training_hours, seconds=1),
    },
    hint="forward, a token costs 2 * weights for the matrices and 2 * layers * heads * width for each token it sees",
    points=2,
)

# 0.3 The cache ------------------------------------------------------------------------------------------------------


def cache_bytes(layers: int, widths: tuple[int, ...], tokens: int, bits: float) -> float:
    """What all layers cache of a conversation; `widths` are the vectors cached for a token in one layer."""
    return layers * sum(widths) * tokens * bits / 8


CACHE = SpotTheBug(
    id="0.3",
    name="test_cache",
    right=cache_bytes,
    bugs=(
        Bug(
            "it counts one layer (pitfall p)",
            lambda layers, widths, tokens, bits: cache_bytes(1, widths, tokens, bits),
            "how many layers has your example?",
        ),
        Bug(
            "it counts only the first vector: no rotary key (pitfall p)",
            lambda layers, widths, tokens, bits: cache_bytes(layers, widths[:1], tokens, bits),
            "how many vectors are cached for a token?",
        ),
        Bug(
            "it counts keys and values separately, though a latent is both",
            lambda layers, widths, tokens, bits: 2 * cache_bytes(layers, widths, tokens, bits),
            "compare with a number of bytes that somebody published",
        ),
        Bug(
            "it rounds every number up to whole bytes",
            lambda layers, widths, tokens, bits: cache_bytes(layers, widths, tokens, 8 * math.ceil(bits / 8)),
            "V2 is served with 6 bits a number",
        ),
    ),
)

# 0.4 A day of serving -----------------------------------------------------------------------------------------------


def day_of_serving(
    hits: float, misses: float, outputs: float, prices: tuple[float, float, float], nodes: float, usd: float, *,
    gpus: int = 8, hours: int = 24, hit_price: int = 0,
    margin: Callable[[float, float], float] = lambda revenue, cost: revenue / cost - 1,
) -> tuple[float, float, float]:  # fmt: skip
    """Cost, revenue and margin; `prices` in USD per million tokens (open-infra note on day 6, 2025)."""
    cost = nodes * gpus * hours * usd
    revenue = (hits * prices[hit_price] + misses * prices[1] + outputs * prices[2]) / 1e6
    return cost, revenue, margin(revenue, cost)


DAY_OF_SERVING = Function(
    id="0.4",
    name="day_of_serving",
    reference=day_of_serving,
    examples=with_examples(
        (342e9, 266e9, 168e9, (0.14, 0.55, 2.19), 226.75, 2.0),
        (0.0, 5e9, 1e9, (0.1, 0.5, 1.5), 10.0, 3.0),
        (8e9, 2e9, 1e9, (0.25, 1.0, 4.0), 100.0, 1.5),
    ),
    mistakes={
        "a node is taken to be one GPU": partial(day_of_serving, gpus=1),
        "a day has one hour": partial(day_of_serving, hours=1),
        "tokens found in the cache are charged as if they were not": partial(day_of_serving, hit_price=1),
        "the margin is revenue over cost: it is 1 where nothing is earned": partial(
            day_of_serving, margin=lambda revenue, cost: revenue / cost
        ),
        "the profit is divided by the revenue, not by the cost": partial(
            day_of_serving, margin=lambda revenue, cost: 1 - cost / revenue
        ),
    },
    hint="8 GPUs a node, 24 hours; prices are per million tokens; the margin is profit divided by cost",
    outputs=("the cost", "the revenue", "the margin"),
)

# 0.5 Owning or renting ----------------------------------------------------------------------------------------------


def break_even(
    usd_per_gpu: float, years: float, kilowatts: float, usd_per_kwh: float, rent: float, *, days: int = 365
) -> float:
    """The share of all hours from which on an owned GPU is cheaper than a rented one; above 1: never."""
    return (usd_per_gpu / (years * days * 24) + kilowatts * usd_per_kwh) / rent


BREAK_EVEN = Function(
    id="0.5",
    name="break_even",
    reference=break_even,
    examples=with_examples(
        (32_580.0, 4.0, 1.4, 0.1, 2.0), (40_000.0, 3.0, 2.0, 0.25, 1.5), (20_000.0, 5.0, 1.0, 0.05, 3.0)
    ),
    mistakes={
        "power is left out": lambda usd, years, kw, kwh, rent: break_even(usd, years, 0.0, kwh, rent),
        "power is paid for hours of use only; here it is paid for all": lambda usd, years, kw, kwh, rent: break_even(
            usd, years, 0.0, kwh, rent - kw * kwh
        ),
        "all the capital is written off in the first year": lambda usd, years, kw, kwh, rent: break_even(
            usd, 1.0, kw, kwh, rent
        ),
        "a year is taken to be working days, 250 of them": partial(break_even, days=250),
    },
    hint="at share u an owned hour costs (capital per hour + power per hour) / u; set that equal to the rent",
)

EXERCISES = [MOE_LAYER, TRAINING_HOURS, CACHE, DAY_OF_SERVING, BREAK_EVEN]
