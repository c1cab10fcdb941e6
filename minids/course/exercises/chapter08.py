"""Exercises of chapter 08: rows that travel to experts on other ranks and back, and experts that are given places.

All ranks live in one process here: a list holds one entry per rank. Experts lie on the ranks in equal runs.
"""

import torch
from torch import Tensor

from minids.course.checks import Bug, Function, SpotTheBug
from minids.course.traffic import Traffic
from minids.parallel.eplb import pack

# 8.1 -----------------------------------------------------------------------------------------------------------------


def all_to_all(rows: list[Tensor], cuts: list[list[int]]) -> list[Tensor]:
    """cuts[s][r] rows go from rank s to rank r; each rank gets its parcels in the order of the senders."""
    outbox = [row.split(cut) for row, cut in zip(rows, cuts, strict=True)]
    return [torch.cat([parcels[rank] for parcels in outbox]) for rank in range(len(rows))]


def all_to_all_nothing_sent(rows, cuts):
    return [row.clone() for row in rows]


def all_to_all_last_sender_first(rows, cuts):
    outbox = [row.split(cut) for row, cut in zip(rows, cuts, strict=True)]
    return [torch.cat([parcels[rank] for parcels in reversed(outbox)]) for rank in range(len(rows))]


def all_to_all_padded(rows, cuts):
    """Every parcel as large as the largest, as in systems with a fixed capacity."""
    size = max(max(cut) for cut in cuts)
    outbox = [row.split(cut) for row, cut in zip(rows, cuts, strict=True)]
    padded = [[torch.cat([p, p.new_zeros(size - len(p), p.shape[1])]) for p in parcels] for parcels in outbox]
    return [torch.cat([parcels[rank] for parcels in padded]) for rank in range(len(rows))]


def exchange_examples(generator: torch.Generator) -> list[tuple]:
    sizes = [
        [[1, 2, 0], [3, 0, 1], [0, 2, 2]],
        [[0, 4], [0, 1]],
        [[2, 1, 0, 3], [0, 0, 0, 0], [1, 1, 1, 2], [4, 0, 2, 1]],
    ]
    return [([torch.rand(sum(cut), 3, generator=generator) for cut in cuts], cuts) for cuts in sizes]


# 8.2 -----------------------------------------------------------------------------------------------------------------


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Rows as they left, rows[i] belonging to choice order[i] -> each token's k rows, weighted and added."""
    return (rows[order.argsort()].view(*weights.shape, -1) * weights[..., None]).sum(1)


def combine_without_undoing(rows, order, weights):
    return combine(rows, torch.arange(len(order)), weights)


def combine_with_order(rows, order, weights):
    return combine(rows, order.argsort(), weights)


def combine_unweighted(rows, order, weights):
    return combine(rows, order, torch.ones_like(weights))


def combine_weights_as_sent(rows, order, weights):
    """The rows are put back, but each carries the weight of another."""
    rows = rows * weights.flatten()[:, None]
    return combine(rows, order, torch.ones_like(weights))


def combine_examples(generator: torch.Generator) -> list[tuple]:
    examples = []
    for tokens, k, dim in ((3, 2, 4), (5, 3, 1), (7, 4, 2)):
        experts = torch.rand(tokens, 8, generator=generator).topk(k).indices
        rows, weights = (torch.rand(*shape, generator=generator) for shape in ((tokens * k, dim), (tokens, k)))
        examples.append((rows, experts.flatten().argsort(stable=True), weights))
    return examples


# 8.3 -----------------------------------------------------------------------------------------------------------------


