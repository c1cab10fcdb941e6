"""Exercises of chapter 5: merges, packing, bits per byte, V3's schedule, a scaling law, and a test for micro-batches.

Tokens are lists of ids where a text is split, and tensors where they are inputs of a network. Beyond its arguments, the
keywords of a reference change one step of it, for the known mistakes and the planted bugs.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Function, SpotTheBug
from minids.course.exercises.mistakes import Changes, variants
from minids.training.loss import IGNORED

# 5.1 BPE ------------------------------------------------------------------------------------------------------------


def encode(
    data: bytes, merges: Sequence[tuple[int, int]], *,
    newest_first: bool = False, first_only: bool = False, from_the_right: bool = False, first_id: int = 256,
) -> list[int]:  # fmt: skip
    """The ids of a word: merge number i makes id 256 + i of a pair, the oldest merges first."""
    ids = list(data)
    numbered = list(enumerate(merges, start=first_id))
    for new, pair in reversed(numbered) if newest_first else numbered:
        if from_the_right:
            ids = join(ids[::-1], (pair[1], pair[0]), new, first_only)[::-1]
        else:
            ids = join(ids, pair, new, first_only)
    return ids


def join(ids: list[int], pair: tuple[int, int], new: int, first_only: bool = False) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair and not (first_only and new in out)
        out.append(new if found else ids[i])
        i += 1 + found
    return out


ENCODE_MISTAKES: Changes = {
    "the newest merges come first": {"newest_first": True},
    "a merge replaces only the first occurrence": {"first_only": True, "from_the_right": False},
    "a merge goes from right to left": {"from_the_right": True},
    "the new ids begin at 257, not at 256": {"first_id": 257, "newest_first": False},
}


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
    documents: Sequence[Sequence[int]], seq_len: int, *,
    shared: int = 1, mask: str = "document", shift: int = 1, ignored: int = IGNORED,
) -> tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]:  # fmt: skip
    """Inputs and labels of all full rows; labels that belong to another document than their input are IGNORED."""
    stream = torch.tensor([token for document in documents for token in document])
    owner = torch.tensor([i for i, document in enumerate(documents) for _ in document])
    after = owner[1:] != owner[:-1]  # entry i: token i + 1 belongs to another document than token i
    crosses = {
        "document": after,
        "none": torch.zeros_like(after),
        "value of a document's last token": torch.isin(stream[:-1], torch.tensor([d[-1] for d in documents])),
        "value of a document's first token": torch.isin(stream[1:], torch.tensor([d[0] for d in documents])),
        "the last label of a document": torch.cat((after[1:], after[:1] & False)),
    }[mask]
    starts = range(0, len(stream) - seq_len, seq_len + 1 - shared)
    inputs = torch.stack([stream[i : i + seq_len] for i in starts])
    labels = torch.stack([stream[i + shift : i + shift + seq_len] for i in starts])
    return inputs, labels.masked_fill(torch.stack([crosses[i : i + seq_len] for i in starts]), ignored)


PACK_MISTAKES: Changes = {
    "neighbouring rows share no token, so that some tokens are no label": {"shared": 0},
    "labels of other documents are kept": {"mask": "none", "ignored": IGNORED},
    "the labels are the inputs": {"shift": 0},
    "a label is masked wherever its input has the value of some document's last token": {
        "mask": "value of a document's last token"
    },
    "a label is masked wherever it has the value of some document's first token": {
        "mask": "value of a document's first token"
    },
    "the last label inside a document is masked, not the one after it": {"mask": "the last label of a document"},
    "masked labels are 0, not -100": {"ignored": 0},
}


def pack_examples(g: Generator) -> list[tuple]:
    def example(lengths, seq_len, vocab=100):
        return [torch.randint(vocab, (n,), generator=g).tolist() for n in lengths], seq_len

    repeated = [[1, 2, 1, 3, 2], [2, 1, 1], [3, 1, 3, 2]], 4  # ids at a document's end also stand inside; 12 tokens
    return [example((5, 3, 5), 4), repeated, example((9, 2, 2, 7), 3), example((1, 1, 11), 5, 3), example((20,), 6)]


# 5.3 Bits per byte --------------------------------------------------------------------------------------------------


def bits_per_byte(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"], token_bytes: Int[Tensor, "vocab"], *,
    per_row: bool = False, unit: float = math.log(2), per_token: bool = False, all_bytes: bool = False,
) -> float:  # fmt: skip
    """All bits over all bytes; a label may be IGNORED."""
    counted = labels != IGNORED
    nats = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    weights = (token_bytes[labels.clamp(min=0)] if not per_token else 1) * (counted | all_bytes)
    if per_row:
        return (nats.sum(1) / unit / weights.sum(1)).mean().item()
    return (nats.sum() / unit / weights.sum()).item()


BITS_MISTAKES: Changes = {
    "nats are taken for bits": {"unit": 1.0},
    "it is divided by tokens and not by bytes": {"per_token": True},
    "each row is divided by its own bytes": {"per_row": True},
    "the bytes of ignored labels are counted, as token 0": {"all_bytes": True, "per_token": False},
}


def bits_examples(g: Generator) -> list[tuple]:
    def example(batch, seq, vocab, ignored):
        labels = torch.randint(vocab, (batch, seq), generator=g)
        labels[0, :ignored] = IGNORED
        return torch.randn(batch, seq, vocab, generator=g), labels, torch.randint(1, 9, (vocab,), generator=g)

    return [example(2, 5, 7, 2), example(3, 4, 11, 1), example(4, 6, 3, 3)]


# 5.4 V3's schedule --------------------------------------------------------------------------------------------------


def learning_rate(
    tokens: float, *,
    begins: float = 10.0, ends: float = 14.3, goal: float = 2.2e-5, last: float = 7.3e-6, height: float = 0.5,
    fall: Callable[[float], float] = lambda part: 1 + math.cos(math.pi * part),
) -> float:  # fmt: skip
    """V3's learning rate after `tokens` trillion tokens, without the warm-up (V3 section 4.2)."""
    if tokens >= 14.633:
        return last
    part = min(max((tokens - begins) / (ends - begins), 0.0), 1.0)
    return goal + (2.2e-4 - goal) * height * fall(part)


