"""Expert parallelism: every rank keeps some of the experts, and tokens travel to theirs and back.

Notable choices:
- nothing is dropped and nothing padded: ranks first tell each other how many rows will come, then send just those;
- a row travels as bytes, everything about it in one message, so that one exchange carries any precision;
- gradients travel the same way back, so the ranks' losses are understood as parts of one sum: an expert's gradient
  covers the tokens of all ranks, while what every rank has (router, attention, ...) gets its own tokens' part only;
- a rank without tokens takes part like any other: an exchange that one rank leaves out would hang the rest;
- computing behind an exchange needs no other model code: `take_turns` runs several micro-batches, and whichever waits
  for rows lets the next one compute.

Not covered: a token goes to a rank once for each of its experts there; `placement.Traffic` counts what V3's kernels
save by sending it to a node only once (V3 section 3.2.2). On a GPU only forward passes take turns, for autograd runs
backward passes in a thread of its own.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Semaphore
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from minids.config import require
from minids.model.fp8 import dequantize, quantize
from minids.model.fp8_linear import ALONG_CHANNELS, Fp8Experts
from minids.model.moe import Experts
from minids.model.transformer import MiniDS
from minids.parallel.placement import Placement

Wire = Literal["as is", "bf16", "fp8"]


@dataclass(frozen=True)
class Precision:
    """How rows travel to their experts and back; gradients go the other way round."""

    dispatch: Wire = "as is"
    combine: Wire = "as is"


AS_IS, AS_V3 = Precision(), Precision("fp8", "bf16")  # V3 section 3.3; FACTS.md section 5


@dataclass(frozen=True)
class Route:
    """How many rows go to each rank of `group`, in its order, and how many come from each."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup

    def exchange(self, message: UInt8[Tensor, "sent bytes"]) -> UInt8[Tensor, "received bytes"]:
        arrived = message.new_empty(sum(self.received), message.shape[1])
        _all_to_all(arrived, message, self.received, self.sent, self.group)
        return arrived

    def back(self) -> "Route":
        return Route(self.received, self.sent, self.group)


def _all_to_all(*arguments) -> None:
    """Start an exchange, let another micro-batch compute, and wait for what comes."""
    message = dist.all_to_all_single(*arguments, async_op=True)
    _let_others_work.get()(message)


class _Travel(torch.autograd.Function):
    """Rows, the first tensor in the precision `there` and others as they are, to their ranks; gradients back."""

    @staticmethod
    def forward(ctx, route, there, back, *tensors):
        ctx.back = route.back(), back
        return _carry(tensors, route, there)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return None, None, None, *_carry(gradients, *ctx.back)


def _carry(tensors: tuple[Tensor, ...], route: Route, wire: Wire) -> tuple[Tensor, ...]:
    """All columns of a row side by side as bytes, exchanged, and cut apart again."""
    rows, *others = tensors
    parts = [*encode(rows, wire), *others]
    columns = [part.contiguous().view(torch.uint8) for part in parts]
    arrived = route.exchange(torch.cat(columns, 1)).split([column.shape[1] for column in columns], 1)
    parts = [column.contiguous().view(part.dtype) for column, part in zip(arrived, parts, strict=True)]
    of_rows = len(parts) - len(others)
    return decode(parts[:of_rows], wire).to(rows.dtype), *parts[of_rows:]


def encode(rows: Float[Tensor, "rows dim"], wire: Wire) -> tuple[Tensor, ...]:
    """What travels of each row: itself, rounded to bfloat16, or E4M3 with a power-of-two scale per 128 channels."""
    if wire == "fp8":
        return quantize(rows, ALONG_CHANNELS, power_of_two=True)
    return (rows.bfloat16() if wire == "bf16" else rows,)


def decode(parts: list[Tensor], wire: Wire) -> Float[Tensor, "rows dim"]:
    """The rows again, from what `encode` made of them."""
    return dequantize(*parts, ALONG_CHANNELS) if wire == "fp8" else parts[0]


def bytes_per_row(dim: int, wire: Wire = "as is") -> int:
    """What the channels of a row weigh on the way, scales included; "as is" means float32."""
    return sum(part.nbytes for part in encode(torch.zeros(1, dim), wire))


