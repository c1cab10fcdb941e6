"""Chapter 1, the dense transformer: norm, rotation, grouped queries, the cache and its size."""

import math
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minids.config import ModelConfig
from minids.course.checks import Bug, Function, SpotTheBug

# 1.1 ---------------------------------------------------------------------------------------------------------------


def rms_norm(x: Float[Tensor, "... dim"], weight: Float[Tensor, "dim"], eps: float) -> Float[Tensor, "... dim"]:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _norm_examples(generator: torch.Generator) -> list[tuple]:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    small = 0.1 * numbers(2, 3, 5)  # eps matters beside it
    return [(numbers(2), torch.ones(2), 1e-6), (small, numbers(5), 0.01), (numbers(4, 1), numbers(1), 0.1)]


def _layer_norm(x, weight, eps):
    return rms_norm(x - x.mean(-1, keepdim=True), weight, eps)


def _eps_outside(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def _sum_for_mean(x, weight, eps):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) * weight


def _one_scale_for_all(x, weight, eps):
    return x * torch.rsqrt(x.square().mean() + eps) * weight


RMS_NORM = Function(
    id="1.1",
    name="rms_norm",
    reference=rms_norm,
    examples=_norm_examples,
    mistakes={
        "the mean is subtracted first, as in LayerNorm": _layer_norm,
        "eps is added to the root instead of under it": _eps_outside,
        "the squares are summed, not averaged": _sum_for_mean,
        "all vectors are divided by one common size": _one_scale_for_all,
    },
    hint="each vector lies along the last dimension: mean(-1, keepdim=True) of its squares, plus eps, then the root",
)

# 1.2 and 1.3. From here on the keywords of a reference are ways to go wrong, for the mistakes. ---------------------


def rotate(
    x: Float[Tensor, "seq heads dim"], positions: Int[Tensor, "seq"], theta: float, *, exponent: float = 2
) -> Float[Tensor, "seq heads dim"]:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angle = positions[:, None, None] * theta ** (-exponent * torch.arange(pairs.shape[-1]) / x.shape[-1])
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def _rotate_examples(generator: torch.Generator) -> list[tuple]:
    def example(positions: list[int], heads: int, dim: int, theta: float = 10000.0) -> tuple:
        return torch.randn(len(positions), heads, dim, generator=generator), torch.tensor(positions), theta

    return [example([0, 1], 1, 2), example([0, 1, 2, 3, 4], 2, 8), example([7], 3, 6, 100.0), example([5, 2, 90], 1, 4)]


def _rotate_halves(x, positions, theta):
    neighbours = rearrange(x, "t h (pair i) -> t h (i pair)", pair=2)
    return rearrange(rotate(neighbours, positions, theta), "t h (i pair) -> t h (pair i)", pair=2)


ROTATE = Function(
    id="1.2",
    name="rotate",
    reference=rotate,
    examples=_rotate_examples,
    mistakes={
        "number i is paired with i + dim/2 instead of its neighbour": _rotate_halves,
        "row t is taken to stand at position t, whatever `positions` says": lambda x, positions, theta: rotate(
            x, torch.arange(len(x)), theta
        ),
        "the pairs are turned clockwise": lambda x, positions, theta: rotate(x, -positions, theta),
        "pair i has frequency theta^(-i/dim): the 2 in the exponent is missing": partial(rotate, exponent=1),
    },
    hint="x[..., 0::2] and x[..., 1::2] are the two numbers of each pair; the angles need a dimension for the heads",
    points=2,
)


def to_halves(weight: Float[Tensor, "out dim"], heads: int) -> Float[Tensor, "out dim"]:
    return rearrange(weight, "(h i pair) d -> (h pair i) d", h=heads, pair=2)


def _weight_examples(generator: torch.Generator) -> list[tuple]:
    return [
        (torch.arange(12.0)[:, None] * torch.ones(1, 2), 2),
        (torch.randn(24, 5, generator=generator), 3),
        (torch.randn(16, 3, generator=generator), 1),
    ]


TO_HALVES = Function(
    id="1.3",
    name="to_halves",
    reference=to_halves,
    examples=_weight_examples,
    mistakes={
        "even and odd rows are taken from the whole matrix and not from each head": lambda w, h: to_halves(w, 1),
        "the reordering goes the other way, from halves to neighbours": lambda weight, heads: rearrange(
            weight, "(h pair i) d -> (h i pair) d", h=heads, pair=2
        ),
        "the columns are reordered instead of the rows": lambda weight, heads: torch.cat(
            (weight[:, 0::2], weight[:, 1::2]), 1
        ),
    },
    hint="within each head's rows: 0, 2, 4, ..., 1, 3, 5, ...; print it for torch.arange(12.)[:, None] and 2 heads",
)

# 1.4 and 1.5 -------------------------------------------------------------------------------------------------------


def _last_of_all(new: int, slots: int) -> Bool[Tensor, "new slots"]:
    return torch.ones(new, slots, dtype=torch.bool).tril(slots - new)


