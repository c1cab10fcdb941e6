"""Exercises of chapter 5: merges, packing, bits per byte, V3's schedule, a scaling law, and a test for micro-batches.

Tokens are lists of ids where a text is cut up, and tensors where a network reads them.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Function, SpotTheBug
from minids.training.loss import IGNORED

# 5.1 BPE ------------------------------------------------------------------------------------------------------------


def encode(data: bytes, merges: Sequence[tuple[int, int]]) -> list[int]:
    """The ids of a word: merge number i makes id 256 + i of a pair, the oldest merges first."""
    ids = list(data)
    for new, pair in enumerate(merges, start=256):
        ids = join(ids, pair, new)
    return ids


def join(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair
        out.append(new if found else ids[i])
        i += 1 + found
    return out


def encode_newest_first(data, merges):
    ids = list(data)
    for number in reversed(range(len(merges))):
        ids = join(ids, merges[number], 256 + number)
    return ids


def encode_first_occurrence(data, merges):
    ids = list(data)
    for new, pair in enumerate(merges, start=256):
        place = next((i for i in range(len(ids) - 1) if tuple(ids[i : i + 2]) == pair), None)
        if place is not None:
            ids[place : place + 2] = [new]
    return ids


def merge_examples(g: Generator) -> list[tuple]:
    a, b, c = b"abc"
    return [
        (b"abcab", [(a, b), (256, c)]),
        (b"aaaaa", [(a, a), (256, 256)]),
        (b"abababc", [(b, a), (a, b), (257, c), (256, 256)]),
        (b"", [(a, b)]),
        (b"cab", []),
    ]


# 5.2 Packing --------------------------------------------------------------------------------------------------------


def pack(
    documents: Sequence[Sequence[int]], seq_len: int, shared: int = 1, mask: bool = True, shift: int = 1
) -> tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]:
    """Inputs and labels of all full rows; labels that belong to another document than their input are IGNORED."""
    stream = torch.tensor([token for document in documents for token in document])
    owner = torch.tensor([i for i, document in enumerate(documents) for _ in document])
    starts = range(0, len(stream) - seq_len, seq_len + 1 - shared)
    inputs = torch.stack([stream[i : i + seq_len] for i in starts])
    labels = torch.stack([stream[i + shift : i + shift + seq_len] for i in starts])
    crosses = torch.stack([owner[i + 1 : i + 1 + seq_len] != owner[i : i + seq_len] for i in starts])
    return inputs, labels.masked_fill(crosses & mask, IGNORED)


def pack_examples(g: Generator) -> list[tuple]:
    def example(lengths, seq_len):
        return [torch.randint(100, (n,), generator=g).tolist() for n in lengths], seq_len

    return [example((5, 3, 5), 4), example((9, 2, 2, 7), 3), example((1, 1, 11), 5), example((20,), 6)]


# 5.3 Bits per byte --------------------------------------------------------------------------------------------------


def bits_per_byte(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    token_bytes: Int[Tensor, "vocab"],
    per_row: bool = False,
    unit: float = math.log(2),
    per_token: bool = False,
) -> float:
    """All bits over all bytes; a label may be IGNORED."""
    counted = labels != IGNORED
    nats = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    weights = (token_bytes[labels.clamp(min=0)] if not per_token else 1) * counted
    if per_row:
        return (nats.sum(1) / unit / weights.sum(1)).mean().item()
    return (nats.sum() / unit / weights.sum()).item()


def bits_examples(g: Generator) -> list[tuple]:
    def example(batch, seq, vocab, ignored):
        labels = torch.randint(vocab, (batch, seq), generator=g)
        labels[0, :ignored] = IGNORED
        return torch.randn(batch, seq, vocab, generator=g), labels, torch.randint(1, 9, (vocab,), generator=g)

    return [example(2, 5, 7, 2), example(3, 4, 11, 1), example(4, 6, 3, 3)]


# 5.4 V3's schedule --------------------------------------------------------------------------------------------------


def learning_rate(
    tokens: float, begins: float = 10.0, goal: float = 2.2e-5, last: float = 7.3e-6, cosine: bool = True
) -> float:
    """V3's learning rate after `tokens` trillion tokens, without the warm-up (V3 section 4.2)."""
    if tokens >= 14.633:
        return last
    part = min(max((tokens - begins) / (14.3 - begins), 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * part)) if cosine else 1 - part
    return goal + (2.2e-4 - goal) * left


def schedule_examples(g: Generator) -> list[tuple]:
    return [(tokens,) for tokens in (2.0, 10.0, 11.0, 12.15, 13.9, 14.4, 14.7)]


# 5.5 A scaling law --------------------------------------------------------------------------------------------------


def predict(
    flops: Float[Tensor, "runs"],
    losses: Float[Tensor, "runs"],
    target: float,
    floor: float,
    keep_floor: bool = True,
    log_x: bool = True,
    log_y: bool = True,
) -> float:
    """The loss at `target` by floor + A * C^-alpha: a straight line through the logarithms by least squares."""
    gap = losses.double() - floor * keep_floor
    x, y = (values.log() if wanted else values for values, wanted in ((flops.double(), log_x), (gap, log_y)))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    reached = y.mean() + slope * ((math.log(target) if log_x else target) - x.mean())
    return (reached.exp() if log_y else reached).item() + floor * keep_floor


