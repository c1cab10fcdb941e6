"""Every private or undocumented name of torch that this package uses, each with its purpose and the missing public way.

The other modules import these names from here, so that a torch upgrade that removes one breaks this file only.
tests/parallel/test_torch_private.py names all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _python_dispatch

__all__ = [
    "GROUPED_MM", "LOCAL_SCALAR_DENSE", "FakeTensorMode", "TorchDispatchMode", "default_store", "fake_store",
    "flatten_mesh", "forget_shardings", "pipeline_runtime", "pop_backward_state", "reduce_gradients", "scale_in_place",
    "storage_id",
]  # fmt: skip

# Fake tensors, for counting activations ------------------------------------------------------------------------------

FakeTensorMode = fake_tensor.FakeTensorMode
"""Runs code on tensors with shapes but no content; public `device="meta"` changes the device that the code sees."""

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""Intercepts every operation, here those that fake tensors do not support; there is no public hook for that."""

LOCAL_SCALAR_DENSE = torch.ops.aten._local_scalar_dense.default
"""The operation behind `Tensor.item()`, as a `TorchDispatchMode` sees it; it has no public name."""

GROUPED_MM = torch.ops.aten._grouped_mm.default
"""The operation behind `torch.nn.functional.grouped_mm`, as a `TorchDispatchMode` sees it; it has no public name."""


def storage_id(storage: torch.UntypedStorage) -> int:
    """Identify a storage among those alive; the public `data_ptr()` is not defined for fake tensors."""
    return storage._cdata


# Sharding and collectives --------------------------------------------------------------------------------------------


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Join the dimensions of a mesh into one of this name; a public mesh can only be sliced."""
    return mesh._flatten(name)


def reduce_gradients(sharded: Iterable[FSDPModule]) -> None:
    """Run FSDP's gradient reduction on its own; publicly it is only a part of a backward pass of the whole module."""
    for state in map(fully_shard.state, sharded):  # type: ignore[attr-defined]  # a decorator adds it at run time
        for group in state._fsdp_param_groups:
            group.post_backward()
        if state._is_root:
            state._root_post_backward_final_callback()


def scale_in_place(tensors: list[Tensor], factor: float) -> None:
    """Multiply all tensors by `factor` in one kernel; public clipping takes parameters and computes its own norm."""
    torch._foreach_mul_(tensors, factor)


def default_store() -> dist.Store:
    """Return the store of the default process group, which works when collectives hang; no public function does."""
    return dist.distributed_c10d._get_default_store()


def fake_store() -> dist.Store:
    """Create the store of the backend "fake", whose collectives send nothing; torch documents the backend only."""
    return FakeStore()


def forget_shardings() -> None:
    """Clear torch's cache of shardings: it takes equal meshes for the same, whichever rank they were made on."""
    _clear_sharding_prop_cache()


# The pipeline runtime ------------------------------------------------------------------------------------------------


def pipeline_runtime(
    stages: Sequence[PipelineStage], micro_batches: int, programs: Sequence[Sequence[str]], rank_of: Mapping[int, int]
) -> Any:
    """Build torch's runtime of any list of actions; the public schedule classes compute their own lists.

    `programs` has the actions of each rank in torch's notation, `rank_of` the rank of each stage number.
    """
    runtime = _PipelineScheduleRuntime(list(stages), micro_batches, lambda loss, _: loss, scale_grads=False)
    runtime.pipeline_order_with_comms = {
        rank: [_Action.from_str(text) for text in program] for rank, program in enumerate(programs)
    }
    for stage in stages:
        stage.stage_index_to_group_rank = dict(rank_of)
    return runtime


def pop_backward_state(stage: PipelineStage, micro_batch: int) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Take the outputs and their gradients that an input half stored for its weight half; no public method does."""
    _, _, outputs, gradients = stage.backward_state.pop(micro_batch)
    return outputs, gradients