RATE_MISTAKES: Changes = {
    "the cosine begins at the first token": {"begins": 0.0},
    "the cosine ends at 14.633T": {"ends": 14.633},
    "it falls to 0": {"goal": 0.0},
    "it falls in a straight line": {"fall": lambda part: 2 * (1 - part)},
    "it falls along a quarter of a cosine, not half of one": {"fall": lambda part: 2 * math.cos(math.pi * part / 2)},
    "the cosine is not multiplied by 1/2": {"height": 1.0},
    "the last 167 billion tokens are left out": {"last": 2.2e-5, "goal": 2.2e-5},
}


def schedule_examples(g: Generator) -> list[tuple]:
    return [(tokens,) for tokens in (2.0, 10.0, 11.0, 12.15, 13.9, 14.3, 14.4, 14.633, 14.7)]


# 5.5 A scaling law --------------------------------------------------------------------------------------------------


def predict(
    flops: Float[Tensor, "runs"], losses: Float[Tensor, "runs"], target: float, floor: float, *,
    remove_floor: bool = True, add_floor: bool = True, log_x: bool = True, log_y: bool = True, ends_only: bool = False,
) -> float:  # fmt: skip
    """The loss at `target` by floor + A * C^-alpha: a straight line through the logarithms by least squares."""
    gap = losses.double() - floor * remove_floor
    x, y = (values.log() if wanted else values for values, wanted in ((flops.double(), log_x), (gap, log_y)))
    if ends_only:
        x, y = x[[0, -1]], y[[0, -1]]
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    reached = y.mean() + slope * ((math.log(target) if log_x else target) - x.mean())
    return (reached.exp() if log_y else reached).item() + floor * add_floor


LAW_MISTAKES: Changes = {
    "the floor is not added again": {"add_floor": False, "remove_floor": True},
    "the floor is not used": {"remove_floor": False, "add_floor": False},
    "the floor is not subtracted, but added": {"remove_floor": False, "add_floor": True, "log_y": True},
    "the line goes through the losses and not their logarithms": {"log_y": False, "add_floor": True},
    "compute is not on a logarithmic scale": {"log_x": False},
    "the line goes through the first and the last run only": {"ends_only": True},
}


