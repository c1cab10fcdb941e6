"""Exercises of chapter 0, the cost of a model: parameters, GPU-hours, a cache, a day of serving, owning or renting."""

import math
from collections.abc import Callable
from typing import Any

from minids.course.checks import Bug, Function, SpotTheBug
from minids.course.exercises.mistakes import variants

# Beyond its arguments, the keywords of a reference change one step of it, for the known mistakes.


def with_examples(*examples: tuple) -> Callable[[Any], list[tuple]]:
    """Examples that need no random numbers."""
    return lambda generator: list(examples)


# 0.1 A layer of experts ---------------------------------------------------------------------------------------------


def moe_layer(
    hidden: int, inner: int, routed: int, shared: int, chosen: int, *,
    matrices: int = 3, rows: Callable[[int, int], tuple[int, int]] = lambda routed, chosen: (routed, routed),
    shared_used: Callable[[int], int] = lambda shared: shared, shared_stored: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """Parameters stored, and used by one token (V3 section 2.1.2); `rows` of the router, stored and used."""
    expert = matrices * hidden * inner
    stored_rows, used_rows = rows(routed, chosen)
    stored = (routed + shared * shared_stored) * expert + stored_rows * hidden
    return stored, (chosen + shared_used(shared)) * expert + used_rows * hidden


MOE_LAYER = Function(
    id="0.1",
    name="moe_layer",
    reference=moe_layer,
    examples=with_examples((7168, 2048, 256, 1, 8), (2048, 1408, 64, 2, 6), (16, 8, 4, 0, 1), (10, 3, 5, 2, 2)),
    mistakes=variants(
        moe_layer,
        {
            "the router's own matrix is left out": {"rows": lambda routed, chosen: (0, 0)},
            "a token uses only the router's rows of the experts that it chooses": {
                "rows": lambda routed, chosen: (routed, chosen)
            },
            "an expert has two matrices": {"matrices": 2},
            "a token does not use the shared experts": {"shared_used": lambda shared: 0},
            "a token uses one shared expert, however many there are": {"shared_used": lambda shared: 1},
            "the shared experts are not stored": {"shared_stored": False},
        },
    )
    | {"the two results are in the other order": lambda h, i, r, s, c: moe_layer(h, i, r, s, c)[::-1]},
    hints=(
        "count one expert first, then the experts stored and those that one token uses; what else has weights?",
        "the router has a row of `hidden` weights for each routed expert, and needs all the scores to find the best",
    ),
    section="chapter 00, section 2: the model in numbers",
    outputs=("the parameters stored", "the parameters used"),
)

# 0.2 The hours of a training run ------------------------------------------------------------------------------------


def training_hours(
    weights: float, layers: int, heads: int, width: int, seq_len: int, tokens: float, mfu: float, peak: float, *,
    passes: int = 3, seen: float = 0.5, per_multiply_add: int = 2, attention: bool = True, seconds: int = 3600,
    use_mfu: bool = True,
) -> float:  # fmt: skip
    """GPU-hours, where `width` is that of a key and a value together (ISCA Table 2 counts so)."""
    multiply_adds = weights + attention * layers * heads * width * seq_len * seen
    return tokens * passes * per_multiply_add * multiply_adds / ((mfu if use_mfu else 1) * peak) / seconds


TRAINING_HOURS = Function(
    id="0.2",
    name="training_hours",
    reference=training_hours,
    examples=with_examples(
        (36.62e9, 61, 128, 320, 4096, 14.8e12, 0.39, 989.5e12),
        (403.8e9, 126, 128, 256, 4096, 15e12, 0.34, 989.5e12),
        (1e6, 3, 4, 40, 512, 1e9, 0.8, 1e12),
    ),
    mistakes=variants(
        training_hours,
        {
            "only the forward pass is counted": {"passes": 1},
            "the backward pass costs as much as the forward pass, not twice as much": {
                "passes": 2,
                "per_multiply_add": 2,
            },
            "every token attends to the whole sequence, also to what comes after it": {"seen": 1},
            "attention is left out": {"attention": False, "seen": 0.5},
            "a multiply-add is counted as one operation": {"per_multiply_add": 1},
            "the result is in seconds": {"seconds": 1},
            "the GPUs run at their peak, without `mfu`": {"use_mfu": False},
        },
    ),
    hints=(
        "three steps: the FLOPs of a forward pass for one token, those of the whole training, and the hours they take",
        "forward, a token costs 2 * weights, and 2 * layers * heads * width for each of the seq_len / 2 tokens that it "
        "attends to; all passes together cost three times that",
    ),
    section="chapter 00, section 4: from the shape to the work, from the work to the hours",
    points=2,
)

# 0.3 The cache ------------------------------------------------------------------------------------------------------


def cache_bytes(layers: int, widths: tuple[int, ...], tokens: int, bits: float) -> float:
    """Bytes that all layers cache for `tokens` tokens; `widths` are those of the vectors of one token in one layer."""
    return layers * sum(widths) * tokens * bits / 8


CACHE = SpotTheBug(
    id="0.3",
    name="test_cache",
    right=cache_bytes,
    bugs=(
        Bug(
            "it counts one layer only",
            lambda layers, widths, tokens, bits: cache_bytes(1, widths, tokens, bits),
            "how many layers has your example?",
        ),
        Bug(
            "it counts the first vector only, and no rotary key",
            lambda layers, widths, tokens, bits: cache_bytes(layers, widths[:1], tokens, bits),
            "how many vectors are cached for a token?",
        ),
        Bug(
            "it counts keys and values separately, though the latent serves as both",
            lambda layers, widths, tokens, bits: 2 * cache_bytes(layers, widths, tokens, bits),
            "compare with a published number of bytes",
        ),
        Bug(
            "it rounds the bits of a value up to whole bytes",
            lambda layers, widths, tokens, bits: cache_bytes(layers, widths, tokens, 8 * math.ceil(bits / 8)),
            "V2 is served with 6 bits a value",
        ),
    ),
    hints=(
        "an exact number that you know tests more than an inequality; which argument does each of your calls test?",
        "V3 in 16 bits: cache_bytes(61, (512, 64), 1, 16) == 70272. Add a second call with 6 bits",
    ),
    section="chapter 00, section 5: the cache",
)

# 0.4 A day of serving -----------------------------------------------------------------------------------------------


def profit_share(revenue: float, cost: float) -> float:
    return revenue / cost - 1


def day_of_serving(
    hits: float, misses: float, outputs: float, prices: tuple[float, float, float], nodes: float, usd: float, *,
    gpus: int = 8, hours: int = 24, hit_price: int = 0, per: float = 1e6,
    margin: Callable[[float, float], float] = profit_share,
) -> tuple[float, float, float]:  # fmt: skip
    """Cost, revenue and margin; `prices` in USD per million tokens (open-infra note on day 6, 2025)."""
    cost = nodes * gpus * hours * usd
    revenue = (hits * prices[hit_price] + misses * prices[1] + outputs * prices[2]) / per
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
    mistakes=variants(
        day_of_serving,
        {
            "a node has one GPU": {"gpus": 1},
            "a day has one hour": {"hours": 1},
            "tokens found in the cache are charged at the price of computed input": {"hit_price": 1},
            "the prices are taken as per token, not per million tokens": {"per": 1, "margin": profit_share},
            "the margin is revenue over cost, which is 1 where nothing is earned": {"margin": lambda r, c: r / c},
            "the profit is divided by the revenue, not by the cost": {"margin": lambda r, c: 1 - c / r},
            "the margin is the profit in USD": {"margin": lambda r, c: r - c},
            "the margin is in per cent": {"margin": lambda r, c: 100 * (r / c - 1)},
        },
    ),
    hints=(
        "compute the three results in their order; check the unit of each: USD, USD, and a share",
        "8 GPUs a node, 24 hours; prices are per million tokens; the margin is (revenue - cost) / cost",
    ),
    section="chapter 00, section 5: one day of production",
    outputs=("the cost", "the revenue", "the margin"),
)

