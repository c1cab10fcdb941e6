"""Exercises of chapter 11: places in the box of ranks, what each holds, sums over ranks, and runs that are killed.

All ranks live in one process here: a list holds one entry per rank.
"""

import math

import torch
from torch import Tensor

from minids import cost
from minids.course.checks import Bug, Function, SpotTheBug

# 11.1 ----------------------------------------------------------------------------------------------------------------


def groups(rank: int, pp: int, dp: int, ep: int) -> tuple[list[int], list[int], list[int]]:
    """The ranks of its pp, dp and ep group; `ep` changes fastest from rank to rank, `pp` slowest."""
    return lines_through(torch.arange(pp * dp * ep).view(pp, dp, ep), rank)


def lines_through(box: Tensor, rank: int) -> tuple[list[int], list[int], list[int]]:
    stage, row, expert = (box == rank).nonzero()[0].tolist()
    return box[:, row, expert].tolist(), box[stage, :, expert].tolist(), box[stage, row, :].tolist()


def groups_stages_fastest(rank, pp, dp, ep):
    return lines_through(torch.arange(pp * dp * ep).view(ep, dp, pp).permute(2, 1, 0), rank)


def groups_data_fastest(rank, pp, dp, ep):
    return lines_through(torch.arange(pp * dp * ep).view(pp, ep, dp).transpose(1, 2), rank)


def groups_of_whole_stages(rank, pp, dp, ep):
    first = rank // (dp * ep) * dp * ep
    return groups(rank, pp, dp, ep)[0], *[list(range(first, first + dp * ep))] * 2


def group_examples(_: torch.Generator) -> list[tuple]:
    return [(5, 2, 2, 2), (0, 3, 1, 4), (23, 2, 3, 4), (1337, 16, 2, 64)]


# 11.2 ----------------------------------------------------------------------------------------------------------------


