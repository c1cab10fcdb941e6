"""Exercises of chapter 13: groups of ranks, what each rank holds, sums over ranks, slow ranks, and killed runs.

All ranks live in one process, but for the open task: a list, or the first dimension of a tensor, holds one entry per
rank.
"""

import math
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minids import cost
from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises.chapter13_mistakes import (
    Groups,
    Pieces,
    bytes_with,
    groups_exchanged,
    groups_of_whole_stages,
    groups_with,
    norm_copies_counted_again,
    norm_of_names,
    norm_of_one_rank,
    norm_sum_of_norms,
    norm_without_copies,
    parts_all_positions,
    parts_mean_of_means,
    parts_nothing_masked,
    parts_nothing_masked_at_all,
    parts_own_means,
    parts_own_positions,
    sum_of_squares,
    train_balancing_per_rank,
    train_with,
    train_without_bias,
    train_without_momentum,
    train_without_position,
)

# 13.1 ----------------------------------------------------------------------------------------------------------------


def groups(rank: int, pp: int, dp: int, ep: int) -> Groups:
    """The ranks of its pp, dp and ep group; `ep` changes fastest from rank to rank, `pp` slowest."""
    return groups_with(rank, pp, dp, ep)


def group_examples(_: torch.Generator) -> list[tuple]:
    return [(5, 2, 2, 2), (0, 3, 1, 4), (23, 2, 3, 4), (1337, 16, 2, 64)]


# 13.2 ----------------------------------------------------------------------------------------------------------------


