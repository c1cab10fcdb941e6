"""Implementations with the mistakes of the exercises of chapter 13: without an option each of them is correct."""

import math

import torch
from torch import Tensor

# 13.1 ----------------------------------------------------------------------------------------------------------------

Groups = tuple[list[int], list[int], list[int]]


def lines_through(box: Tensor, rank: int) -> Groups:
    stage, row, expert = (box == rank).nonzero()[0].tolist()
    return box[:, row, expert].tolist(), box[stage, :, expert].tolist(), box[stage, row, :].tolist()


def groups_with(rank, pp, dp, ep, *, slowest_first: str = "pde", itself: bool = True) -> Groups:
    """Groups where the axes have this order; `itself`: is the rank a member of its groups?"""
    sizes = dict(p=pp, d=dp, e=ep)
    box = torch.arange(pp * dp * ep).view([sizes[axis] for axis in slowest_first])
    found = lines_through(box.permute([slowest_first.index(axis) for axis in "pde"]), rank)
    pp_group, dp_group, ep_group = ([each for each in group if itself or each != rank] for group in found)
    return pp_group, dp_group, ep_group


def groups_exchanged(rank, pp, dp, ep):
    pp_group, dp_group, ep_group = groups_with(rank, pp, dp, ep)
    return pp_group, ep_group, dp_group


def groups_of_whole_stages(rank, pp, dp, ep):
    first = rank // (dp * ep) * dp * ep
    return groups_with(rank, pp, dp, ep)[0], *[list(range(first, first + dp * ep))] * 2


# 13.2 ----------------------------------------------------------------------------------------------------------------


def bytes_with(
    experts,
    others,
    dp,
    ep,
    stage,
    *,
    twice=False,
    divided=True,
    others_over_dp=False,
    later=0,
    optimizer=8,
    whole=False,
) -> tuple[float, ...]:
    shards = (experts / (ep if divided else 1), dp * (ep if twice else 1)), (others, dp * (1 if others_over_dp else ep))
    results = []
    for size, first in ((2, 3), (4, 2), (optimizer, 1)):
        counts = [count / (ranks if stage + later >= first else 1) for count, ranks in shards]
        results.append(float(size * sum(count // 1 if whole else count for count in counts)))
    return tuple(results)


# 13.3 ----------------------------------------------------------------------------------------------------------------


def parts_own_means(nats, counts):
    return torch.stack([loss[count].mean() for loss, count in zip(nats, counts, strict=True)])


def parts_mean_of_means(nats, counts):
    return parts_own_means(nats, counts) / len(nats)


def parts_all_positions(nats, counts):
    return (nats * counts).sum((1, 2)) / counts.numel()


def parts_own_positions(nats, counts):
    return (nats * counts).mean((1, 2))


def parts_nothing_masked(nats, counts):
    return nats.sum((1, 2)) / counts.sum()


def parts_nothing_masked_at_all(nats, counts):
    return nats.sum((1, 2)) / counts.numel()


# 13.4 ----------------------------------------------------------------------------------------------------------------


Pieces = list[tuple[str, Tensor]]


def sum_of_squares(shards: list[Pieces], copied: list[str]) -> float:
    pieces = [piece for shard in shards for piece in shard]
    copies = {name: gradient for name, gradient in pieces if name in copied}
    alone = [gradient for name, gradient in pieces if name not in copied]
    return float(sum(gradient.double().square().sum().item() for gradient in [*copies.values(), *alone]))


def norm(shards, copied):
    return math.sqrt(sum_of_squares(shards, copied))


def norm_copies_counted_again(shards, copied):
    return norm(shards, [])


def norm_of_names(shards, copied):
    return norm(shards, [name for shard in shards for name, _ in shard])


def norm_sum_of_norms(shards, copied, of_rank=norm):
    return sum(of_rank([shard], copied) for shard in shards)


def norm_of_one_rank(shards, copied):
    return norm(shards[:1], copied)


def norm_without_copies(shards, copied):
    return norm([[piece for piece in shard if piece[0] not in copied] for shard in shards], [])


# 13.6 ----------------------------------------------------------------------------------------------------------------


def train_with(data, ranks, every, killed, wrong=""):
    """Run `train`, with the mistake that `wrong` names."""
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
    return train_with(data, ranks, every, killed, "momentum")


def train_without_bias(data, ranks, every, killed=None):
    return train_with(data, ranks, every, killed, "bias")


def train_without_position(data, ranks, every, killed=None):
    return train_with(data, ranks, every, killed, "position")


def train_balancing_per_rank(data, ranks, every, killed=None):
    return train_with(data, ranks, every, killed, "loads")