def pack_without_limit(weights, packs):
    packed, totals = [[] for _ in range(packs)], [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = totals.index(min(totals))
        packed[lightest].append(item)
        totals[lightest] += weights[item]
    return packed


def pack_lightest_first(weights, packs):
    return pack([-weight + 2 * max(weights) for weight in weights], packs)


def pack_as_they_come(weights, packs):
    packed, totals, size = [[] for _ in range(packs)], [0.0] * packs, len(weights) // packs
    for item, weight in enumerate(weights):
        lightest = min((p for p in range(packs) if len(packed[p]) < size), key=lambda p: totals[p])
        packed[lightest].append(item)
        totals[lightest] += weight
    return packed


def pack_in_turn(weights, packs):
    ordered = sorted(range(len(weights)), key=lambda i: -weights[i])
    return [ordered[p::packs] for p in range(packs)]


def pack_examples(_: torch.Generator) -> list[tuple]:
    return [
        ([90.0, 132, 40, 61, 104, 165, 39, 4], 2),
        ([10.0, 1, 1, 2, 1, 1], 2),
        ([3.0, 3, 3, 3, 5, 1, 7, 2, 9], 3),
        ([6.0, 2, 5, 4], 1),
    ]


# 8.4 -----------------------------------------------------------------------------------------------------------------


def rows_between_nodes(experts: Tensor, home: Tensor, per_gpu: int, gpus_per_node: int) -> int:
    """How often tokens cross to another node where each goes to a node once."""
    node, own = experts // (per_gpu * gpus_per_node), home // gpus_per_node
    return sum(len(set(nodes) - {mine}) for nodes, mine in zip(node.tolist(), own.tolist(), strict=True))


def rows_naive(experts, home, per_gpu, gpus_per_node):
    """A row for each expert elsewhere."""
    return int((experts // (per_gpu * gpus_per_node) != home[:, None] // gpus_per_node).sum())


def rows_with_own_node(experts, home, per_gpu, gpus_per_node):
    return sum(len(set(nodes)) for nodes in (experts // (per_gpu * gpus_per_node)).tolist())


def rows_per_gpu(experts, home, per_gpu, gpus_per_node):
    own = home // gpus_per_node
    targets = zip((experts // per_gpu).tolist(), own.tolist(), strict=True)
    return sum(len({gpu for gpu in gpus if gpu // gpus_per_node != mine}) for gpus, mine in targets)


def rows_gpu_taken_for_node(experts, home, per_gpu, gpus_per_node):
    return rows_between_nodes(experts, home, per_gpu * gpus_per_node, 1)


def crossing_examples(generator: torch.Generator) -> list[tuple]:
    examples = []
    for tokens, experts, k, per_gpu, gpus_per_node in ((6, 16, 4, 2, 2), (40, 32, 8, 1, 4), (9, 24, 3, 3, 2)):
        gpus = experts // per_gpu
        chosen = torch.rand(tokens, experts, generator=generator).topk(k).indices
        examples.append((chosen, torch.randint(gpus, (tokens,), generator=generator), per_gpu, gpus_per_node))
    return examples


def counted_by_the_package(experts, home, per_gpu, gpus_per_node) -> int:
    """For the test of these exercises: the reference has to count what `Traffic` counts."""
    ranks = max(int(home.max()), int(experts.max()) // per_gpu) // gpus_per_node * gpus_per_node + gpus_per_node
    owner = torch.arange(ranks * per_gpu) // per_gpu
    return Traffic.forwarded(experts, home, owner, ranks, gpus_per_node).between_nodes


# 8.5 -----------------------------------------------------------------------------------------------------------------


def moe_on_ranks(x, experts, weights, matrices, wrong: str = "") -> tuple[list[Tensor], list[Tensor]]:
    """A mixture of experts over ranks; `wrong` names a mistake.

    By rank: x [tokens, dim], experts and weights [tokens, k]. matrices [experts, dim, dim] lie on the ranks in equal
    runs. Returns each rank's output, and the loads that it balances its router by.
    """
    ranks, per_rank = len(x), len(matrices) // len(x)
    orders = [e.flatten().argsort(stable=True) for e in experts]
    sent = [row[order // e.shape[1]] for row, order, e in zip(x, orders, experts, strict=True)]
    load = torch.stack([torch.bincount(e.flatten(), minlength=len(matrices)) for e in experts])
    cuts = load.view(ranks, ranks, per_rank).sum(-1)
    computed = []
    for rank, rows in enumerate(all_to_all(sent, cuts.tolist())):
        counts = load[:, rank * per_rank : (rank + 1) * per_rank].flatten()
        expert = torch.arange(per_rank).repeat(ranks).repeat_interleave(counts)
        computed.append(torch.einsum("n d, n d e -> n e", rows, matrices[rank * per_rank + expert]))
    if wrong == "order":
        computed = [rows.flip(0) for rows in computed]
    out = []
    for rows, order, weight in zip(all_to_all(computed, cuts.T.tolist()), orders, weights, strict=True):
        out.append(combine(rows, order, weight**2 if wrong == "weights" else weight))
    return out, list(load) if wrong == "loads" else [load.sum(0)] * ranks


def moe_returned_in_wrong_order(x, experts, weights, matrices):
    return moe_on_ranks(x, experts, weights, matrices, "order")


def moe_weighted_twice(x, experts, weights, matrices):
    return moe_on_ranks(x, experts, weights, matrices, "weights")


def moe_loads_per_rank(x, experts, weights, matrices):
    return moe_on_ranks(x, experts, weights, matrices, "loads")


EXERCISES = [
    Function(
        "8.1", "all_to_all", all_to_all, exchange_examples,
        mistakes={
            "every rank keeps its own rows": all_to_all_nothing_sent,
            "the last sender's rows come first": all_to_all_last_sender_first,
            "all parcels are padded to the largest": all_to_all_padded,
        },
        hint="cut each rank's rows into parcels, one per receiver; receiver r joins parcel r of every sender",
    ),
    Function(
        "8.2", "combine", combine, combine_examples,
        mistakes={
            "the rows are not put back into the order of the tokens": combine_without_undoing,
            "the order is applied a second time instead of its inverse": combine_with_order,
            "the rows are added without their weights": combine_unweighted,
            "the weights are put on before the rows are put back": combine_weights_as_sent,
        },
        hint="order[i] is the place that row i came from, so the row for place p is rows[order.argsort()[p]]",
        points=2,
    ),
    Function(
        "8.3", "pack", pack, pack_examples,
        mistakes={
            "a pack may hold more items than its share": pack_without_limit,
            "the lightest items are placed first": pack_lightest_first,
            "the items are placed in the order in which they come": pack_as_they_come,
            "the packs are filled in turn, whatever they weigh": pack_in_turn,
        },
        hint="sort by falling weight; of the packs with room, the one with the smallest total gets the item",
        points=2,
    ),
    Function(
        "8.4", "rows_between_nodes", rows_between_nodes, crossing_examples,
        mistakes={
            "a token crosses once for each of its experts": rows_naive,
            "the token's own node is counted too": rows_with_own_node,
            "a token crosses once for each GPU": rows_per_gpu,
            "home is taken for a node, but is a GPU": rows_gpu_taken_for_node,
        },
        hint="an expert's node is expert // (per_gpu * gpus_per_node); count each token's distinct nodes but its own",
        points=2,
    ),
    SpotTheBug(
        "8.5", "test_moe", moe_on_ranks,
        bugs=(
            Bug("rows come back in another order", moe_returned_in_wrong_order, "compute one token by hand"),
            Bug("weights are applied twice", moe_weighted_twice, "use weights that are not 1"),
            Bug("loads are counted per rank", moe_loads_per_rank, "what must the loads of two ranks have in common?"),
        ),
    ),
]  # fmt: skip
