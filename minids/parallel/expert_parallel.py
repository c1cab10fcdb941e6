"""Expert parallelism: every rank holds some of the experts; all-to-all sends tokens to their experts and back.

Notable choices:
- no token is dropped and none is padded: the ranks first exchange the numbers of rows, then exactly those rows;
- a row is sent as bytes with all that belongs to it in one message, so one exchange serves every precision;
- gradients use the same exchange in reverse. The ranks' losses are parts of one sum: an expert's gradient covers the
  tokens of all ranks, a replicated parameter's (router, attention, ...) only the tokens of its own rank;
- a rank without tokens joins every all-to-all, because the other ranks would wait for it forever.

Not covered: a token is sent to a rank once for each of its experts there; course/traffic.py counts what V3's kernels
save by sending it to a node only once (V3 section 3.2.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from minids.config import require
from minids.fp8.formats import dequantize, quantize
from minids.fp8.linear import ALONG_CHANNELS
from minids.model.moe import Dispatcher, Experts
from minids.model.transformer import MiniDS

Wire = Literal["as is", "bf16", "fp8"]


@dataclass(frozen=True)
class WirePrecision:
    """Precision of rows on the wire, in dispatch and combine; gradients use that of the opposite direction."""

    dispatch: Wire = "as is"
    combine: Wire = "as is"


AS_IS, AS_V3 = WirePrecision(), WirePrecision("fp8", "bf16")  # V3 section 3.3; FACTS.md section 5


def wait(message: dist.Work) -> None:
    """Wait for an exchange; a dispatcher may get a function that computes in the meantime instead."""
    message.wait()


@dataclass(frozen=True)
class AllToAllPlan:
    """Sizes of an all-to-all: rows sent to and received from each rank of `group`, in its order."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup
    wait: Callable[[dist.Work], None] = wait

    def exchange(self, message: UInt8[Tensor, "sent bytes"]) -> UInt8[Tensor, "received bytes"]:
        """Send each rank its rows; return the received rows, ordered by sending rank."""
        arrived = message.new_empty(sum(self.received), message.shape[1])
        self.wait(dist.all_to_all_single(arrived, message, self.received, self.sent, self.group, async_op=True))
        return arrived

    def back(self) -> "AllToAllPlan":
        """Return the plan of the reverse exchange."""
        return AllToAllPlan(self.received, self.sent, self.group, self.wait)


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows, the first tensor in the precision `there`, the others as they are; reversed in backward."""

    @staticmethod
    def forward(ctx, plan, there, back, *tensors):
        ctx.back = plan.back(), back
        return _exchange(tensors, plan, there)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return None, None, None, *_exchange(gradients, *ctx.back)


def _exchange(tensors: tuple[Tensor, ...], plan: AllToAllPlan, wire: Wire) -> tuple[Tensor, ...]:
    """Concatenate the columns of all tensors as bytes, exchange them, and split them again."""
    rows, *others = tensors
    parts = [*encode(rows, wire), *others]
    columns = [part.contiguous().view(torch.uint8) for part in parts]
    arrived = plan.exchange(torch.cat(columns, 1)).split([column.shape[1] for column in columns], 1)
    parts = [column.contiguous().view(part.dtype) for column, part in zip(arrived, parts, strict=True)]
    of_rows = len(parts) - len(others)
    return decode(parts[:of_rows], wire).to(rows.dtype), *parts[of_rows:]


def encode(rows: Float[Tensor, "rows dim"], wire: Wire) -> tuple[Tensor, ...]:
    """Encode rows for the wire: as they are, as bfloat16, or as E4M3 with a power-of-two scale per 128 channels."""
    if wire == "fp8":
        return quantize(rows, ALONG_CHANNELS, power_of_two=True)
    return (rows.bfloat16() if wire == "bf16" else rows,)


def decode(parts: list[Tensor], wire: Wire) -> Float[Tensor, "rows dim"]:
    """Decode rows from the result of `encode`."""
    if wire == "fp8":
        q, scale = parts
        return dequantize(q, scale, ALONG_CHANNELS)
    return parts[0]


def bytes_per_row(dim: int, wire: Wire = "as is") -> int:
    """Return the bytes of a row on the wire, scales included; "as is" means float32."""
    return sum(part.nbytes for part in encode(torch.zeros(1, dim), wire))


class AllToAllDispatcher(Dispatcher):
    """All-to-all dispatch: send rows to the ranks of their experts, compute there, and send the results back.

    Each rank of `mesh`, the expert-parallel axis, holds equally many consecutive experts, so rows sorted by expert are
    sorted by rank too. `wait(work)` is called for every exchange and returns when it has ended.
    """

    def __init__(
        self, mesh: DeviceMesh, precision: WirePrecision = AS_IS, wait: Callable[[dist.Work], None] = wait
    ) -> None:
        self.mesh, self.precision, self.wait = mesh, precision, wait

    def held(self, weight: Float[Tensor, "experts in out"]) -> Float[Tensor, "held in out"]:
        """Return this rank's shard of the experts' matrices."""
        assert isinstance(weight, DTensor)  # since `keep_shard`
        return weight.to_local()

    def __call__(
        self,
        compute: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows: Float[Tensor, "rows dim"],
        weights: Float[Tensor, "rows 1"],
        tokens_per_expert: Int[Tensor, "slots"],
    ) -> Float[Tensor, "rows dim"]:
        """Return `compute(rows, weights, counts)`, run on the ranks that hold the experts; rows are sorted by slot."""
        group, ranks = self.mesh.get_group(), self.mesh.size()
        arriving = torch.empty_like(tokens_per_expert)
        self.wait(dist.all_to_all_single(arriving, tokens_per_expert, None, None, group, async_op=True))
        sent, arriving = tokens_per_expert.view(ranks, -1), arriving.view(ranks, -1)  # the latter [from rank, own slot]
        plan = AllToAllPlan(sent.sum(1).tolist(), arriving.sum(1).tolist(), group, self.wait)

        dispatch, combine = self.precision.dispatch, self.precision.combine
        rows, weights = _AllToAll.apply(plan, dispatch, combine, rows, weights)
        order = _sorted_by_expert(arriving)
        out = compute(rows.index_select(0, order), weights.index_select(0, order), arriving.sum(0))
        return _AllToAll.apply(plan.back(), combine, dispatch, out.index_select(0, order.argsort()))[0]


def _sorted_by_expert(arriving: Int[Tensor, "ranks experts"]) -> Int[Tensor, "rows"]:
    """Return the permutation that sorts rows by expert; they arrive sorted by sending rank, then by expert."""
    expert = torch.arange(arriving.shape[1], device=arriving.device).repeat(len(arriving))
    return expert.repeat_interleave(arriving.flatten()).argsort(stable=True)


def keep_shard(experts: Experts, mesh: DeviceMesh, name: str, weight: Tensor) -> None:
    """Replace a matrix, which every rank has whole, by a DTensor of which this rank keeps its shard."""
    shard = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    setattr(experts, name, nn.Parameter(shard, getattr(experts, name).requires_grad))


def shard_experts(
    model: MiniDS, mesh: DeviceMesh, precision: WirePrecision = AS_IS, wait: Callable[[dist.Work], None] = wait
) -> None:
    """Shard the experts of every MoE layer over `mesh`, the expert-parallel axis, in place; also in MTP modules.

    Every rank calls this with an equal `model`; afterwards all ranks run forward and backward passes together, each on
    its own tokens. The matrices become DTensors sharded over their first dimension, so distributed checkpoints store
    them whole.
    Raises `ValueError` where the mesh has several dimensions or the experts cannot be divided.
    """
    require(mesh.ndim == 1, "mesh", mesh, "must have one dimension, that of the experts")
    experts, ranks = model.config.n_routed_experts, mesh.size()
    require(experts % ranks == 0, "n_routed_experts", experts, f"must be divisible by the {ranks} ranks")
    for module in (module for module in model.modules() if isinstance(module, Experts)):
        module.dispatcher = AllToAllDispatcher(mesh, precision, wait)
        for name, weight in list(module.named_parameters()):
            keep_shard(module, mesh, name, weight)