def bytes_per_rank(experts: int, others: int, dp: int, ep: int, stage: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state of a rank; experts are cut by `ep`, then shared out over `dp` only."""
    return in_shares(((experts / ep, dp), (others, dp * ep)), stage)


def in_shares(shares: tuple, stage: int) -> tuple[float, float, float]:
    parts = [cost.zero_bytes_per_gpu(count, ranks, stage) for count, ranks in shares]
    return tuple(float(sum(part[name] for part in parts)) for name in ("weights", "gradients", "optimizer"))


def bytes_experts_shared_twice(experts, others, dp, ep, stage):
    return in_shares(((experts / ep, dp * ep), (others, dp * ep)), stage)


def bytes_experts_not_cut(experts, others, dp, ep, stage):
    return in_shares(((experts, dp), (others, dp * ep)), stage)


def bytes_others_over_dp(experts, others, dp, ep, stage):
    return in_shares(((experts / ep, dp), (others, dp)), stage)


def bytes_one_stage_further(experts, others, dp, ep, stage):
    return in_shares(((experts / ep, dp), (others, dp * ep)), min(stage + 1, 3))


def byte_examples(_: torch.Generator) -> list[tuple]:
    return [(6400, 1000, 2, 4, stage) for stage in (0, 1, 2, 3)] + [(654 * 10**9, 17 * 10**9, 2, 64, 1)]


# 11.3 ----------------------------------------------------------------------------------------------------------------


def parts_of_loss(nats: list[Tensor], counts: list[Tensor]) -> list[Tensor]:
    """By rank: losses [rows, seq] and which of them count -> what each rank adds to the mean over all that count."""
    targets = sum(int(count.sum()) for count in counts)
    return [(loss * count).sum() / targets for loss, count in zip(nats, counts, strict=True)]


def parts_mean_of_means(nats, counts):
    return [loss[count].mean() / len(nats) for loss, count in zip(nats, counts, strict=True)]


def parts_own_means(nats, counts):
    return [loss[count].mean() for loss, count in zip(nats, counts, strict=True)]


def parts_all_places(nats, counts):
    places = sum(count.numel() for count in counts)
    return [(loss * count).sum() / places for loss, count in zip(nats, counts, strict=True)]


def parts_nothing_masked(nats, counts):
    targets = sum(int(count.sum()) for count in counts)
    return [loss.sum() / targets for loss in nats]


def loss_examples(generator: torch.Generator) -> list[tuple]:
    examples = []
    for ranks, rows, seq in ((2, 1, 4), (3, 2, 5), (4, 2, 3)):
        nats = [5 * torch.rand(rows, seq, generator=generator) for _ in range(ranks)]
        counts = [torch.rand(rows, seq, generator=generator) < (rank + 1) / ranks for rank in range(ranks)]
        counts[0][:] = ranks == 2  # else a rank without any target
        counts[0][0, 0] = False
        examples.append((nats, counts))
    return examples


# 11.4 ----------------------------------------------------------------------------------------------------------------


Pieces = list[tuple[str, Tensor]]


def global_norm(shards: list[Pieces], copied: list[str]) -> float:
    """Norm of the whole gradient; what is `copied` is equal on all ranks that have it, all else are disjoint pieces."""
    pieces = [piece for shard in shards for piece in shard]
    copies = {name: gradient for name, gradient in pieces if name in copied}
    alone = [gradient for name, gradient in pieces if name not in copied]
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in [*copies.values(), *alone]))


def norm_copies_counted_again(shards, copied):
    return global_norm(shards, [])


def norm_sum_of_norms(shards, copied):
    return sum(global_norm([shard], copied) for shard in shards)


def norm_of_one_rank(shards, copied):
    return global_norm(shards[:1], copied)


def norm_without_copies(shards, copied):
    return global_norm([[piece for piece in shard if piece[0] not in copied] for shard in shards], [])


def norm_examples(generator: torch.Generator) -> list[tuple]:
    def shard(**shapes):
        return [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]

    simple, twin = [shard(w=(2, 3)) + [("head", torch.ones(2))] for _ in range(2)], [("embedding", torch.ones(5))]
    uneven = [shard(w=(3, 2), up=(4,)) + twin, shard(w=(1, 2)), twin + shard(up=(2,))]
    return [(simple, ["head"]), (uneven, ["embedding"]), ([shard(a=(4,)), shard(a=(2,)), []], [])]


# 11.5 ----------------------------------------------------------------------------------------------------------------


def steps_taken(steps: int, every: int, kills: list[int]) -> list[int]:
    """A run's steps as they are computed; a checkpoint after each `every`, and life i ends after step kills[i]."""
    return lives(steps, kills, lambda killed: killed // every * every)


def lives(steps, kills, saved) -> list[int]:
    taken, at = [], 0
    for killed in [*kills, steps]:
        taken += range(at + 1, killed + 1)
        at = saved(killed)
    return taken


def steps_from_the_kill(steps, every, kills):
    return lives(steps, kills, lambda killed: killed)


def steps_from_the_beginning(steps, every, kills):
    return lives(steps, kills, lambda killed: 0)


def steps_saved_one_repeated(steps, every, kills):
    return lives(steps, kills, lambda killed: max(killed // every * every - 1, 0))


def steps_from_next_checkpoint(steps, every, kills):
    return lives(steps, kills, lambda killed: -(-killed // every) * every)


def kill_examples(_: torch.Generator) -> list[tuple]:
    return [(10, 3, [4]), (10, 3, [4, 8]), (12, 5, [3, 11, 10]), (7, 10, [6]), (5, 2, [])]


# 11.6 ----------------------------------------------------------------------------------------------------------------


def train(data: Tensor, ranks: int, every: int, killed: int | None = None, wrong: str = "") -> tuple[Tensor, Tensor]:
    """A toy run over ranks, killed after step `killed`; `wrong` names a mistake. Returns weight and balance bias.

    data [steps, rows, dim]: rows are shared out over the ranks in turn. A weight [dim] moves with momentum towards the
    mean row, and each row counts for the largest of its dim entries plus their bias.
    """
    steps, rows, dim = data.shape
    weight, momentum, bias = (data.new_zeros(dim) for _ in range(3))
    saved, step, position = (weight, momentum, bias, 0, 0), 0, 0
    while step < steps:
        parts = [data[position, rank::ranks] for rank in range(ranks)]
        momentum = 0.9 * momentum + sum((weight - part).sum(0) for part in parts) / rows
        weight = weight - 0.1 * momentum
        loads = [torch.bincount((part + bias).argmax(-1), minlength=dim).to(data) for part in parts]
        for load in loads if wrong == "loads" else [sum(loads)]:
            bias = bias + 0.1 * torch.sign(load.mean() - load)
        step, position = step + 1, position + 1
        if step % every == 0:
            saved = weight, momentum, bias, step, position
        if step == killed:
            killed = None
            weight, momentum, bias, step, position = saved
            momentum = torch.zeros_like(momentum) if wrong == "momentum" else momentum
            bias = torch.zeros_like(bias) if wrong == "bias" else bias
            position = 0 if wrong == "position" else position
    return weight, bias


def train_without_momentum(data, ranks, every, killed=None):
    return train(data, ranks, every, killed, "momentum")


def train_without_bias(data, ranks, every, killed=None):
    return train(data, ranks, every, killed, "bias")


def train_without_position(data, ranks, every, killed=None):
    return train(data, ranks, every, killed, "position")


def train_balancing_per_rank(data, ranks, every, killed=None):
    return train(data, ranks, every, killed, "loads")


EXERCISES = [
    Function(
        "11.1", "groups", groups, group_examples,
        mistakes={
            "pp changes fastest from rank to rank": groups_stages_fastest,
            "dp changes faster than ep": groups_data_fastest,
            "all ranks of a stage are taken for its dp and its ep group": groups_of_whole_stages,
        },
        hint="find the rank's three coordinates by dividing; a group is all ranks that differ in one of them only",
        outputs=("the pp group", "the dp group", "the ep group"),
    ),
    Function(
        "11.2", "bytes_per_rank", bytes_per_rank, byte_examples,
        mistakes={
            "experts are shared out over their ep group a second time": bytes_experts_shared_twice,
            "every rank has all experts": bytes_experts_not_cut,
            "all other parameters are shared out over dp only": bytes_others_over_dp,
            "each stage shares out what only the next one does": bytes_one_stage_further,
        },
        hint="experts / ep parameters are shared out over dp ranks, the others over dp * ep; then look at the stage",
        points=2, outputs=("the weights", "the gradients", "the optimizer's state"),
    ),
    Function(
        "11.3", "parts_of_loss", parts_of_loss, loss_examples,
        mistakes={
            "each rank's mean is divided by the number of ranks": parts_mean_of_means,
            "each rank takes its own mean": parts_own_means,
            "the sum is divided by all places, those that do not count too": parts_all_places,
            "losses that do not count are added": parts_nothing_masked,
        },
        hint="one number divides the sums of all ranks: how many losses count on all of them together",
        points=2,
    ),
    Function(
        "11.4", "global_norm", global_norm, norm_examples,
        mistakes={
            "copies are counted on every rank that has one": norm_copies_counted_again,
            "the norms of the ranks are added, not their squares": norm_sum_of_norms,
            "only the first rank's gradient is looked at": norm_of_one_rank,
            "what is copied is left out": norm_without_copies,
        },
        hint="add squares over all ranks, of a copied gradient only once, and take the root at the end",
        points=2,
    ),
    Function(
        "11.5", "steps_taken", steps_taken, kill_examples,
        mistakes={
            "it goes on at the step after the kill, as if that had been saved": steps_from_the_kill,
            "it starts from the beginning": steps_from_the_beginning,
            "the step of the checkpoint is taken again": steps_saved_one_repeated,
            "it goes on from the next checkpoint, which was never written": steps_from_next_checkpoint,
        },
        hint="after a kill the next life starts one step after the newest checkpoint, killed // every * every",
    ),
    SpotTheBug(
        "11.6", "test_train", train,
        bugs=(
            Bug("the moments are lost in a restart", train_without_momentum, "kill one run, not the other: weights"),
            Bug("the balance bias is lost in a restart", train_without_bias, "kill one run, not the other: biases"),
            Bug("a restart reads the text from its beginning", train_without_position, "use other data in each step"),
            Bug("ranks balance by their own loads, in turn", train_balancing_per_rank, "try several numbers of ranks"),
        ),
    ),
]  # fmt: skip