# 0.5 Owning or renting ----------------------------------------------------------------------------------------------


def break_even(
    usd_per_gpu: float, years: float, kilowatts: float, usd_per_kwh: float, rent: float, *,
    days: int = 365, hours: int = 24, spread: bool = True, power: float = 1.0, power_when_used: bool = False,
) -> float:  # fmt: skip
    """The share of all hours from which on an owned GPU is cheaper than a rented one; above 1: never."""
    energy = kilowatts * usd_per_kwh * power
    capital = usd_per_gpu / ((years if spread else 1) * days * hours)
    return capital / (rent - energy) if power_when_used else (capital + energy) / rent


BREAK_EVEN = Function(
    id="0.5",
    name="break_even",
    reference=break_even,
    examples=with_examples(
        (32_580.0, 4.0, 1.4, 0.1, 2.0), (40_000.0, 3.0, 2.0, 0.25, 1.5), (20_000.0, 5.0, 1.0, 0.05, 3.0)
    ),
    mistakes=variants(
        break_even,
        {
            "all the capital is written off in the first year": {"spread": False},
            "power is left out": {"power": 0.0, "power_when_used": False},
            "power is paid for hours of use only, not for all hours": {"power": 1.0, "power_when_used": True},
            "a year has the 250 working days only": {"days": 250},
            "a year is counted in days, not in hours": {"hours": 1},
        },
    )
    | {
        "a result above 1 is cut to 1": lambda *arguments: min(break_even(*arguments), 1.0),
        "the rent is divided by the cost of an owned hour": lambda *arguments: 1 / break_even(*arguments),
        "the result is in per cent": lambda *arguments: 100 * break_even(*arguments),
    },
    hints=(
        "what does an owned GPU cost in an hour, used or not? And per hour of use, if it is used half of the time?",
        "at share u an owned hour of use costs (capital per hour + power per hour) / u; set that equal to the rent",
    ),
    section="chapter 00, section 3: how 5.6 million and 1.6 billion can both be true",
)

EXERCISES = [MOE_LAYER, TRAINING_HOURS, CACHE, DAY_OF_SERVING, BREAK_EVEN]
