"""Exercises of chapter 0, the cost of a model: parameters, a published slip, context, MLA against GQA, a bill."""

import math

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises.mistakes import variants

# Beyond its arguments, the keywords of a reference change one step of it, for the known mistakes.

# 0.1 Eight experts of seven billion -----------------------------------------------------------------------------------


def count_parameters(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, width: int, experts: int, chosen: int, vocab: int,
    *, shared_kv: bool = True, attentions: str = "one", router: str = "all", tables: int = 2, norms: str = "counted",
    matrices: int = 3, lookup: str = "not multiplied",
) -> tuple[int, int, int]:  # fmt: skip
    """Parameters stored, active and multiplied of a model of Mixtral's kind."""
    keys = kv_heads if shared_kv else heads
    attention = 2 * hidden * (heads + keys) * width
    expert = matrices * hidden * inner
    all_norms = (2 * layers + 1) * hidden if norms != "left out" else 0
    table = vocab * hidden

    def total(used: int) -> int:
        times = used if attentions == "one an expert" else 1
        rows = {"all": experts, "chosen": used, "left out": 0}[router]
        return layers * (times * attention + used * expert + rows * hidden) + all_norms + tables * table

    active = total(chosen)
    not_multiplied = (lookup == "not multiplied") * table + (norms != "multiplied") * all_norms
    return total(experts), active, active - not_multiplied


MIXTRAL = (4096, 14336, 32, 32, 8, 128, 8, 2, 32000)
PARAMETERS = Function(
    id="0.1",
    name="count_parameters",
    reference=count_parameters,
    examples=lambda generator: [
        MIXTRAL, (2048, 1408, 12, 16, 2, 96, 64, 6, 50_000),
        (16, 8, 2, 4, 1, 6, 3, 1, 40), (24, 10, 3, 6, 3, 8, 5, 2, 70),
    ],
    mistakes=variants(
        count_parameters,
        {
            "keys and values have as many heads as queries": {"shared_kv": False},
            "each expert has an attention of its own": {"attentions": "one an expert"},
            "a token uses only the router's rows of the experts that it chooses": {"router": "chosen"},
            "the router's own matrix is left out": {"router": "left out"},
            "one matrix serves as embedding and as head": {"tables": 1},
            "the norms are left out": {"norms": "left out"},
            "the norms are counted as multiplied": {"norms": "multiplied"},
            "an expert has two matrices": {"matrices": 2},
            "the embedding is counted as multiplied, although it is looked up": {"lookup": "multiplied"},
        },
    )
    | {"the results are in the other order": lambda *sizes: count_parameters(*sizes)[::-1]},
    hints=(
        "count one attention and one expert first; which parts exist once, however many experts there are?",
        "per layer: 2 * hidden * (heads + kv_heads) * width for attention, 3 * hidden * inner for an expert, "
        "hidden * experts for the router, 2 * hidden for norms; outside: two tables of vocab * hidden, one more norm",
    ),
    section="chapter 00, section 2: parameters stored, active and multiplied",
    points=2,
    outputs=("the parameters stored", "the parameters active", "the parameters multiplied"),
)  # fmt: skip

# 0.2 The slip behind "7.8 GB at 128K" ---------------------------------------------------------------------------------


def cache_bytes(layers: int, widths: tuple[int, ...], tokens: int, bits: float) -> float:
    """Bytes that all layers cache for `tokens` tokens; `widths` are those of the vectors of one token in one layer."""
    return layers * sum(widths) * tokens * bits / 8


CACHE = SpotTheBug(
    id="0.2",
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
            "it counts keys and values separately, although the latent serves as both",
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
    section="chapter 00, section 5: the KV cache",
)

# 0.3 From which context on attention is most of the work --------------------------------------------------------------

CROSSING = 640.0  # 2 * 40,960 parameters of a layer / (2 * 2 * 64 FLOPs a key, of which a causal model needs half)

CONTEXT = Experiment(
    id="0.3",
    name="crossing",
    what="context at which attention costs as much as the parameters, tokens",
    low=0.99 * CROSSING,
    high=1.01 * CROSSING,
    hints=(
        "the FLOPs of T tokens are a T + b T²: two measurements determine a and b",
        "with f(T) the FLOPs per token, b = (f(2T) - f(T)) / T; PyTorch counts every key, a causal model needs half of "
        "them, so the two parts are equal where a = b T / 2",
    ),
    section="chapter 00, section 3: from the config to the FLOPs",
)