class Sharded:
    """Goes in front of `Experts`: rows sorted by expert are sent to the experts' ranks, multiplied there and sent back.

    Each rank holds an equal run of the experts, so rows sorted by expert are sorted by rank too. After `move` it holds
    an equal run of the slots, and what is sorted by is the slot.
    """

    mesh: DeviceMesh
    precision: Precision
    expert_of_slot: Int[Tensor, "slots"] | None = None

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of this rank's experts."""
        return tuple(weight.to_local() for weight in super().matrices())

    def by_expert(self, x, experts, weights, load) -> Float[Tensor, "tokens dim"]:
        if self.expert_of_slot is not None:
            experts = slots_in_turn(experts, self.expert_of_slot)
            load = torch.bincount(experts.flatten(), minlength=len(self.expert_of_slot))
        return super().by_expert(x, experts, weights, load)

    def by_token(self, x, experts, weights) -> Float[Tensor, "tokens dim"]:
        """Few tokens travel like many: the other ranks may have more."""
        return self.by_expert(x, experts, weights, torch.bincount(experts.flatten(), minlength=len(self.gate_proj)))

    def multiply(self, rows, weights, load) -> Float[Tensor, "rows dim"]:
        group, ranks = self.mesh.get_group(), self.mesh.size()
        arriving = torch.empty_like(load)
        _all_to_all(arriving, load, None, None, group)
        sent, arriving = load.view(ranks, -1), arriving.view(ranks, -1)  # the latter [from rank, own expert]
        route = Route(sent.sum(1).tolist(), arriving.sum(1).tolist(), group)

        dispatch, combine = self.precision.dispatch, self.precision.combine
        rows, weights = _Travel.apply(route, dispatch, combine, rows, weights)
        order = _sorted_by_expert(arriving)
        out = super().multiply(rows.index_select(0, order), weights.index_select(0, order), arriving.sum(0))
        return _Travel.apply(route.back(), combine, dispatch, out.index_select(0, order.argsort()))[0]

    @torch.no_grad()
    def move(self, expert_of_slot: Int[Tensor, "slots"]) -> None:
        """Hold this rank's run of these slots; where an expert has several copies, the first one is copied.

        One matrix after the other is gathered whole on every rank: simple, and dear where experts are large.
        """
        old = self.expert_of_slot
        source = expert_of_slot if old is None else slots_in_turn(expert_of_slot[None], old)[0]
        for name, weight in list(self.named_parameters()):
            self.share_out(name, weight.full_tensor()[source])
        self.expert_of_slot = expert_of_slot

    def share_out(self, name: str, weight: Tensor) -> None:
        """Keep this rank's run of a matrix that every rank has whole, as a DTensor."""
        shard = distribute_tensor(weight.detach(), self.mesh, [Shard(0)], src_data_rank=None)
        setattr(self, name, nn.Parameter(shard, getattr(self, name).requires_grad))


def slots_in_turn(experts: Int[Tensor, "tokens k"], expert_of_slot: Int[Tensor, "slots"]) -> Int[Tensor, "tokens k"]:
    """A slot that holds each expert: token after token its copies take turns, beginning with the first."""
    copies = torch.bincount(expert_of_slot)
    before = copies.cumsum(0) - copies
    turn = torch.arange(len(experts), device=experts.device)[:, None]
    return expert_of_slot.argsort(stable=True)[before[experts] + turn % copies[experts]]


def _sorted_by_expert(arriving: Int[Tensor, "ranks experts"]) -> Int[Tensor, "rows"]:
    """The order that brings rows, which lie by sending rank and then by expert, together by expert."""
    expert = torch.arange(arriving.shape[1], device=arriving.device).repeat(len(arriving))
    return expert.repeat_interleave(arriving.flatten()).argsort(stable=True)


class ShardedExperts(Sharded, Experts):
    pass


class ShardedFp8Experts(Sharded, Fp8Experts):
    pass


