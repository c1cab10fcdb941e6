"""A small model, a copy with its experts sharded over ranks, and the rounding error allowed between them."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from minids.config import ModelConfig
from minids.model.transformer import MiniDS
from minids.parallel.expert_parallel import shard_experts


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16)
    model = MiniDS(ModelConfig.preset("nano", **small | changes)).to(dtype)
    for router in model.routers():
        router.bias.data.normal_(0, 0.1)
    return model


def sharded(model, ranks, *options):
    """A copy of `model` on this rank, without gradients."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    shard_experts(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",)), *options)
    return model


def whole_gradients(model):
    """Experts have theirs from all ranks; of everything else the parts are added."""
    gradients = {}
    for name, p in model.named_parameters():
        if isinstance(p.grad, DTensor):
            gradients[name] = p.grad.full_tensor()
        elif p.grad is not None:
            dist.all_reduce(p.grad)
            gradients[name] = p.grad
    return gradients


# Ranks add up the same products in another order. Each of the some hundred roundings of a sum is at most half a unit in
# the last place of the largest value; allowed are 64 in one direction. A mistake moves values by their own size.
ROUNDING = {torch.float32: 64 * 2**-24, torch.float64: 64 * 2**-53}


def close(got, want, name=""):
    tolerance = ROUNDING[want.dtype] * want.abs().max().item() if want.numel() else 0
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}")