def attend(
    query: Float[Tensor, "heads new dim"],
    key: Float[Tensor, "kv_heads slots dim"],
    value: Float[Tensor, "kv_heads slots dim"],
    *,
    order: str = "(g copies)",
    scaled: bool = True,
    visible: Callable[[int, int], Tensor] = _last_of_all,
) -> Float[Tensor, "heads new dim"]:
    copies = len(query) // len(key)
    key, value = (repeat(shared, f"g s d -> {order} s d", copies=copies) for shared in (key, value))
    scores = query @ key.mT / (math.sqrt(query.shape[-1]) if scaled else 1)
    mask = visible(query.shape[1], key.shape[1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ value


_wrong_groups = partial(attend, order="(copies g)")
_square_mask = partial(attend, visible=lambda new, slots: torch.ones(new, slots).tril() > 0)
_sees_one_ahead = partial(attend, visible=lambda new, slots: torch.ones(new, slots).tril(slots - new + 1) > 0)


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
    mistakes={
        "the key heads are repeated in the order 0, 1, 0, 1 instead of 0, 0, 1, 1": _wrong_groups,
        "the scores are not divided by the root of dim": partial(attend, scaled=False),
        "there is no mask": partial(attend, visible=lambda new, slots: torch.ones(new, slots) > 0),
        "the mask of a chunk begins at column 0, as if nothing were cached": _square_mask,
        "a token also sees the one after it": _sees_one_ahead,
    },
    hint="new token i stands at position slots - new + i; query head h reads key head h // (heads // kv_heads)",
    points=2,
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
    turn_key: bool = True,
    turn_value: bool = False,
    see_itself: bool = True,
) -> tuple[Float[Tensor, "dim"], Float[Tensor, "2 kv_heads seen_and_one head_dim"]]:
    head_dim = cache.shape[-1]
    position = torch.tensor([cache.shape[2] + shift])
    query, key, value = (rearrange(w @ x, "(h d) -> 1 h d", d=head_dim) for w in (q_proj, k_proj, v_proj))
    query = rotate(query, position, 10000.0)
    key = rotate(key, position, 10000.0) if turn_key else key
    value = rotate(value, position, 10000.0) if turn_value else value
    longer = torch.cat((cache, torch.stack((key, value)).transpose(1, 2)), 2)
    return o_proj @ attend(query.transpose(0, 1), *(longer if see_itself else cache)).flatten(), longer


def _decode_examples(generator: torch.Generator) -> list[tuple]:
    def example(heads: int, kv_heads: int, seen: int, head_dim: int, dim: int) -> tuple:
        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        q_out, k_out = heads * head_dim, kv_heads * head_dim
        shapes = (q_out, dim), (k_out, dim), (k_out, dim), (dim, q_out)
        weights = (numbers(*shape) / math.sqrt(dim) for shape in shapes)
        return numbers(dim), numbers(2, kv_heads, seen, head_dim), *weights

    return [example(2, 2, 3, 4, 5), example(4, 2, 6, 2, 8), example(3, 1, 1, 6, 4)]


DECODE_STEP = Function(
    id="1.5",
    name="decode_step",
    reference=decode_step,
    examples=_decode_examples,
    mistakes={
        "the new token is taken to stand at the position of the last cached one": partial(decode_step, shift=-1),
        "the new key goes into the cache without its rotation": partial(decode_step, turn_key=False),
        "the value is turned too; only queries and keys are": partial(decode_step, turn_value=True),
        "the new token attends to the old cache and not to itself": partial(decode_step, see_itself=False),
    },
    hint="with `seen` tokens cached the new one stands at position `seen`; append first, attend afterwards",
    points=3,
    outputs=("the output", "the new cache"),
)

# 1.6 ---------------------------------------------------------------------------------------------------------------


def cache_bytes(config: ModelConfig, tokens: int, bits: int) -> int:
    width = 2 * config.num_key_value_heads * config.v_head_dim
    return config.num_hidden_layers * width * tokens * bits // 8


def _cache_examples(generator: torch.Generator) -> list[tuple]:
    llama = ModelConfig(attention="gqa", num_hidden_layers=126, num_key_value_heads=8, v_head_dim=128)
    nano = ModelConfig.preset("nano", attention="gqa", num_key_value_heads=1)
    return [(llama, 1, 16), (llama.replace(num_hidden_layers=80), 131_072, 16), (nano, 100, 32), (llama, 1000, 8)]


CACHE_BYTES = Function(
    id="1.6",
    name="cache_bytes",
    reference=cache_bytes,
    examples=_cache_examples,
    mistakes={
        "the layers are forgotten": lambda c, tokens, bits: cache_bytes(c, tokens, bits) // c.num_hidden_layers,
        "only keys are counted, or only values": lambda c, tokens, bits: cache_bytes(c, tokens, bits) // 2,
        "the query heads are counted instead of the key heads": lambda c, tokens, bits: cache_bytes(
            c.replace(num_key_value_heads=c.num_attention_heads), tokens, bits
        ),
        "bits are taken for bytes": lambda c, tokens, bits: cache_bytes(c, tokens, bits) * 8,
    },
    hint="a key and a value, for each key head, of v_head_dim numbers, in each layer and for each token",
)

# 1.7 ---------------------------------------------------------------------------------------------------------------

TEST_ATTEND = SpotTheBug(
    id="1.7",
    name="test_attend",
    right=attend,
    bugs=(
        Bug(
            "the mask of a chunk stands as if nothing were cached",
            _square_mask,
            "read a text at once, then only its last tokens against all keys: are these outputs the same?",
        ),
        Bug(
            "query heads share key heads in the wrong order",
            _wrong_groups,
            "with one key head it cannot be seen; try 4 query heads, 2 key heads and two very different values",
        ),
        Bug(
            "each token sees the one after it",
            _sees_one_ahead,
            "what must the first token of a text return, whatever comes later?",
        ),
    ),
)

EXERCISES = [RMS_NORM, ROTATE, TO_HALVES, ATTEND, DECODE_STEP, CACHE_BYTES, TEST_ATTEND]