def bytes_per_rank(experts: int, others: int, dp: int, ep: int, stage: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer states of a rank; experts are divided by `ep`, then sharded over `dp` only."""
    parts = [cost.zero_bytes_per_gpu(count, ranks, stage) for count, ranks in ((experts / ep, dp), (others, dp * ep))]
    weights, gradients, states = (float(sum(part[n] for part in parts)) for n in ("weights", "gradients", "optimizer"))
    return weights, gradients, states


def byte_examples(_: torch.Generator) -> list[tuple]:
    by_stage = [(6400, 1000, 2, 4, stage) for stage in (0, 1, 2, 3)]
    return [*by_stage, (654 * 10**9, 17 * 10**9, 2, 64, 1), (1001, 335, 2, 3, 3)]


# 13.3 ----------------------------------------------------------------------------------------------------------------


def parts_of_loss(
    nats: Float[Tensor, "ranks rows seq"], counts: Bool[Tensor, "ranks rows seq"]
) -> Float[Tensor, "ranks"]:
    """By rank: losses and which of them count -> what each rank adds to the mean over all that count."""
    return (nats * counts).sum((1, 2)) / counts.sum()


def loss_examples(generator: torch.Generator) -> list[tuple]:
    examples = []
    for ranks, rows, seq in ((2, 1, 4), (3, 2, 5), (4, 2, 3)):
        nats = 5 * torch.rand(ranks, rows, seq, generator=generator)
        shares = (torch.arange(ranks) + 1) / ranks
        counts = torch.rand(ranks, rows, seq, generator=generator) < shares[:, None, None]
        counts[0] = ranks == 2  # else a rank without any target
        counts[0, 0, 0] = False
        examples.append((nats, counts))
    return examples


# 13.4 ----------------------------------------------------------------------------------------------------------------


def global_norm(shards: list[Pieces], copied: list[str]) -> float:
    """Norm of the whole gradient; a name in `copied` is equal wherever it occurs, all else are disjoint pieces."""
    return math.sqrt(sum_of_squares(shards, copied))


def norm_examples(generator: torch.Generator) -> list[tuple]:
    def shard(**shapes):
        return [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]

    simple, twin = [shard(w=(2, 3)) + [("head", torch.ones(2))] for _ in range(2)], [("embedding", torch.ones(5))]
    uneven = [shard(w=(3, 2), up=(4,)) + twin, shard(w=(1, 2)), twin + shard(up=(2,))]
    return [(simple, ["head"]), (uneven, ["embedding"]), ([shard(a=(4,)), shard(a=(2,)), []], [])]


# 13.5 ----------------------------------------------------------------------------------------------------------------

SLOW_LOW, SLOW_HIGH = 16.0, 18.5  # the median over 5 seeds is 17.2


def above_mean_step(
    seed: int, ranks: int = 2048, spread: float = 0.05, steps: int = 200, of_mean: bool = False
) -> float:
    """Per cent by which the mean step exceeds a rank's mean time, where every step waits for the slowest rank."""
    generator = torch.Generator().manual_seed(seed)
    times = 1 + spread * torch.randn(steps, ranks, generator=generator, dtype=torch.float64)
    step = times.mean(0).max() if of_mean else times.amax(1).mean()
    return 100 * (step.item() - 1)


# 13.6 ----------------------------------------------------------------------------------------------------------------


def train(data: Tensor, ranks: int, every: int, killed: int | None = None) -> tuple[Tensor, Tensor]:
    """A toy run over ranks, killed after step `killed`. Returns weight and balance bias.

    data [steps, rows, dim]: rows are divided over the ranks in turn. A weight [dim] moves with momentum towards the
    mean row, and each row counts for the largest of its dim values plus their bias.
    """
    return train_with(data, ranks, every, killed)


EXERCISES = [
    Function(
        "13.1", "groups", groups, group_examples,
        mistakes={
            "pp changes fastest from rank to rank, and ep slowest": partial(groups_with, slowest_first="edp"),
            "dp changes faster than ep": partial(groups_with, slowest_first="ped"),
            "pp changes faster than dp": partial(groups_with, slowest_first="dpe"),
            "all ranks of a stage are taken for its dp and its ep group": groups_of_whole_stages,
            "the dp and the ep group are exchanged": groups_exchanged,
            "the rank itself is left out": partial(groups_with, slowest_first="pde", itself=False),
            "dp changes faster than ep, and the rank itself is left out":
                partial(groups_with, slowest_first="ped", itself=False),
        },
        hints=(
            "find the three coordinates of the rank first; a group is all ranks that differ in one of them only",
            "stage, rest = divmod(rank, dp * ep); row, expert = divmod(rest, ep); then vary one coordinate at a time",
        ),
        section="chapter 13, section 1 (the picture) and section 2.4 (DeviceMesh)",
        outputs=("the pp group", "the dp group", "the ep group"),
    ),
    Function(
        "13.2", "bytes_per_rank", bytes_per_rank, byte_examples,
        mistakes={
            "experts are sharded over their ep group a second time": partial(bytes_with, twice=True),
            "every rank has all experts": partial(bytes_with, divided=False),
            "all other parameters are sharded over dp only": partial(bytes_with, others_over_dp=True),
            "each stage shards what only the next one does": partial(bytes_with, later=1),
            "each stage shards only what the one before does": partial(bytes_with, later=-1),
            "the optimizer states take 12 bytes": partial(bytes_with, optimizer=12),
            "the shards are rounded down to whole parameters": partial(bytes_with, whole=True),
            "every rank has all experts, and all other parameters are sharded over dp only":
                partial(bytes_with, divided=False, others_over_dp=True),
            "all other parameters are sharded over dp only, and each stage shards what only the next one does":
                partial(bytes_with, others_over_dp=True, later=1),
        },
        hints=(
            "experts and all other parameters have different numbers of copies: how many ranks share one of each?",
            "experts / ep parameters are sharded over dp ranks, the others over dp * ep; then look at the stage",
        ),
        section="chapter 13, section 2.3 (ZeRO) and section 5.1 (memory)",
        points=2, outputs=("the weights", "the gradients", "the optimizer states"),
    ),
    Function(
        "13.3", "parts_of_loss", parts_of_loss, loss_examples, gradients=("nats",),
        mistakes={
            "each rank's mean is divided by the number of ranks": parts_mean_of_means,
            "each rank takes its own mean": parts_own_means,
            "the sum is divided by all positions, those that do not count too": parts_all_positions,
            "each rank's sum is divided by its own positions, those that do not count too": parts_own_positions,
            "losses that do not count are added": parts_nothing_masked,
            "losses that do not count are added, and the sum is divided by all positions": parts_nothing_masked_at_all,
        },
        hints=(
            "a mean of means is not the mean where ranks have different numbers of targets: what do all ranks share?",
            "one number divides the sums of all ranks: how many losses count on all of them together",
        ),
        section="chapter 13, section 2.2: sums, not means of means",
        points=2,
    ),
    Function(
        "13.4", "global_norm", global_norm, norm_examples,
        mistakes={
            "copies are counted on every rank that has one": norm_copies_counted_again,
            "pieces with the same name are taken for copies": norm_of_names,
            "the norms of the ranks are added, not their squares": norm_sum_of_norms,
            "only the first rank's gradient is counted": norm_of_one_rank,
            "what is copied is left out": norm_without_copies,
            "the root is missing": sum_of_squares,
            "the root is missing, and copies are counted on every rank that has one":
                lambda shards, copied: sum_of_squares(shards, []),
            "the norms of the ranks are added, not their squares, and what is copied is left out":
                partial(norm_sum_of_norms, of_rank=norm_without_copies),
        },
        hints=(
            "norms do not add up over pieces, their squares do; then ask which pieces occur more than once",
            "add the squares of all pieces, of a name in `copied` only the first time, and take the root at the end",
        ),
        section="chapter 13, section 2.2 (sums over ranks) and section 3.1 (what the package does)",
        points=2,
    ),
    Experiment(
        "13.5", "above_mean_step", "mean step longer than a rank's mean time, %", SLOW_LOW, SLOW_HIGH,
        seeds=tuple(range(5)),
        hints=(
            "a step ends when its slowest rank ends: which of mean and maximum is over ranks, which is over steps?",
            "times = 1 + 0.05 * torch.randn(200, 2048, generator=generator); then the maximum over ranks of each step, "
            "the mean over steps, minus 1, in per cent",
        ),
        section="chapter 13, section 4.4 (time) and section 5.2 (the step, against the published one)",
    ),
    SpotTheBug(
        "13.6", "test_train", train,
        (
            Bug("the moments are lost in a restart", train_without_momentum, "compare weights with and without a kill"),
            Bug("the balance bias is lost in a restart", train_without_bias, "compare biases with and without a kill"),
            Bug("a restart reads the data from the beginning", train_without_position, "use other data in each step"),
            Bug("ranks balance by their own loads, in turn", train_balancing_per_rank, "try several numbers of ranks"),
        ),
        hints=(
            "neither a kill nor the number of ranks may change the result: compare runs",
            "take train(data, 1, 3, None) as the reference, and compare weight and bias for 1, 2 and 4 ranks, each "
            "with and without a kill between two checkpoints",
        ),
        section="chapter 13, section 4.2 (two mistakes) and section 4.6 (a checkpoint without moments or position)",
    ),
    OpenTask(
        "13.7", "train_zero",
        (
            "two processes equal one process in float64, after five steps, to 1e-12",
            "each process keeps momentum for its own half of the weights only; it says how many bytes that saves",
            "gradients are summed, not averaged, or the learning rate accounts for it",
            "it counts the bytes that a step exchanges, and compares them with an all-reduce",
            "it says what would change for ZeRO-2 and ZeRO-3",
        ),
        hints=(
            "flatten all gradients into one vector; which half of it does this rank need, and in which form?",
            "dist.reduce_scatter(half, list(gradient.chunk(ranks))), then momentum and step on that half, then "
            "dist.all_gather and vector_to_parameters",
        ),
        section="chapter 13, section 2.3: ZeRO",
    ),
]  # fmt: skip
