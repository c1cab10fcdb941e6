"""Routers that tests of the gate and of the balance share: V3's of the nano model, and V2's."""

import torch
from plain_model import NANO, build

from minids.model.moe import Router

V2 = NANO.replace(
    scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0
)


def router_of(config, dtype=torch.float64, bias_size=0.3):
    router = Router(config)
    router.weight.data.normal_(0, config.hidden_size**-0.5)
    if router.bias is not None:
        router.bias.data.normal_(0, bias_size)
    return router.to(dtype)


def router_with(config=NANO, bias=None):
    router = build(config).layers[1].ffn.router
    if bias is not None:
        router.bias.data.copy_(torch.as_tensor(bias))
    return router
