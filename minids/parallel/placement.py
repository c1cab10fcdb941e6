"""Where experts live (EPLB: the busiest get copies, and every GPU about the same work), and what then travels.

Notable choices:
- greedy as published, and in plain Python: the heaviest first, each to the lightest place that still has room;
- one function for both modes: balancing over the whole machine is balancing over one node that holds one group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from minids.config import require


@dataclass(frozen=True)
class Placement:
    """Which expert each slot holds, by layer; the slots lie on the GPUs in equal runs.

    Raises `ValueError` where the runs would not be equal or an expert has no slot.
    """

    expert_of_slot: Int[Tensor, "layers slots"]
    gpus: int

    def __post_init__(self):
        slots = self.expert_of_slot.shape[1]
        require(slots % self.gpus == 0, "slots", slots, f"must be divisible by gpus={self.gpus}")
        require(bool(self.copies.all()), "expert_of_slot", self.expert_of_slot.tolist(), "every expert needs a slot")

    @property
    def copies(self) -> Int[Tensor, "layers experts"]:
        """How many slots hold each expert."""
        experts = int(self.expert_of_slot.max()) + 1
        return torch.stack([torch.bincount(row, minlength=experts) for row in self.expert_of_slot])

    def gpu_loads(self, load: Real[Tensor, "layers experts"]) -> Float[Tensor, "layers gpus"]:
        """Tokens on each GPU where the copies of an expert share its load equally."""
        per_slot = (load / self.copies).gather(1, self.expert_of_slot)
        return per_slot.unflatten(1, (self.gpus, -1)).sum(-1)

    def imbalance(self, load: Real[Tensor, "layers experts"]) -> Float[Tensor, "layers"]:
        """How far the busiest GPU lies above the mean, in means: a step waits for it."""
        loads = self.gpu_loads(load)
        return loads.amax(1) / loads.mean(1) - 1


def rebalance(load: Real[Tensor, "layers experts"], slots: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Give `slots` to experts by their measured `load`, and lay them on `gpus` in `nodes` (EPLB; FACTS.md section 9).

    Hierarchical where the nodes divide the groups: groups are packed into nodes, so that node-limited routing keeps
    its sense; each node copies its busiest experts; slots are packed into its GPUs. Otherwise global, which ignores
    groups and nodes. Raises `ValueError` where the numbers do not fit together.
    """
    experts = load.shape[1]
    require(groups > 0 and experts % groups == 0, "groups", groups, f"must divide the {experts} experts")
    require(nodes > 0 and gpus > 0 and gpus % nodes == 0, "nodes", nodes, f"must divide gpus={gpus}")
    require(slots % gpus == 0, "slots", slots, f"must be divisible by gpus={gpus}")
    require(slots >= experts, "slots", slots, f"every one of the {experts} experts needs one")
    require(bool((load >= 0).all()), "load", load.min().item(), "must not be negative, nor a NaN")
    if groups % nodes:
        groups, nodes = 1, 1
    return Placement(torch.tensor([_place(row, slots, groups, nodes, gpus) for row in load.double().tolist()]), gpus)


def _place(load: list[float], slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """The expert of each slot in one layer."""
    size, expert_of_slot = len(load) // groups, []
    for node in pack([sum(load[g * size : (g + 1) * size]) for g in range(groups)], nodes):
        experts = [group * size + i for group in node for i in range(size)]
        held = replicate([load[expert] for expert in experts], slots // nodes)
        per_slot = [load[experts[i]] / held.count(i) for i in held]
        expert_of_slot += [experts[held[slot]] for gpu in pack(per_slot, gpus // nodes) for slot in gpu]
    return expert_of_slot


def pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Items by pack, equally many in each: the heaviest first, each to the lightest pack that still has room."""
    packed, totals = [[] for _ in range(packs)], [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((p for p in range(packs) if len(packed[p]) < len(weights) // packs), key=totals.__getitem__)
        packed[lightest].append(item)
        totals[lightest] += weights[item]
    return packed


def replicate(weights: Sequence[float], slots: int) -> list[int]:
    """The item of each slot: every item once, then again and again the one with the most weight per copy."""
    held, copies = list(range(len(weights))), [1] * len(weights)
    while len(held) < slots:
        busiest = max(range(len(weights)), key=lambda i: weights[i] / copies[i])
        held.append(busiest)
        copies[busiest] += 1
    return held


# What then travels --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """How many rows go from rank to rank in one dispatch (as many come back), and how many ranks share a node."""

    rows: Int[Tensor, "ranks ranks"]
    gpus_per_node: int

    @classmethod
    def naive(cls, experts: Int[Tensor, "tokens k"], source: Int[Tensor, "tokens"], owner: Int[Tensor, "experts"],
              ranks: int, gpus_per_node: int) -> "Traffic":  # fmt: skip
        """A row for each expert of a token, from the rank `source` that has the token to the expert's `owner`."""
        return cls(_count(source[:, None].expand_as(experts), owner[experts], ranks), gpus_per_node)

    @classmethod
    def forwarded(cls, experts: Int[Tensor, "tokens k"], source: Int[Tensor, "tokens"], owner: Int[Tensor, "experts"],
                  ranks: int, gpus_per_node: int) -> "Traffic":  # fmt: skip
        """As V3 does: once to the GPU of the same number in each node, from there to each GPU that has an expert."""
        token, target = _distinct(torch.arange(len(experts), device=experts.device)[:, None], owner[experts], ranks)
        relay = target // gpus_per_node * gpus_per_node + source[token] % gpus_per_node
        crossing, entry = _distinct(token, relay, ranks)
        return cls(_count(source[crossing], entry, ranks) + _count(relay, target, ranks), gpus_per_node)

    @property
    def within_nodes(self) -> int:
        """Rows that go to another GPU of the same node (NVLink)."""
        return int(self.rows[self._same_node()].sum() - self.rows.trace())

    @property
    def between_nodes(self) -> int:
        """Rows that go to another node (InfiniBand)."""
        return int(self.rows[~self._same_node()].sum())

    def _same_node(self) -> Tensor:
        node = torch.arange(len(self.rows)) // self.gpus_per_node
        return node[:, None] == node


def _count(source: Tensor, target: Tensor, ranks: int) -> Int[Tensor, "ranks ranks"]:
    return torch.bincount((source * ranks + target).flatten(), minlength=ranks**2).view(ranks, ranks)


def _distinct(token: Tensor, rank: Tensor, ranks: int) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
    """Every pair of a token and a rank once."""
    pairs = (token * ranks + rank).unique()
    return pairs // ranks, pairs % ranks
