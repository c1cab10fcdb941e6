"""Count the activation memory of a training step, that is what forward passes keep for backward, before allocating it.

Notable choices:
- no formula: the training code runs once on fake tensors, which have shapes but no content, while autograd's own hooks
  see every tensor that is kept;
- the experts are assumed to be evenly loaded, because the routing depends on content.

Not covered: weights gathered from other ranks, and temporary memory of a pass. The count is that of the CPU's kernels;
a GPU's kernels may keep less or more.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minids.config import ModelConfig
from minids.data.batches import Batch
from minids.fp8.linear import convert_to_fp8
from minids.model.kv_cache import IndexerTraining
from minids.model.moe import AllExpertsHere, Experts
from minids.model.rope import rotary_frequencies
from minids.model.transformer import MiniDS
from minids.parallel._torch_private import (
    GROUPED_MM,
    LOCAL_SCALAR_DENSE,
    FakeTensorMode,
    TorchDispatchMode,
    storage_id,
)
from minids.parallel.pipeline import MicroBatch, Stage
from minids.parallel.schedule import Schedule, peak_activations
from minids.training.loss import LossDenominators, losses
from minids.training.pretrain import Recipe


class _WithoutContent(TorchDispatchMode):
    """Operations that fake tensors lack: counts of a known length, false comparisons, grouped matmuls of any dtype."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.bincount.default:
            return args[0].new_empty(args[2])
        if operation is LOCAL_SCALAR_DENSE:
            return 0
        if operation is GROUPED_MM:
            return args[0].new_empty(len(args[0]), args[1].shape[-1])
        return operation(*args, **(kwargs or {}))


def activation_bytes(
    config: ModelConfig, recipe: Recipe, rows: int, schedule: Schedule | None = None, ep: int = 1
) -> int:
    """Return the peak activation bytes of the fullest rank in a step with micro-batches of `rows` rows.

    Each rank holds 1 / `ep` of the experts of a layer, and in a pipeline its stages of `schedule`. Weights are not
    counted, but their bf16 or FP8 copies are, since autograd keeps them like activations.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _WithoutContent():
            model = MiniDS(config)
            if recipe.precision == "fp8":
                convert_to_fp8(model)
            _keep_experts(model, ep)
            text = torch.zeros(rows, recipe.seq_len + 1, dtype=torch.int64)
            batch = Batch(text, text, text)

            def loss(out, batch):
                return losses(model, out, batch, LossDenominators(1, 1)).total(recipe.mtp_weight)

            if schedule is None:
                mtp, indexer = bool(recipe.mtp_weight), IndexerTraining(recipe.index_stage)
                states = functools.partial(model.states, text[:, :-1], mtp=mtp, indexer=indexer)
                return kept_bytes(model, recipe, lambda: loss(states(), batch))
            stages = [Stage(model, i, schedule.stages) for i in range(schedule.stages)]
            x = torch.zeros(rows, recipe.seq_len, config.hidden_size, requires_grad=True)
            tokens_per_expert = torch.zeros(len(model.routers()), config.n_routed_experts, dtype=torch.int64)
            micro = MicroBatch(text[:, :-1], batch, loss, 1.0, torch.zeros(()), tokens_per_expert)
            shapes = [tuple(weight.shape for weight in stage.parameters()) for stage in stages]
            alike = dict(zip(shapes, stages, strict=True))  # stages of equal shapes keep equally much: measure one
            size = {
                kind: kept_bytes(model, recipe, functools.partial(stage, x, batch=micro))
                for kind, stage in alike.items()
            }
    finally:
        rotary_frequencies.cache_clear()  # its cached tensors are fake
    return max(peak_activations(actions, lambda i: size[shapes[i]]) for actions in schedule.actions)


def _keep_experts(model: MiniDS, ep: int) -> None:
    """Keep 1 / `ep` of the experts of each layer; with even loads, they receive as many rows as all did before."""
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        held = len(experts.gate_proj) // ep
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(weight.detach()[:held].clone()))
        experts.dispatcher = _EvenShare(held)


class _EvenShare(AllExpertsHere):
    """Dispatch of all rows to the experts that are kept."""

    def __init__(self, held: int):
        self.held_experts = held

    def __call__(
        self, compute: Callable[..., Tensor], rows: Tensor, weights: Tensor, tokens_per_expert: Tensor
    ) -> Tensor:
        return compute(rows, weights, tokens_per_expert[: self.held_experts])


def kept_bytes(model: MiniDS, recipe: Recipe, forward: Callable[[], Tensor]) -> int:
    """Return the bytes of `forward`'s output and of what autograd keeps for it: each storage once, no parameters."""
    weights = {storage_id(weight.untyped_storage()) for weight in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage_id(storage)] = storage  # a reference, so that no other storage gets its address
        return tensor

    device = next(model.parameters()).device.type
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            keep(forward())
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