def law_examples(g: Generator) -> list[tuple]:
    def example(runs, floor, alpha, target):
        flops = 10 ** torch.linspace(9, 12, runs, dtype=torch.float64)
        noise = 1 + 0.02 * torch.randn(runs, generator=g, dtype=torch.float64)
        return flops, floor + 40 * flops**-alpha * noise, target, floor

    return [example(4, 1.0, 0.12, 1e13), example(6, 0.5, 0.1, 4e12), example(3, 1.5, 0.15, 1e14)]


def forgetting_the_floor(flops, losses, target, floor):
    return predict(flops, losses, target, floor) - floor


# 5.6 Micro-batches --------------------------------------------------------------------------------------------------


def micro_step(
    alike: bool = False, clip_each: bool = False, bias_each: bool = False, drop_last: bool = False
) -> Callable:
    """One step of a toy model in micro-batches of `size` rows, right or wrong (PITFALLS 13 and bug o)."""

    def step(
        weight: Float[Tensor, "dim"],
        x: Float[Tensor, "rows seq dim"],
        y: Float[Tensor, "rows seq"],
        counted: Float[Tensor, "rows seq"],
        experts: Int[Tensor, "rows seq"],
        size: int,
    ) -> tuple[Float[Tensor, "dim"], Float[Tensor, "4"]]:
        """The clipped gradient of the mean squared error over counted labels, and how the biases of 4 experts move."""
        gradient, load, bias = torch.zeros_like(weight), torch.zeros(4), torch.zeros(4)
        parts = range(0, len(x), size)
        for i in parts[:-1] if drop_last and len(x) % size else parts:
            some = slice(i, i + size)
            error = (x[some] @ weight - y[some]) * counted[some]
            share = counted[some].sum() * len(parts) if alike else counted.sum()
            part = 2 * (error[..., None] * x[some]).sum((0, 1)) / share
            gradient += clipped(part) if clip_each else part
            here = torch.bincount(experts[some].flatten(), minlength=4).float()
            load, bias = load + here, bias + torch.sign(here.mean() - here)
        return (gradient if clip_each else clipped(gradient)), bias if bias_each else torch.sign(load.mean() - load)

    return step


def clipped(gradient: Float[Tensor, "dim"]) -> Float[Tensor, "dim"]:
    return gradient / max(gradient.norm().item(), 1.0)


EXERCISES = [
    Function(
        id="5.1",
        name="encode",
        reference=encode,
        examples=merge_examples,
        mistakes={
            "the newest merges come first": encode_newest_first,
            "a merge replaces only the first occurrence": encode_first_occurrence,
        },
        hint="for each merge in turn, walk through the ids from left to right and build a new list",
        points=2,
    ),
    Function(
        id="5.2",
        name="pack",
        reference=pack,
        examples=pack_examples,
        mistakes={
            "neighbouring rows share no token, so that some tokens are no label": functools.partial(pack, shared=0),
            "labels of other documents are kept": functools.partial(pack, mask=False),
            "the labels are the inputs": functools.partial(pack, shift=0),
        },
        hint="row r starts at token r * seq_len of the stream and needs seq_len + 1 tokens",
        points=2,
        outputs=("the inputs", "the labels"),
    ),
    Function(
        id="5.3",
        name="bits_per_byte",
        reference=bits_per_byte,
        examples=bits_examples,
        mistakes={
            "nats are taken for bits": functools.partial(bits_per_byte, unit=1.0),
            "it is divided by tokens and not by bytes": functools.partial(bits_per_byte, per_token=True),
            "each row is divided by its own bytes": functools.partial(bits_per_byte, per_row=True),
        },
        hint="one sum of bits over one sum of bytes; F.cross_entropy has an ignore_index and reduction='sum'",
    ),
    Function(
        id="5.4",
        name="learning_rate",
        reference=learning_rate,
        examples=schedule_examples,
        mistakes={
            "the cosine begins at the first token": functools.partial(learning_rate, begins=0.0),
            "it falls to 0": functools.partial(learning_rate, goal=0.0),
            "it falls in a straight line": functools.partial(learning_rate, cosine=False),
            "the last 167 billion tokens are forgotten": functools.partial(learning_rate, last=2.2e-5),
        },
        hint="half a cosine falls from 1 to 0: 0.5 * (1 + cos(pi * part)) for part from 0 to 1",
    ),
    Function(
        id="5.5",
        name="predict",
        reference=predict,
        examples=law_examples,
        mistakes={
            "the floor is not added again": forgetting_the_floor,
            "the floor is not taken off": functools.partial(predict, keep_floor=False),
            "the line goes through the losses and not their logarithms": functools.partial(predict, log_y=False),
            "compute is not on a logarithmic scale": functools.partial(predict, log_x=False),
        },
        hint="log(loss - floor) = log A - alpha log C is a line in log C; fit it by least squares, then undo both",
        points=2,
    ),
    SpotTheBug(
        id="5.6",
        name="test_micro_batches",
        right=micro_step(),
        bugs=(
            Bug("micro-batches count alike, whatever labels they have", micro_step(alike=True), "mask some labels"),
            Bug("every micro-batch is clipped by itself", micro_step(clip_each=True), "make the gradient long"),
            Bug("biases move once per micro-batch (pitfall 13)", micro_step(bias_each=True), "look at the biases too"),
            Bug("a smaller last micro-batch is dropped", micro_step(drop_last=True), "take 5 rows, 2 at a time"),
        ),
    ),
]
