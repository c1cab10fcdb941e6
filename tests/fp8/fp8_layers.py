"""FP8 layers that the tests share: a linear layer, routed experts, and how closely they must agree with a reference."""

import copy

import torch
from fp8_reference import matrix
from plain_model import NANO
from torch import nn

from minids.fp8.linear import AFTER_ATTENTION, Casting, Fp8Linear, Fp8SwiGLU
from minids.model.moe import Experts, Routing

FORMS = {
    "plain": Casting(),
    "after attention": AFTER_ATTENTION,
    "gradient sent": Casting(gradient_sent_in_fp8=True),
}


def fp8_linear(inner, out, casting=Casting()):  # noqa: B008 - frozen
    return Fp8Linear(nn.Linear(inner, out, bias=False), casting)


def close(got, want, tolerance=3e-6):
    """Within float32's accumulation error, as a share of the largest value."""
    want = torch.as_tensor(want)
    assert (got.detach().double() - want).abs().max() <= tolerance * want.abs().max()


def expert_layer(tokens=70, experts=5, dim=144, inner_dim=136):
    config = NANO.replace(
        hidden_size=dim, moe_intermediate_size=inner_dim, n_routed_experts=experts, n_group=1, topk_group=1
    )
    plain = Experts(config)
    for weight in plain.parameters():
        weight.data.normal_(0, weight.shape[1] ** -0.5)
    scores = torch.rand(1, tokens, experts)
    scores[..., 3] = -1  # an expert that nobody reads
    chosen = scores.topk(2).indices
    weights = torch.rand(1, tokens, 2).requires_grad_()
    x = (matrix(tokens, dim, seed=1) * 3)[None].requires_grad_()
    layer = copy.deepcopy(plain)
    layer.arithmetic = Fp8SwiGLU()
    return plain, layer, x, Routing(chosen, weights, scores)
