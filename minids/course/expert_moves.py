"""Move experts between ranks, with copies of the busiest, as EPLB places them: for inference, and for chapter 08."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from minids.config import require
from minids.model.moe import Experts
from minids.model.transformer import MiniDS
from minids.parallel.eplb import Placement
from minids.parallel.expert_parallel import AllToAllDispatcher, keep_shard


class SlotDispatcher(AllToAllDispatcher):
    """All-to-all dispatch to slots: each rank holds equally many; copies of an expert receive its tokens in turn."""

    def __init__(self, plain: AllToAllDispatcher, expert_of_slot: Int[Tensor, "slots"]) -> None:
        super().__init__(plain.mesh, plain.precision, plain.wait)
        self.expert_of_slot = expert_of_slot

    def slots(
        self, experts: Int[Tensor, "tokens k"], tokens_per_expert: Int[Tensor, "experts"]
    ) -> tuple[Int[Tensor, "tokens k"], Int[Tensor, "slots"]]:
        slots = slots_in_turn(experts, self.expert_of_slot)
        return slots, torch.bincount(slots.flatten(), minlength=len(self.expert_of_slot))


def slots_in_turn(experts: Int[Tensor, "tokens k"], expert_of_slot: Int[Tensor, "slots"]) -> Int[Tensor, "tokens k"]:
    """Return a slot that holds each chosen expert: token t takes copy t modulo the number of copies."""
    copies = torch.bincount(expert_of_slot)
    before = copies.cumsum(0) - copies
    turn = torch.arange(len(experts), device=experts.device)[:, None]
    return expert_of_slot.argsort(stable=True)[before[experts] + turn % copies[experts]]


def move_experts(model: MiniDS, placement: Placement) -> None:
    """Move the experts of a sharded model into the slots of a placement, which has one row per MoE layer; in place.

    The outputs do not change; the memory of the ranks may. For inference only: training would let copies of an expert
    diverge, and a checkpoint holds the experts in the order of their slots. Every rank calls this; one matrix at a time
    is gathered whole on every rank, which is simple, and expensive where experts are large.
    Raises `ValueError` where the placement is for other layers, experts or ranks.
    """
    modules = (module for module in model.modules() if isinstance(module, Experts))
    layers = [(each, each.dispatcher) for each in modules if isinstance(each.dispatcher, AllToAllDispatcher)]
    rows, experts = placement.expert_of_slot, model.config.n_routed_experts
    require(len(rows) == len(layers), "placement", tuple(rows.shape), f"must have the {len(layers)} sharded MoE layers")
    held = placement.copies.shape[1]
    require(held == experts, "placement", held, f"must place the {experts} experts of the model")
    ranks = layers[0][1].mesh.size()
    require(placement.gpus == ranks, "gpus", placement.gpus, f"must be the {ranks} ranks that hold the experts")
    for (layer, dispatcher), expert_of_slot in zip(layers, rows, strict=True):
        _move(layer, dispatcher, expert_of_slot.to(layer.gate_proj.device))


@torch.no_grad()
def _move(layer: Experts, before: AllToAllDispatcher, expert_of_slot: Int[Tensor, "slots"]) -> None:
    """Replace this rank's experts by those of its slots; of an expert with several copies, the first is the source."""
    source = expert_of_slot
    if isinstance(before, SlotDispatcher):
        source = slots_in_turn(expert_of_slot[None], before.expert_of_slot)[0]
    for name, weight in list(layer.named_parameters()):
        assert isinstance(weight, DTensor)  # since `keep_shard`
        keep_shard(layer, before.mesh, name, weight.full_tensor()[source])
    layer.dispatcher = SlotDispatcher(before, expert_of_slot)
