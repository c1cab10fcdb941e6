"""Exercises of chapter 1, the dense transformer: norm, rotation, grouped queries, the cache and its size.

Beyond its arguments, the keywords of a reference change one step of it, for the known mistakes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from minids.config import ModelConfig
from minids.course.checks import Bug, Function, SpotTheBug
from minids.course.exercises.mistakes import variants
from minids.course.observation import Observation

# 1.1 ---------------------------------------------------------------------------------------------------------------


def rms_norm(
    x: Float[Tensor, "... dim"], weight: Float[Tensor, "dim"], eps: float, *,
    centred: bool = False, eps_inside: bool = True,
    mean: Callable[[Tensor], Tensor] = lambda y: y.mean(-1, keepdim=True),
    gain: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> Float[Tensor, "... dim"]:  # fmt: skip
    x = x - x.mean(-1, keepdim=True) if centred else x
    mean_square = mean(x.square())
    root = torch.sqrt(mean_square + eps) if eps_inside else mean_square.sqrt() + eps
    return x / root * gain(weight)


def _norm_examples(generator: torch.Generator) -> list[tuple]:
    def example(shape: tuple[int, ...], eps: float, size: float = 1.0) -> tuple:
        return size * torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator), eps

    return [example((2,), 1e-6), example((2, 3, 5), 0.01, 0.1), example((4, 1), 0.1)]


RMS_NORM = Function(
    id="1.1",
    name="rms_norm",
    reference=rms_norm,
    examples=_norm_examples,
    mistakes=variants(
        rms_norm,
        {
            "the mean is subtracted first, as in LayerNorm": {"centred": True},
            "eps is added to the root instead of under it": {"eps_inside": False},
            "the squares are summed, not averaged": {"mean": lambda y: y.sum(-1, keepdim=True)},
            "all vectors are divided by one common root mean square": {"mean": lambda y: y.mean()},
            "`weight` is not used": {"gain": torch.ones_like},
            "the result is multiplied by 1 + `weight`": {"gain": lambda weight: 1 + weight},
        },
    )
    | {"eps is left out": lambda x, weight, eps: rms_norm(x, weight, 0.0)},
    hints=(
        "three steps: the mean of each vector's squares, the root, and the scaling; over which dimension is the mean?",
        "a vector is a slice along the last dimension: mean(-1, keepdim=True) of its squares, plus eps, then the root",
    ),
    section="chapter 01, section 2: RMSNorm",
)

# 1.2 and 1.3 -------------------------------------------------------------------------------------------------------


def rotate(
    x: Float[Tensor, "seq heads dim"], positions: Int[Tensor, "seq"], theta: float, *,
    exponent: float = 2, halves: bool = False, interleaved: bool = True, direction: int = 1,
    place: Callable[[Tensor], Tensor] = lambda positions: positions,
) -> Float[Tensor, "seq heads dim"]:  # fmt: skip
    if halves:
        x = rearrange(x, "t h (pair i) -> t h (i pair)", pair=2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angle = (
        direction * place(positions)[:, None, None] * theta ** (-exponent * torch.arange(pairs.shape[-1]) / x.shape[-1])
    )
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return turned if interleaved and not halves else rearrange(turned, "t h (i pair) -> t h (pair i)", pair=2)


def _rotate_examples(generator: torch.Generator) -> list[tuple]:
    def example(positions: list[int], heads: int, dim: int, theta: float = 10000.0) -> tuple:
        return torch.randn(len(positions), heads, dim, generator=generator), torch.tensor(positions), theta

    return [example([0, 1], 1, 2), example([0, 1, 2, 3, 4], 2, 8), example([7], 3, 6, 100.0), example([5, 2, 90], 1, 4)]


ROTATE = Function(
    id="1.2",
    name="rotate",
    reference=rotate,
    examples=_rotate_examples,
    mistakes=variants(
        rotate,
        {
            "channel i is paired with i + dim/2 instead of its neighbour": {"halves": True},
            "the pairs are rotated correctly, but then concatenated (torch.cat), not interleaved": {
                "interleaved": False,
                "halves": False,
            },
            "row t is placed at position t, whatever `positions` says": {"place": lambda p: torch.arange(len(p))},
            "every position is one too large": {"place": lambda positions: positions + 1},
            "the pairs are rotated clockwise": {"direction": -1},
            "pair i has frequency theta^(-i/dim), without the 2 in the exponent": {"exponent": 1},
        },
    ),
    hints=(
        "write down the angles as a table of rows by pairs first; then rotate a pair (a, b) by one angle",
        "a, b = x[..., 0::2], x[..., 1::2]; the angles need a dimension of 1 for the heads; torch.stack(..., -1) and "
        "flatten(-2) put the pairs back in place",
    ),
    section="chapter 01, section 2: RoPE",
    points=2,
)


def to_halves(
    weight: Float[Tensor, "out dim"], heads: int, *,
    by_head: bool = True, order: str = "(h i pair) d -> (h pair i) d", odd_first: bool = False,
) -> Float[Tensor, "out dim"]:  # fmt: skip
    weight = weight.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) if odd_first else weight
    return rearrange(weight, order, h=heads if by_head else 1, pair=2)


def _weight_examples(generator: torch.Generator) -> list[tuple]:
    return [
        (torch.arange(12.0)[:, None] * torch.ones(1, 2), 2),
        (torch.randn(24, 6, generator=generator), 3),
        (torch.randn(16, 4, generator=generator), 1),
    ]


TO_HALVES = Function(
    id="1.3",
    name="to_halves",
    reference=to_halves,
    examples=_weight_examples,
    mistakes=variants(
        to_halves,
        {
            "even and odd rows are taken from the whole matrix and not from each head": {"by_head": False},
            "the reordering goes the other way, from halves to neighbours": {
                "order": "(h pair i) d -> (h i pair) d",
                "odd_first": False,
            },
            "the odd rows come first": {"odd_first": True},
        },
    )
    | {
        "the columns are reordered instead of the rows": lambda w, heads: torch.cat((w[:, 0::2], w[:, 1::2]), 1),
    },
    hints=(
        "separate the heads before anything else; then the order of rows is the same in each of them",
        "within each head's rows: 0, 2, 4, ..., 1, 3, 5, ...; print it for torch.arange(12.)[:, None] and 2 heads",
    ),
    section="chapter 01, section 4: pairs of neighbours, or pairs of halves",
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
    query, key, value = (rotate(each, position, 10000.0) if turn else each for each, turn in turned)
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


def cache_bytes(
    config: ModelConfig, tokens: int, bits: int, *,
    layers: bool = True, vectors: int = 2, key_heads: bool = True, per_byte: int = 8,
) -> int:  # fmt: skip
    heads = config.num_key_value_heads if key_heads else config.num_attention_heads
    numbers = vectors * heads * config.v_head_dim * (config.num_hidden_layers if layers else 1)
    return numbers * tokens * bits // per_byte


def _cache_examples(generator: torch.Generator) -> list[tuple]:
    llama = ModelConfig(attention="gqa", num_hidden_layers=126, num_key_value_heads=8, v_head_dim=128)
    nano = ModelConfig.preset("nano", attention="gqa", num_key_value_heads=1)
    return [(llama, 1, 16), (llama.replace(num_hidden_layers=80), 131_072, 16), (nano, 100, 32), (llama, 1000, 4)]


CACHE_BYTES = Function(
    id="1.6",
    name="cache_bytes",
    reference=cache_bytes,
    examples=_cache_examples,
    mistakes=variants(
        cache_bytes,
        {
            "the layers are left out": {"layers": False},
            "only keys are counted, or only values": {"vectors": 1},
            "the query heads are counted instead of the key heads": {"key_heads": False},
            "bits are taken for bytes": {"per_byte": 1},
        },
    ),
    hints=(
        "what is cached for one token in one layer? Multiply from there: layers, tokens, bytes",
        "a key and a value, for each key head, of v_head_dim values, in each layer, for each token; 8 bits are a byte",
    ),
    section="chapter 01, section 7: at full scale",
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

EXERCISES = [RMS_NORM, ROTATE, TO_HALVES, ATTEND, DECODE_STEP, CACHE_BYTES, TEST_ATTEND]
