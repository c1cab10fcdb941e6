"""Exercises of chapter 1, the dense transformer: the size of a cache, rotation, grouped queries, decoding, scores.

Beyond its arguments, the keywords of a reference change one step of it, for the known mistakes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from minids.config import ModelConfig
from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises.chapter01_rope import ROTATE, TO_NEIGHBOURS, rotate
from minids.course.exercises.mistakes import variants
from minids.course.observation import Observation

# 1.1 ---------------------------------------------------------------------------------------------------------------


def cache_bytes(
    config: ModelConfig, tokens: int, window: int, every: int, bits: int, *,
    kinds: str = "both", shorter: bool = True, full: Callable[[int, int], int] = lambda layers, every: layers // every,
    vectors: int = 2, key_heads: bool = True, per_byte: int = 8,
) -> int:  # fmt: skip
    layers = config.num_hidden_layers
    full_layers = {"both": full(layers, every), "full": layers, "local": 0}[kinds]
    held = min(window, tokens) if shorter else window
    entries = full_layers * tokens + (layers - full_layers) * held
    heads = config.num_key_value_heads if key_heads else config.num_attention_heads
    return entries * vectors * heads * config.v_head_dim * bits // per_byte


def _cache_examples(generator: torch.Generator) -> list[tuple]:
    wide = ModelConfig(attention="gqa", num_hidden_layers=126, num_key_value_heads=8, v_head_dim=128)
    nano = ModelConfig.preset("nano", attention="gqa", num_key_value_heads=1)
    return [
        (wide, 131_072, 1024, 6, 16),
        (wide.replace(num_hidden_layers=62), 4000, 512, 6, 16),
        (nano, 100, 128, 2, 32),
        (wide.replace(num_hidden_layers=20), 1000, 4096, 3, 4),
    ]


_NOT_BOTH = {"shorter": True, "full": lambda layers, every: layers // every}  # two mistakes that exclude each other
CACHE_BYTES = Function(
    id="1.1",
    name="cache_bytes",
    reference=cache_bytes,
    examples=_cache_examples,
    mistakes=variants(
        cache_bytes,
        {
            "all layers keep all tokens": {"kinds": "full", **_NOT_BOTH},
            "all layers keep only the window": {"kinds": "local", **_NOT_BOTH},
            "a layer with a window holds a full window even when there are fewer tokens": {"shorter": False},
            "the number of full layers is rounded up": {"full": lambda layers, every: -(-layers // every)},
            "only keys are counted, or only values": {"vectors": 1},
            "the query heads are counted instead of the key heads": {"key_heads": False},
            "bits are taken for bytes": {"per_byte": 1},
        },
    ),
    hints=(
        "count the entries of the two kinds of layers first, then multiply by the bytes of one entry",
        "layers // every layers hold `tokens` entries, the others min(window, tokens); an entry is a key and a value "
        "for each key head, of v_head_dim elements; 8 bits are a byte",
    ),
    section="chapter 01, section 7: capacity",
)

# 1.4 and 1.5 -------------------------------------------------------------------------------------------------------


def attend(
    query: Float[Tensor, "heads new dim"],
    key: Float[Tensor, "kv_heads slots dim"],
    value: Float[Tensor, "kv_heads slots dim"],
    *,
    order: str = "(g copies)",
    scale: Callable[[int], float] = math.sqrt,
    diagonal: Callable[[int, int], int] = lambda new, slots: slots - new,
) -> Float[Tensor, "heads new dim"]:
    copies = len(query) // len(key)
    key, value = (repeat(shared, f"g s d -> {order} s d", copies=copies) for shared in (key, value))
    scores = query @ key.mT / scale(query.shape[-1])
    visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(diagonal(*scores.shape[1:]))
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ value


def _ready_made(arguments: tuple, seen: Observation) -> str | None:
    used = [name for name in seen.functions if "attention" in name]
    return f"it calls torch's {used[0]}; write out scores, mask and softmax yourself" if used else None


def _attend_examples(generator: torch.Generator) -> list[tuple]:
    def example(heads: int, kv_heads: int, new: int, slots: int, dim: int) -> tuple:
        shapes = (heads, new, dim), (kv_heads, slots, dim), (kv_heads, slots, dim)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return [example(2, 2, 4, 4, 4), example(6, 2, 3, 5, 8), example(4, 1, 1, 7, 3), example(4, 2, 2, 2, 5)]


ATTEND = Function(
    id="1.4",
    name="attend",
    reference=attend,
    examples=_attend_examples,
    mistakes=variants(
        attend,
        {
            "the key heads are repeated in the order 0, 1, 0, 1 instead of 0, 0, 1, 1": {"order": "(copies g)"},
            "the scores are not divided by the root of dim": {"scale": lambda dim: 1.0},
            "the scores are divided by dim, not by its root": {"scale": float},
            "there is no mask": {"diagonal": lambda new, slots: slots},
            "the mask of a chunk begins at column 0, as if nothing were cached": {"diagonal": lambda new, slots: 0},
            "a token also attends to the one after it": {"diagonal": lambda new, slots: slots - new + 1},
        },
    ),
    hints=(
        "bring the key heads to the number of query heads first; then ask for each new token how many slots it may see",
        "new token i stands at position slots - new + i: torch.ones(new, slots).tril(slots - new); query head h uses "
        "key head h // (heads // kv_heads)",
    ),
    section="chapter 01, sections 2 and 5: attention, the mask of a chunk",
    points=2,
    cost=_ready_made,
)


def decode_step(
    x: Float[Tensor, "dim"],
    cache: Float[Tensor, "2 kv_heads seen head_dim"],
    q_proj: Float[Tensor, "q_out dim"],
    k_proj: Float[Tensor, "k_out dim"],
    v_proj: Float[Tensor, "k_out dim"],
    o_proj: Float[Tensor, "dim q_out"],
    *,
    shift: int = 0,
    turn_query: bool = True,
    turn_key: bool = True,
    turn_value: bool = False,
    see_itself: bool = True,
) -> tuple[Float[Tensor, "dim"], Float[Tensor, "2 kv_heads seen_and_one head_dim"]]:
    head_dim = cache.shape[-1]
    position = torch.tensor([cache.shape[2] + shift])
    rows = (rearrange(w @ x, "(h d) -> 1 h d", d=head_dim) for w in (q_proj, k_proj, v_proj))
    turned = zip(rows, (turn_query, turn_key, turn_value), strict=True)
    query, key, value = (rotate(each, position, 10000.0, head_dim) if turn else each for each, turn in turned)
    longer = torch.cat((cache, torch.stack((key, value)).transpose(1, 2)), 2)
    return o_proj @ attend(query.transpose(0, 1), *(longer if see_itself else cache)).flatten(), longer


def _decode_examples(generator: torch.Generator) -> list[tuple]:
    def example(heads: int, kv_heads: int, seen: int, head_dim: int, dim: int) -> tuple:
        q_out, k_out = heads * head_dim, kv_heads * head_dim
        shapes = (q_out, dim), (k_out, dim), (k_out, dim), (dim, q_out)
        weights = (torch.randn(shape, generator=generator) / math.sqrt(dim) for shape in shapes)
        cache = torch.randn(2, kv_heads, seen, head_dim, generator=generator)
        return torch.randn(dim, generator=generator), cache, *weights

    return [example(2, 2, 3, 4, 5), example(4, 2, 6, 2, 8), example(3, 1, 1, 6, 4)]


DECODE_STEP = Function(
    id="1.5",
    name="decode_step",
    reference=decode_step,
    examples=_decode_examples,
    mistakes=variants(
        decode_step,
        {
            "the new token gets the position of the last cached one": {"shift": -1},
            "the query is not rotated": {"turn_query": False},
            "the new key is cached without its rotation": {"turn_key": False},
            "the value is rotated too": {"turn_value": True},
            "the new token attends to the old cache and not to itself": {"see_itself": False},
        },
    ),
    hints=(
        "order of the steps: project, rotate, append to the cache, attend, project; what is rotated, and what is not?",
        "with `seen` tokens cached the new one stands at position `seen`, also for its query; the value is not rotated",
    ),
    section="chapter 01, section 5: the cache",
    points=3,
    outputs=("the output", "the new cache"),
)

# 1.6 ---------------------------------------------------------------------------------------------------------------

EXPONENT = Experiment(
    id="1.6",
    name="exponent",
    what="exponent with which the mean score grows with the width",
    low=0.93,
    high=1.07,
    hints=(
        "a power law is a straight line in logarithms: log(mean score) = exponent * log(width) + constant",
        "the slope of a least-squares line: ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum(), "
        "with x = log(width) and y = log(mean score); average the scores before taking the logarithm",
    ),
    section="chapter 01, section 2: why the scores are divided",
)

# 1.7 ---------------------------------------------------------------------------------------------------------------

TEST_ATTEND = SpotTheBug(
    id="1.7",
    name="test_attend",
    right=attend,
    bugs=(
        Bug(
            "the mask of a chunk begins at column 0, as if nothing were cached",
            partial(attend, diagonal=lambda new, slots: 0),
            "call it on a whole sequence, then on its last queries against all keys: are these outputs the same?",
        ),
        Bug(
            "query heads share key heads in the wrong order",
            partial(attend, order="(copies g)"),
            "with one key head it cannot be seen; try 4 query heads, 2 key heads and two very different values",
        ),
        Bug(
            "each token attends to the one after it",
            partial(attend, diagonal=lambda new, slots: slots - new + 1),
            "what must the first token of a sequence return, whatever comes later?",
        ),
    ),
    hints=(
        "for which inputs do you know the output without computing attention? Which two calls must agree?",
        "the first token of a sequence returns its own value, from the key head of its group; and "
        "attend(query[:, 3:], key, value) equals attend(query, key, value)[:, 3:]",
    ),
    section="chapter 01, section 5: the mask of a chunk",
)

# 1.8 ---------------------------------------------------------------------------------------------------------------

OWN_WALL = OpenTask(
    id="1.8",
    name="own_wall",
    rubric=(
        "both roofs were measured: GB/s from something that only reads, GFLOP/s from a large matrix product",
        "the ridge point follows from them, with its unit, and was predicted before the measurement",
        "attention was timed for at least four numbers of query heads per key head, at a context whose cache exceeds "
        "the processor's own caches",
        "it says which of the points are memory-bound and which compute-bound, and how far each is below its roof",
        "it names one thing that the roofline leaves out and that the measurement shows",
    ),
    hints=(
        "the sum of a tensor of 200 MB reads it once and computes next to nothing",
        "decode_step of section 7 with 64 query heads and 64, 32, 16, ..., 1 key heads; its FLOPs are 4 * heads * "
        "width * slots, its bytes those of key and value",
    ),
    section="chapter 01, section 7: measured here",
)

EXERCISES = [CACHE_BYTES, ROTATE, TO_NEIGHBOURS, ATTEND, DECODE_STEP, EXPONENT, TEST_ATTEND, OWN_WALL]