def law_examples(g: Generator) -> list[tuple]:
    def example(runs, floor, alpha, target):
        flops = 10 ** torch.linspace(9, 12, runs, dtype=torch.float64)
        noise = 1 + 0.02 * torch.randn(runs, generator=g, dtype=torch.float64)
        return flops, floor + 40 * flops**-alpha * noise, target, floor

    return [example(4, 1.0, 0.12, 1e13), example(6, 0.5, 0.1, 4e12), example(3, 1.5, 0.15, 1e14)]


# 5.6 Micro-batches --------------------------------------------------------------------------------------------------


def micro_step(
    alike: bool = False, clip_each: bool = False, bias_each: bool = False, drop_last: bool = False
) -> Callable:
    """One step of a toy model in micro-batches of `size` rows, correct or with one bug."""

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
        mistakes=variants(encode, ENCODE_MISTAKES),
        hints=(
            "two loops: over the merges in their order, and over the ids; which of the two has to be the outer one?",
            "for each merge in turn, walk through the ids from left to right and build a new list: append the new id "
            "and skip two ids where the pair stands, otherwise append one",
        ),
        section="chapter 05, section 2.1: from bytes to tokens",
        points=2,
    ),
    Function(
        id="5.2",
        name="pack",
        reference=pack,
        examples=pack_examples,
        mistakes=variants(pack, PACK_MISTAKES),
        hints=(
            "besides the stream of tokens, keep a second stream that says to which document each token belongs",
            "row r starts at token r * seq_len and needs seq_len + 1 tokens: stream.unfold(0, seq_len + 1, seq_len); a "
            "label is masked where the document's number at i + 1 differs from that at i, whatever the ids are",
        ),
        section="chapter 05, section 2.2: from documents to rows",
        points=2,
        outputs=("the inputs", "the labels"),
    ),
    Function(
        id="5.3",
        name="bits_per_byte",
        reference=bits_per_byte,
        examples=bits_examples,
        mistakes=variants(bits_per_byte, BITS_MISTAKES),
        hints=(
            "a quotient of two sums over all labels that count; in which unit does F.cross_entropy measure?",
            "F.cross_entropy(logits.mT, labels, ignore_index=-100, reduction='sum') / ln 2, over the sum of "
            "token_bytes at the labels that are not -100",
        ),
        section="chapter 05, section 2.3: from nats per token to bits per byte",
    ),
    Function(
        id="5.4",
        name="learning_rate",
        reference=learning_rate,
        examples=schedule_examples,
        mistakes=variants(learning_rate, RATE_MISTAKES),
        hints=(
            "four stretches: constant, falling, constant, the end; write down the limits and the values of each",
            "half a cosine falls from 1 to 0: 0.5 * (1 + cos(pi * part)) for part = (tokens - 10) / 4.3 from 0 to 1; "
            "it multiplies the difference between the highest and the lowest value",
        ),
        section="chapter 05, section 2.4: the schedule",
    ),
    Function(
        id="5.5",
        name="predict",
        reference=predict,
        examples=law_examples,
        mistakes=variants(predict, LAW_MISTAKES),
        hints=(
            "which two quantities lie on a straight line? Fit the line, and undo at the end what you did to the losses",
            "log(loss - floor) = log A - alpha log C is a line in log C: slope = sum((x - mean x)(y - mean y)) / "
            "sum((x - mean x)^2); evaluate it at log(target), take exp, add the floor",
        ),
        section="chapter 05, section 4.3: a law from small runs",
        points=2,
    ),
    SpotTheBug(
        id="5.6",
        name="test_micro_batches",
        right=micro_step(),
        bugs=(
            Bug("micro-batches count alike, whatever labels they have", micro_step(alike=True), "mask some labels"),
            Bug("every micro-batch is clipped by itself", micro_step(clip_each=True), "make the gradient long"),
            Bug("biases move once per micro-batch", micro_step(bias_each=True), "look at the biases too"),
            Bug("a smaller last micro-batch is dropped", micro_step(drop_last=True), "take 5 rows, 2 at a time"),
        ),
        hints=(
            "the result must not depend on `size`: what does one micro-batch of all rows return, and what do several?",
            "compare size=5 with size=2 on 5 rows: with labels masked in some rows only, with y times 100 so that "
            "the gradient is clipped, and with experts that differ between the rows",
        ),
        section="chapter 05, sections 3 and 7: one step of training, what goes wrong",
    ),
]