def shard_experts(model: MiniDS, mesh: DeviceMesh, precision: Precision = AS_IS) -> None:
    """Keep only this rank's share of the experts of every MoE layer, the prediction modules' too, in place.

    `mesh` is the expert-parallel axis; every rank calls this with an equal `model`, and from then on all ranks run
    forward and backward passes together, each on tokens of its own. The matrices become DTensors sharded over their
    first dimension, so distributed checkpoints hold them whole. To train in FP8, convert first.
    Raises `ValueError` where the mesh has several dimensions or the experts cannot be divided.
    """
    require(mesh.ndim == 1, "mesh", mesh, "must have one dimension, that of the experts")
    experts, ranks = model.config.n_routed_experts, mesh.size()
    require(experts % ranks == 0, "n_routed_experts", experts, f"must be divisible by the {ranks} ranks")
    for module in list(model.modules()):
        if isinstance(module, Experts):
            module.__class__ = ShardedFp8Experts if isinstance(module, Fp8Experts) else ShardedExperts
            module.mesh, module.precision = mesh, precision
            for name, weight in list(module.named_parameters()):
                module.share_out(name, weight)


def move_experts(model: MiniDS, placement: Placement) -> None:
    """Put the experts of a sharded model, rows of `placement` as in `Output.loads`, into the slots of a placement.

    The outputs stay what they were; the sizes on the ranks may change. For serving: copies of an expert would be
    trained apart, and a checkpoint holds the experts in the order of their slots. Every rank calls this.
    Raises `ValueError` where the placement is for other layers, experts or ranks.
    """
    layers = [module for module in model.modules() if isinstance(module, Sharded)]
    rows, experts = placement.expert_of_slot, model.config.n_routed_experts
    require(len(rows) == len(layers), "placement", tuple(rows.shape), f"must have the {len(layers)} sharded MoE layers")
    held = placement.copies.shape[1]
    require(held == experts, "placement", held, f"must place the {experts} experts of the model")
    ranks = layers[0].mesh.size()
    require(placement.gpus == ranks, "gpus", placement.gpus, f"must be the {ranks} ranks that share the experts")
    for layer, expert_of_slot in zip(layers, rows, strict=True):
        layer.move(expert_of_slot.to(layer.gate_proj.device))


# Computing while rows travel -----------------------------------------------------------------------------------------


class Stretch(NamedTuple):
    """What one of the works did, in seconds from a common start: it computed, or waited for rows still on their way."""

    work: int
    what: Literal["compute", "wait"]
    start: float
    end: float


_let_others_work: ContextVar[Callable[[dist.Work], Any]] = ContextVar("turns", default=lambda message: message.wait())


class _Turns:
    """A baton that goes round among threads: only the one that holds it runs."""

    def __init__(self, works: Sequence[Callable[[], Any]]):
        self.works, self.going = works, list(range(len(works)))
        self.batons = [Semaphore(0) for _ in works]
        self.stretches, self.start = [], time.perf_counter()

    def run(self, me: int) -> Any:
        self.batons[me].acquire()
        since = time.perf_counter()

        def exchange(message) -> None:
            nonlocal since
            self.note(me, "compute", since)
            self.batons[self.after(me)].release()
            self.batons[me].acquire()
            since = time.perf_counter()
            message.wait()
            since = self.note(me, "wait", since)

        _let_others_work.set(exchange)
        try:
            return self.works[me]()
        finally:
            self.note(me, "compute", since)
            following = self.after(me)
            self.going.remove(me)
            self.batons[following].release()

    def after(self, me: int) -> int:
        return self.going[(self.going.index(me) + 1) % len(self.going)]

    def note(self, me: int, what: str, since: float) -> float:
        now = time.perf_counter()
        self.stretches.append(Stretch(me, what, since - self.start, now - self.start))
        return now


def take_turns(works: Sequence[Callable[[], Any]]) -> tuple[list[Any], list[Stretch]]:
    """Run the works, one at a time, each until it waits for an exchange; returns their results and who did what when.

    V3 lets two micro-batches of equal size take turns (V3 section 3.4). On all ranks the works must come in the same
    order, for that is the order of their exchanges. Each runs in a thread: set modes such as `torch.no_grad` inside.
    """
    turns = _Turns(works)
    with ThreadPoolExecutor(len(works)) as threads:
        results = [threads.submit(turns.run, i) for i in range(len(works))]
        turns.batons[0].release()
        return [result.result() for result in results], turns.stretches
