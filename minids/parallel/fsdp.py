"""Shard parameters with FSDP2: which parameters a rank keeps, and over which axes of ranks they are sharded.

Notable choice: without a pipeline a layer's weights are gathered when they are needed (ZeRO stage 3), those outside of
the layers once per step, because the loss applies the head a chunk at a time and again in the backward pass; in a
pipeline weights and gradients stay whole during a step (stage 1, as in V3), since a backward split into I and W uses
them twice.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from minids.model.block import Block
from minids.model.moe import Experts
from minids.model.transformer import MiniDS
from minids.parallel._torch_private import flatten_mesh
from minids.parallel.expert_parallel import shard_experts
from minids.parallel.layout import Layout
from minids.parallel.pipeline import Stage


class Axes(NamedTuple):
    """This rank's process groups, one per axis; `data` joins dp and ep."""

    pp: DeviceMesh
    dp: DeviceMesh
    ep: DeviceMesh
    data: DeviceMesh


def axes_of(layout: Layout, device: str) -> Axes:
    """Create the mesh of ranks [pp, dp, ep] and return this rank's axes."""
    mesh = init_device_mesh(device, (layout.pp, layout.dp, layout.ep), mesh_dim_names=("pp", "dp", "ep"))
    return Axes(mesh["pp"], mesh["dp"], mesh["ep"], flatten_mesh(mesh["dp", "ep"], "data"))


def shard(parts: list[MiniDS], axes: Axes) -> None:
    """Shard every parameter of `parts` in place; every rank calls it.

    Gradients are summed over the data ranks, whose losses add up to that of the global batch. A router's bias stays
    whole on every rank. Parts on the meta device stay there: their shards have shapes but no content.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # the view that experts return is never modified
    for part in parts:
        if axes.ep.size() > 1:
            shard_experts(part, axes.ep)
        for router in part.routers():
            if router.bias is not None and not router.bias.is_meta:
                router.bias.data = router.bias.data.to(axes.data.device_type)
    whole = len(parts) == 1 and not isinstance(parts[0], Stage)
    for module in dict.fromkeys(module for part in parts for module in _units(part, whole)):
        biases = {p for p in module.parameters() if not p.requires_grad}
        axis = axes.dp if isinstance(module, Experts) else axes.data
        free = whole and module is not parts[0]  # the root holds the head, which the loss applies after forward
        sharded = fully_shard(module, mesh=axis, reshard_after_forward=free, ignored_params=biases)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    if whole:
        register_fsdp_forward_method(parts[0], "states")


def _units(part: MiniDS, whole: bool) -> Iterator[torch.nn.Module]:
    """Yield the modules that FSDP gathers as a unit, inner ones first: experts, blocks, and the rest with the root.

    A stage is not a unit, because another stage of this rank may contain the same embedding: each of its other modules
    is a unit of its own.
    """
    yield from (module for module in part.modules() if isinstance(module, Experts))
    blocks = [module for module in part.modules() if isinstance(module, Block)]
    yield from blocks
    if whole:
        yield part
    else:
        inside = {module for block in blocks for module in block.modules()}
        yield from (m for m in part.modules() if m not in inside and list(m.parameters(recurse=False)))


def reshard(parts: list[MiniDS]) -> None:
    """Free the weights that were gathered from other ranks."""
    for module in (module for part in parts for module in part.modules() if isinstance(module, FSDPModule)):
        module.reshard()
