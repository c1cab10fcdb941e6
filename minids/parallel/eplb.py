"""Expert placement (EPLB): the busiest experts get copies, so that all GPUs have about the same load.

Notable choices:
- greedy as published, and in plain Python: the heaviest item first, each into the lightest pack with a free place;
- one function for both modes: global balancing is hierarchical balancing with one node and one group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from minids.config import require


@dataclass(frozen=True)
class Placement:
    """The expert of each slot, per layer; each GPU holds equally many consecutive slots.

    Raises `ValueError` where the slots cannot be divided equally or an expert has no slot.
    """

    expert_of_slot: Int[Tensor, "layers slots"]
    gpus: int

    def __post_init__(self):
        slots = self.expert_of_slot.shape[1]
        require(slots % self.gpus == 0, "slots", slots, f"must be divisible by gpus={self.gpus}")
        require(bool(self.copies.all()), "expert_of_slot", self.expert_of_slot.tolist(), "every expert needs a slot")

    @property
    def copies(self) -> Int[Tensor, "layers experts"]:
        """Number of slots that hold each expert."""
        experts = int(self.expert_of_slot.max()) + 1
        return torch.stack([torch.bincount(row, minlength=experts) for row in self.expert_of_slot])

    def gpu_loads(self, load: Real[Tensor, "layers experts"]) -> Float[Tensor, "layers gpus"]:
        """Return the tokens on each GPU, where the copies of an expert divide its load equally."""
        per_slot = (load / self.copies).gather(1, self.expert_of_slot)
        return per_slot.unflatten(1, (self.gpus, -1)).sum(-1)

    def imbalance(self, load: Real[Tensor, "layers experts"]) -> Float[Tensor, "layers"]:
        """Return the load of the busiest GPU, which determines the time of a step, over the mean load, minus 1."""
        loads = self.gpu_loads(load)
        return loads.amax(1) / loads.mean(1) - 1


def rebalance(load: Real[Tensor, "layers experts"], slots: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Assign `slots` to experts by measured `load`, and place them on `gpus` in `nodes` (EPLB; FACTS.md section 9).

    Hierarchical where the nodes divide the groups: groups are packed into nodes, which node-limited routing needs; each
    node copies its busiest experts; slots are packed into its GPUs. Otherwise global, which ignores groups and nodes.
    Raises `ValueError` where the numbers do not fit together.
    """
    experts = load.shape[1]
    require(groups > 0 and experts % groups == 0, "groups", groups, f"must divide the {experts} experts")
    require(nodes > 0 and gpus > 0 and gpus % nodes == 0, "nodes", nodes, f"must divide gpus={gpus}")
    require(slots % gpus == 0, "slots", slots, f"must be divisible by gpus={gpus}")
    require(slots >= experts, "slots", slots, f"must be at least {experts}, one for each expert")
    require(bool((load >= 0).all()), "load", load.min().item(), "must not be negative, nor a NaN")
    if groups % nodes:
        groups, nodes = 1, 1
    return Placement(torch.tensor([_place(row, slots, groups, nodes, gpus) for row in load.double().tolist()]), gpus)


def _place(load: list[float], slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """Return the expert of each slot in one layer."""
    size, expert_of_slot = len(load) // groups, []
    for node in pack([sum(load[g * size : (g + 1) * size]) for g in range(groups)], nodes):
        experts = [group * size + i for group in node for i in range(size)]
        held = replicate([load[expert] for expert in experts], slots // nodes)
        per_slot = [load[experts[i]] / held.count(i) for i in held]
        expert_of_slot += [experts[held[slot]] for gpu in pack(per_slot, gpus // nodes) for slot in gpu]
    return expert_of_slot


def pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Pack items, equally many per pack: the heaviest first, each into the lightest pack that has a free place.

    Where a pack holds one item, item i stays in pack i, as published: no order is more balanced.
    """
    if len(weights) == packs:
        return [[item] for item in range(packs)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    totals = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((p for p in range(packs) if len(packed[p]) < len(weights) // packs), key=totals.__getitem__)
        packed[lightest].append(item)
        totals[lightest] += weights[item]
    return packed


def replicate(weights: Sequence[float], slots: int) -> list[int]:
    """Return the item of each slot: every item once, then repeatedly the one with the largest weight per copy."""
    held, copies = list(range(len(weights))), [1] * len(weights)
    while len(held) < slots:
        busiest = max(range(len(weights)), key=lambda i: weights[i] / copies[i])
        held.append(busiest)
        copies[busiest] += 1
    return held