# 0.4 MLA against GQA --------------------------------------------------------------------------------------------------


def decode_time(
    heads: int, kv_heads: int, width: int, rank: int, rotary: int, tokens: int, peak: float, bandwidth: float, *,
    combine: str = "max", per_value: int = 2, both: bool = True, reads: str = "once", twice: bool = False,
    operations: int = 2, keys: bool = True,
) -> tuple[float, float]:  # fmt: skip
    """Microseconds of one layer's attention in a decode step over `tokens` cached ones: GQA, absorbed MLA."""
    copies = heads if reads == "once a head" else 1
    gqa_values = (1 + both) * kv_heads * width * (copies / kv_heads if reads == "once a head" else 1)
    mla_values = ((rank + rotary) + (rank if twice else 0)) * copies
    gqa_flops = operations * heads * (width + both * width)
    mla_flops = operations * heads * ((rank + keys * rotary) + rank)

    def time(flops: float, values: float) -> float:
        arithmetic, memory = 1e6 * tokens * flops / peak, 1e6 * tokens * per_value * values / bandwidth
        return {"max": max(arithmetic, memory), "sum": arithmetic + memory, "min": min(arithmetic, memory)}[combine]

    return time(gqa_flops, gqa_values), time(mla_flops, mla_values)


BREAK_EVEN = Function(
    id="0.4",
    name="decode_time",
    reference=decode_time,
    examples=lambda generator: [
        (128, 8, 128, 512, 64, 131_072, 989.5e12, 3.35e12),  # V3's MLA on an H800: both are memory-bound
        (
            128,
            8,
            128,
            512,
            64,
            131_072,
            150e12,
            4e12,
        ),  # a chip with little arithmetic: MLA is compute-bound, GQA is not
        (16, 2, 64, 96, 32, 100_000, 0.5e12, 1e12),
        (64, 32, 32, 40, 24, 50_000, 6e12, 0.9e12),
    ],
    mistakes=variants(
        decode_time,
        {
            "the two times are added, although a GPU reads and computes at once": {"combine": "sum"},
            "the shorter of the two times is taken": {"combine": "min"},
            "a value has one byte": {"per_value": 1},
            "a multiply-add is counted as one operation": {"operations": 1},
            "the cache is read once for each query head": {"reads": "once a head"},
            "the latent is read twice, as key and as value": {"twice": True},
            "the rotary key is not multiplied": {"keys": False},
        },
    )
    | {
        "keys are counted and values are not, in GQA": lambda *sizes: decode_time(*sizes, both=False),
        "the results are in the other order": lambda *sizes: decode_time(*sizes)[::-1],
    },
    hints=(
        "for each kind: how many FLOPs does a cached token cost, how many bytes are read for it? The longer counts",
        "GQA: 4 * heads * width FLOPs, 4 * kv_heads * width bytes. MLA: 2 * heads * (2 * rank + rotary) FLOPs, "
        "2 * (rank + rotary) bytes, read once for all heads",
    ),
    section="chapter 00, section 5: the KV cache",
    points=2,
    outputs=("the microseconds of GQA", "the microseconds of MLA"),
)

# 0.5 A bill of your own -----------------------------------------------------------------------------------------------

OWN_BILL = OpenTask(
    id="0.5",
    name="own_bill",
    rubric=(
        "the prediction was written down first, and the page says how far off it was and why",
        "stored, active and multiplied parameters are told apart, and compared with what the model card says",
        "each number is marked: computed from the config, reported (by whom, where), or assumed",
        "at least one number is varied over the range in which it may lie, and the bill is given as a range",
        "where a published number of hours exists, the utilisation that follows from it is judged against 25 to 43 %",
    ),
    hints=(
        "cost.read_config(\"path/to/config.json\") reads configs of DeepSeek's, Llama's and Qwen2's kind",
        "cost.training_flops_per_token, cost.gpu_hours_by_mfu and cost.rent_usd, in this order, make the bill",
    ),
    section="chapter 00, section 3: from parameters to GPU-hours",
)

EXERCISES = [PARAMETERS, CACHE, CONTEXT, BREAK_EVEN, OWN_BILL]
