"""What forward passes leave in memory for their backward passes, counted before any memory is taken.

Notable choices:
- no formula: the code that will train runs once on fake tensors, which have shapes but no content, while autograd's own
  hooks see everything that is kept;
- experts are taken to be evenly loaded, for who is chosen depends on content.

Not covered: weights gathered from other ranks, and what a pass needs only while it runs. The count is that of the CPU's
kernels; those of a GPU may keep less or more.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from minids.config import ModelConfig
from minids.data.batches import Batch
from minids.model.fp8_linear import convert_to_fp8
from minids.model.layers import rotary_frequencies
from minids.model.moe import Experts
from minids.model.transformer import MiniDS
from minids.parallel.pipeline import MicroBatch, Stage
from minids.parallel.timeline import Schedule, peak_activations
from minids.training.loop import Recipe
from minids.training.loss import Share, losses


class _WithoutContent(TorchDispatchMode):
    """Answers for fake tensors what torch cannot: counts have a shape, comparisons are false, any type is grouped."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.bincount.default:
            return args[0].new_empty(args[2])
        if operation is torch.ops.aten._local_scalar_dense.default:
            return 0
        if operation is torch.ops.aten._grouped_mm.default:
            return args[0].new_empty(len(args[0]), args[1].shape[-1])
        return operation(*args, **(kwargs or {}))


def activation_bytes(
    config: ModelConfig, recipe: Recipe, rows: int, schedule: Schedule | None = None, ep: int = 1
) -> int:
    """Bytes that the fullest rank keeps at the worst moment of a step of micro-batches of `rows` rows.

    Each rank has one `ep`-th of the experts of a layer, and in a pipeline its stages of `schedule`. Weights are not
    counted, but what bf16 or FP8 makes of them is: it is kept like an activation.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _WithoutContent():
            model = MiniDS(config)
            if recipe.precision == "fp8":
                convert_to_fp8(model)
            _share_experts(model, ep)
            text = torch.zeros(rows, recipe.seq_len + 1, dtype=torch.int64)
            batch = Batch(text, text, text)

            def loss(out, batch):
                return losses(model, out, batch, Share(1, 1)).total(recipe.mtp_weight)

            if schedule is None:
                return kept_bytes(model, recipe, lambda: loss(model(text[:, :-1], mtp=bool(recipe.mtp_weight)), batch))
            stages = [Stage(model, i, schedule.stages) for i in range(schedule.stages)]
            x = torch.zeros(rows, recipe.seq_len, config.hidden_size, requires_grad=True)
            loads = torch.zeros(len(model.routers()), config.n_routed_experts, dtype=torch.int64)
            micro = MicroBatch(text[:, :-1], batch, loss, 1.0, torch.zeros(()), loads)
            shapes = [tuple(weight.shape for weight in stage.parameters()) for stage in stages]
            alike = dict(zip(shapes, stages, strict=True))  # one of each kind is enough
            size = {kind: kept_bytes(model, recipe, lambda s=stage: s(x, batch=micro)) for kind, stage in alike.items()}
    finally:
        rotary_frequencies.cache_clear()  # it would hand its fakes to the next model
    return max(peak_activations(actions, lambda i: size[shapes[i]]) for actions in schedule.actions)


def _share_experts(model: MiniDS, ep: int) -> None:
    """Leave one `ep`-th of the experts of each layer; with even loads, as many rows as before are theirs."""
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        held = len(experts.gate_proj) // ep
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(weight.detach()[:held].clone()))
        experts.multiply = partial(_multiply, experts.multiply, held)


def _multiply(by_all: Callable[..., Tensor], held: int, rows: Tensor, weights: Tensor, load: Tensor) -> Tensor:
    return by_all(rows, weights, load[:held])


def kept_bytes(model: MiniDS, recipe: Recipe, forward: Callable[[], Tensor]) -> int:
    """Bytes of what `forward` returns and of what autograd keeps for it, each storage once; parameters do not count."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, lest another one get its address
        return tensor

    device = next(model.parameters()).device.type
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            keep(forward())
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
