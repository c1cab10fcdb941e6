"""Exercises of chapter 5: a smaller vocabulary, packing, bits per byte, a schedule, a law, micro-batches.

Tokens are lists of ids where a text is split, and tensors where they are inputs of a network. Beyond its arguments, the
keywords of a reference change one step of it, for the known mistakes and the planted bugs.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises.chapter05_text import (
    PACK_MISTAKES,
    SHRINK_MISTAKES,
    pack,
    pack_examples,
    shrink,
    shrink_examples,
)
from minids.course.exercises.mistakes import Changes, variants
from minids.training.loss import IGNORED

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


# 5.4 A schedule -----------------------------------------------------------------------------------------------------


def learning_rate(
    step: int, steps: int, warmup: int, decay: int, final: float, *,
    first: int = 1, last: int = 1, goal: bool = True, fall: Callable[[float], float] = math.sqrt,
    from_start: bool = False,
) -> float:  # fmt: skip
    """Factor of the peak rate: linear warm-up, constant, and a decay by 1 - sqrt over the last `decay` steps.

    The shape is that of warm-up-stable-decay schedules; V3's (section 4.2) has the same phases with a cosine.
    """
    if step < warmup:
        return (step + first) / warmup
    begins = warmup if from_start else steps - decay
    if step < begins:
        return 1.0
    part = min((step - begins + last) / decay, 1.0)
    lowest = final if goal else 0.0
    return lowest + (1 - lowest) * (1 - fall(part))


RATE_MISTAKES: Changes = {
    "the warm-up begins at 0, so that the first step is lost": {"first": 0},
    "the decay ends above `final`: in the last step u is not 1": {"last": 0},
    "it falls to 0": {"goal": False},
    "it falls along half a cosine": {"fall": lambda u: 1 - 0.5 * (1 + math.cos(math.pi * u))},
    "it falls in a straight line": {"fall": lambda u: u},
    "it falls by the square, not by the square root": {"fall": lambda u: u * u},
    "the decay begins after the warm-up": {"from_start": True},
}


def schedule_examples(g: Generator) -> list[tuple]:
    run = (100, 10, 20, 0.1)
    return [(step, *run) for step in (0, 4, 9, 10, 50, 79, 80, 81, 90, 99)] + [(7, 8, 2, 5, 0.0), (3, 8, 2, 5, 0.25)]


# 5.5 A scaling law --------------------------------------------------------------------------------------------------


def predict(
    flops: Float[Tensor, "runs"], losses: Float[Tensor, "runs"], floors: Float[Tensor, "floors"], target: float, *,
    add_floor: bool = True, log_x: bool = True, in_logs: bool = False, choose: str = "best",
) -> tuple[float, float]:  # fmt: skip
    """The loss at `target` by floor + A * C^-alpha and the floor, of `floors`, with the smallest squared error."""
    x = flops.double().log() if log_x else flops.double()
    goal = math.log(target) if log_x else target
    found = []
    for floor in floors.double().tolist():
        y = (losses.double() - floor).log()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        line = y.mean() + slope * (x - x.mean())
        error = (line - y) if in_logs else floor + line.exp() - losses
        reached = (y.mean() + slope * (goal - x.mean())).exp().item()
        score = error[-1].abs() if choose == "last run" else error.square().sum()
        found.append((score.item(), reached + floor * add_floor, floor))
    chosen = {"first": found[0], "last": found[-1]}.get(choose, min(found))
    return chosen[1], chosen[2]


LAW_MISTAKES: Changes = {
    "the floor is not added again": {"add_floor": False},
    "compute is not on a logarithmic scale": {"log_x": False},
    "errors are compared as logarithms, which are not in the same unit for two floors": {
        "in_logs": True,
        "choose": "best",
    },
    "the floor is the first of the list, whatever fits": {"choose": "first", "log_x": True},
    "the floor is the last of the list, whatever fits": {"choose": "last", "log_x": True},
    "only the error of the last run decides": {"choose": "last run", "log_x": True},
}


def law_examples(g: Generator) -> list[tuple]:
    def example(runs, floor, alpha, target):
        flops = 10 ** torch.linspace(9, 12, runs, dtype=torch.float64)
        noise = 1 + 0.02 * torch.randn(runs, generator=g, dtype=torch.float64)
        losses = floor + 40 * flops**-alpha * noise
        floors = torch.linspace(0.1, 0.98 * losses.min().item(), 25, dtype=torch.float64)
        return flops, losses, floors, target

    return [example(5, 1.0, 0.12, 1e13), example(6, 0.5, 0.1, 4e12), example(4, 1.5, 0.15, 1e14)]


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
        name="shrink",
        reference=shrink,
        examples=shrink_examples,
        mistakes=variants(shrink, SHRINK_MISTAKES),
        hints=(
            "which ids does a vocabulary of `keep` merges not have, and of what were they made?",
            "id i of at least 256 + keep becomes the two ids of merges[i - 256], and each of those may be too new: a "
            "recursive function, or a stack",
        ),
        section="chapter 05, section 2.2: from bytes to tokens",
        points=2,
    ),
    Function(
        id="5.2",
        name="pack",
        reference=pack,
        examples=pack_examples,
        mistakes=variants(pack, PACK_MISTAKES),
        hints=(
            "besides the stream of tokens, keep a second stream that says to which document each token belongs; how "
            "many tokens does a row need at depth 1?",
            "stream.unfold(0, seq_len + depth + 1, seq_len) gives the rows; a label is masked where the document's "
            "number at i + depth + 1 differs from that at i, whatever the ids are",
        ),
        section="chapter 05, section 2.3: from documents to rows",
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
        section="chapter 05, section 2.1: bits per byte",
    ),
    Function(
        id="5.4",
        name="learning_rate",
        reference=learning_rate,
        examples=schedule_examples,
        mistakes=variants(learning_rate, RATE_MISTAKES),
        hints=(
            "three phases; write down for each its first and its last step, and the value there",
            "in the decay u = (step - (steps - decay) + 1) / decay goes from 1/decay to 1; 1 - sqrt(u) goes to 0, and "
            "multiplies the difference between the highest and the lowest value",
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
            "for one floor it is a straight line through logarithms; for the choice compare what the laws say about "
            "the losses themselves",
            "for each floor: fit log(loss - floor) over log(flops), turn the line back into losses, and sum the "
            "squared errors; keep the floor with the smallest sum, and evaluate its law at log(target)",
        ),
        section="chapter 05, section 4.4: a scaling law",
        points=2,
        outputs=("the prediction", "the floor"),
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
        section="chapter 05, sections 2.5 and 7: the training loop, what goes wrong",
    ),
    Experiment(
        "5.7",
        "noise_ratio",
        "gradient noise of 4 rows over that of 64",
        3.4,
        4.7,
        hints=(
            "for each batch compute one gradient; the noise is how far such gradients lie from their mean",
            "x = torch.randn(400, b, 20, generator=g), y = x @ true + noise; at weight 0 the gradient is "
            "-2 * (x * y[..., None]).mean(1); subtract its mean over the 400, square, sum over the 20, mean, root",
        ),
        section="chapter 05, sections 2.4 and 2.5: the batch ramp, gradient accumulation",
    ),  # fmt: skip
    OpenTask(
        "5.8",
        "best_in_two_minutes",
        (
            "the budget is stated and kept: two minutes of training on two cores, evaluation not counted",
            "bits per byte of the held-out documents of the chapter, never seen in training, beside gzip and xz",
            "each change is compared with the model before it, with at least three seeds and the spread",
            "the learning rate was chosen again after every change of the size",
            "it says what was tried without success, and what it would try with an hour",
        ),
        hints=(
            "the budget buys a number of tokens for each size: which size and which vocabulary see enough of them?",
            "start from the recipe of `python3 course.py train`; benchmarks/README.md has a table of sizes that were "
            "tried for two minutes",
        ),
        section="chapter 05, sections 4.1 and 4.3: a short run, the learning rate",
    ),  # fmt: skip
]
