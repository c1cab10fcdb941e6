"""Exercises of chapter 08: rows sent to experts on other ranks and back, and experts that are placed on GPUs.

All ranks live in one process, but for the open task: a list holds one entry per rank. Each rank has equally many
consecutive experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.parallel.eplb import rebalance

# 8.1 -----------------------------------------------------------------------------------------------------------------


def all_to_all(rows: list[Tensor], cuts: list[list[int]]) -> list[Tensor]:
    """cuts[s][r] rows go from rank s to rank r; each rank gets its chunks in the order of the senders."""
    return exchange(rows, cuts)


def exchange(rows, cuts, *, last_sender_first=False, padded=False, shift=0) -> list[Tensor]:
    ranks, size = len(rows), max(max(cut) for cut in cuts)
    outbox = [list(row.split(cut)) for row, cut in zip(rows, cuts, strict=True)]
    if padded:  # every chunk as large as the largest, as in systems with a fixed capacity
        outbox = [[torch.cat([c, c.new_zeros(size - len(c), c.shape[1])]) for c in chunks] for chunks in outbox]
    senders = outbox[::-1] if last_sender_first else outbox
    return [torch.cat([chunks[(rank + shift) % ranks] for chunks in senders]) for rank in range(ranks)]


def exchange_nothing(rows, cuts):
    return [row.clone() for row in rows]


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


def unweighted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda rows, order, weights: function(rows, order, torch.ones_like(weights))


def combine_weights_as_sent(rows, order, weights):
    """The rows are put back, but each carries the weight of another."""
    return unweighted(combine)(rows * weights.flatten()[:, None], order, weights)


def combine_mean(rows, order, weights):
    return combine(rows, order, weights) / weights.shape[1]


def combine_normalised(rows, order, weights):
    return combine(rows, order, weights / weights.sum(1, keepdim=True))


def combine_examples(generator: torch.Generator) -> list[tuple]:
    examples = []
    for tokens, k, dim in ((3, 2, 4), (5, 3, 1), (7, 4, 2)):
        experts = torch.rand(tokens, 8, generator=generator).topk(k).indices
        rows, weights = (torch.rand(*shape, generator=generator) for shape in ((tokens * k, dim), (tokens, k)))
        examples.append((rows, experts.flatten().argsort(stable=True), weights))
    return examples


# 8.3 -----------------------------------------------------------------------------------------------------------------


def rows_between_nodes(experts: Tensor, home: Tensor, per_gpu: int, gpus_per_node: int) -> int:
    """How often tokens cross to another node where each goes to a node once."""
    node, own = experts // (per_gpu * gpus_per_node), home // gpus_per_node
    return sum(len(set(nodes) - {mine}) for nodes, mine in zip(node.tolist(), own.tolist(), strict=True))


def rows_naive(experts, home, per_gpu, gpus_per_node):
    """A row for each expert elsewhere."""
    return int((experts // (per_gpu * gpus_per_node) != home[:, None] // gpus_per_node).sum())


def rows_with_own_node(experts, home, per_gpu, gpus_per_node):
    return sum(len(set(nodes)) for nodes in (experts // (per_gpu * gpus_per_node)).tolist())


def rows_without_any_node(experts, home, per_gpu, gpus_per_node):
    return rows_with_own_node(experts, home, per_gpu, gpus_per_node) - len(experts)


def rows_per_gpu(experts, home, per_gpu, gpus_per_node):
    own = home // gpus_per_node
    targets = zip((experts // per_gpu).tolist(), own.tolist(), strict=True)
    return sum(len({gpu for gpu in gpus if gpu // gpus_per_node != mine}) for gpus, mine in targets)


def rows_per_gpu_with_own_node(experts, home, per_gpu, gpus_per_node):
    return rows_with_own_node(experts, home, per_gpu, 1)


def rows_gpu_taken_for_node(experts, home, per_gpu, gpus_per_node):
    return rows_between_nodes(experts, home, per_gpu * gpus_per_node, 1)


def crossing_examples(generator: torch.Generator) -> list[tuple]:
    examples = []
    for tokens, experts, k, per_gpu, gpus_per_node in ((6, 16, 4, 2, 2), (40, 32, 8, 1, 4), (9, 24, 3, 3, 2)):
        gpus = experts // per_gpu
        chosen = torch.rand(tokens, experts, generator=generator).topk(k).indices
        examples.append((chosen, torch.randint(gpus, (tokens,), generator=generator), per_gpu, gpus_per_node))
    return examples


# 8.4 -----------------------------------------------------------------------------------------------------------------


def moe(x: list[Tensor], experts: list[Tensor], weights: list[Tensor], matrices: Tensor):
    """A mixture of experts over ranks: each rank's output, and the loads that it balances its router by.

    By rank: x [tokens, dim], experts and weights [tokens, k]. matrices is [experts, dim, dim].
    """
    return moe_on_ranks(x, experts, weights, matrices)


def moe_on_ranks(x, experts, weights, matrices, wrong: str = "") -> tuple[list[Tensor], list[Tensor]]:
    """Compute `moe`, with the mistake that `wrong` names."""
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


# 8.5 -----------------------------------------------------------------------------------------------------------------

STALE_LOW, STALE_HIGH = 32, 52  # the median over 20 seeds is 40; for other orders of drawing 35 to 46


def above_mean_today(
    seed: int, drift: float = 0.3, spread: float = 0.8, copies: int = 64, renewed: bool = False, today: bool = True
) -> float:
    """Busiest of 64 GPUs above the mean, %, by loads of today, where the loads of yesterday made the placement."""
    generator = torch.Generator().manual_seed(seed)
    before, change = (torch.randn(1, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    yesterday = (spread * before).exp()
    now = yesterday * (drift * change).exp()
    placement = rebalance(now if renewed else yesterday, 256 + copies, 1, 1, 64)
    return 100 * placement.imbalance(now if today else yesterday).item()


EXERCISES = [
    Function(
        "8.1", "all_to_all", all_to_all, exchange_examples,
        mistakes={
            "every rank keeps its own rows": exchange_nothing,
            "the last sender's rows come first": partial(exchange, last_sender_first=True),
            "all chunks are padded to the largest": partial(exchange, padded=True),
            "rank r gets what was meant for rank r + 1": partial(exchange, shift=1),
            "all chunks are padded to the largest, and the last sender's rows come first":
                partial(exchange, padded=True, last_sender_first=True),
        },
        hints=(
            "seen as a table of chunks, sender by receiver, an all-to-all is a transposition",
            "cut each rank's rows with rows[s].split(cuts[s]); receiver r concatenates chunk r of every sender",
        ),
        section="chapter 08, section 2.1 (all-to-all) and section 2.2 (which rows go where)",
    ),
    Function(
        "8.2", "combine", combine, combine_examples,
        mistakes={
            "the rows are not put back into the order of the tokens": combine_without_undoing,
            "the order is applied a second time instead of its inverse": combine_with_order,
            "the rows are added without their weights": unweighted(combine),
            "the weights are applied before the rows are put back": combine_weights_as_sent,
            "the mean of a token's k rows is taken instead of their sum": combine_mean,
            "the weights of a token are normalised once more": combine_normalised,
            "the rows are not put back into the order of the tokens, and are added without their weights":
                unweighted(combine_without_undoing),
            "the order is applied a second time instead of its inverse, and the rows are added without their weights":
                unweighted(combine_with_order),
        },
        hints=(
            "a permutation is undone by its inverse; only then do rows and weights belong together",
            "row i goes to place order[i]: placed[order] = rows, or rows[order.argsort()]; then [tokens, k, dim]",
        ),
        section="chapter 08, section 2.4: dispatch and combine",
        points=2,
    ),
    Function(
        "8.3", "rows_between_nodes", rows_between_nodes, crossing_examples,
        mistakes={
            "a token crosses once for each of its experts": rows_naive,
            "the token's own node is counted too": rows_with_own_node,
            "one node is subtracted for every token, even where none of its experts is on its own node":
                rows_without_any_node,
            "a token crosses once for each GPU": rows_per_gpu,
            "home is taken for a node, but is a GPU": rows_gpu_taken_for_node,
            "a token crosses once for each GPU, and those of its own node are counted too": rows_per_gpu_with_own_node,
        },
        hints=(
            "what counts is neither experts nor GPUs, but the different nodes that one token has to reach",
            "an expert's node is expert // (per_gpu * gpus_per_node); count each token's set of nodes without its own",
        ),
        section="chapter 08, section 4.1: rows between nodes, and the node limit",
        points=2,
    ),
    SpotTheBug(
        "8.4", "test_moe", moe,
        (
            Bug("rows come back in another order", moe_returned_in_wrong_order, "compute one token by hand"),
            Bug("weights are applied twice", moe_weighted_twice, "use weights that are not 1"),
            Bug("loads are counted per rank", moe_loads_per_rank, "what must the loads of two ranks have in common?"),
        ),
        hints=(
            "every output can be computed without any ranks, one token after the other; so can the loads",
            "compare outputs[r][t] with the sum of w * (x[r][t] @ matrices[e]) over the token's choices, "
            "and each of `loads` with a bincount of all choices of all ranks",
        ),
        section="chapter 08, section 2.5 (silent errors) and section 3.2 (gradients and loads)",
    ),
    Experiment(
        "8.5", "above_mean_today", "busiest GPU above the mean, %", STALE_LOW, STALE_HIGH, seeds=tuple(range(20)),
        hints=(
            "two load vectors: the placement is made from the first, its imbalance is measured with the second",
            "old = (0.8 * torch.randn(1, 256)).exp(); new = old * (0.3 * torch.randn(1, 256)).exp(); globally: "
            "rebalance(old, 320, 1, 1, 64); then 100 * placement.imbalance(new).item()",
        ),
        section="chapter 08, section 4.6: EPLB, and section 5.3: redundant experts at scale",
    ),
    OpenTask(
        "8.6", "dispatch_once",
        (
            "four processes equal one process in float64: outputs, gradients of x, weights and matrices",
            "a token crosses once to a rank and comes back as one row, however many of its experts are there",
            "it says how many rows that saves here, and what share for V3's 8 experts on 64 ranks",
            "a rank without tokens does not hang the others; a test shows it",
            "it says what changes when rows are returned in BF16: which sums are rounded, and how often",
        ),
        hints=(
            "what has to be sent with a token, so that a rank knows which of its experts to apply, with which weights?",
            "needed = F.one_hot(chosen // held, ranks).amax(1); send [row, gate weights of all of that rank] "
            "to each needed rank; there a weighted sum over its experts; at home index_add the rows that return",
        ),
        section="chapter 08, section 2.4: dispatch and combine",
    ),
]  # fmt: skip
