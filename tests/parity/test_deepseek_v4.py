"""Parts of DeepSeek-V4 equal transformers' on random weights: hyper-connections in their place, and the router."""

import pytest
import torch
from torch import nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

from minids.config import ModelConfig
from minids.model.hyper_connections import CollapsingNorm, HyperBlock, HyperConnection
from minids.model.moe import Router
from minids.model.transformer import MiniDS

DIM, EXPERTS = 64, 16


def configs(streams=4, iterations=20):
    ours = ModelConfig.preset(
        "nano", hidden_size=DIM, hc_mult=streams, hc_sinkhorn_iters=iterations, n_routed_experts=EXPERTS, n_group=1,
        topk_group=1, num_experts_per_tok=6, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5, rms_norm_eps=1e-5,
    )  # fmt: skip
    released = DeepseekV4Config(
        vocab_size=97, hidden_size=DIM, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        head_dim=32, q_lora_rank=24, num_experts_per_tok=6, n_routed_experts=EXPERTS, layer_types=["sliding_attention"],
        mlp_layer_types=["moe"], sliding_window=8, o_groups=2, o_lora_rank=16, index_n_heads=4, index_head_dim=16,
        index_topk=3, hc_mult=streams, hc_sinkhorn_iters=iterations, routed_scaling_factor=1.5, rms_norm_eps=1e-5,
    )  # fmt: skip
    return ours, released


@torch.no_grad()
def randomized(theirs, ours, names, spread):
    """Random values in transformers' module, copied to ours; `spread` makes coefficients far from their middle."""
    for name, own in names.items():
        source = theirs.get_parameter(name)
        source.copy_(torch.randn_like(source) * (spread if source.ndim == 1 else source.shape[-1] ** -0.5))
        ours.get_parameter(own).copy_(source)


SITE = {"fn": "proj", "base": "bias", "scale": "scale"}


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("streams, iterations", [(4, 20), (2, 1), (3, 5)])
def test_coefficients_equal_those_of_transformers(streams, iterations, spread):
    config, released = configs(streams, iterations)
    ours, reference = HyperConnection(config), theirs.DeepseekV4HyperConnection(released)
    randomized(reference, ours, SITE, spread)
    x = 3 * torch.randn(2, 7, streams, DIM)
    post, comb, collapsed = reference(x)
    weights = ours.coefficients(x)
    torch.testing.assert_close(weights.write, post, atol=2e-6, rtol=0)
    torch.testing.assert_close(weights.mix, comb, atol=2e-6, rtol=0)
    torch.testing.assert_close((weights.read[..., None] * x).sum(2), collapsed, atol=2e-5, rtol=0)


def test_final_collapse_equals_that_of_transformers():
    config, released = configs()
    ours, reference, norm = CollapsingNorm(config), theirs.DeepseekV4HyperHead(released), nn.RMSNorm(DIM, eps=1e-5)
    randomized(reference, ours, {f"hc_{name}": f"collapse.{own}" for name, own in SITE.items()}, 1.0)
    with torch.no_grad():
        norm.weight.copy_(ours.weight.uniform_(0.5, 1.5))
    x = torch.randn(2, 7, 4, DIM)
    torch.testing.assert_close(ours(x), norm(reference(x)), atol=5e-6, rtol=0)


class Twice(nn.Module):
    """In place of an attention or a feed-forward: not linear, so that a norm in another place would show."""

    def forward(self, x, *_):
        return x * x.abs()


class Attention(Twice):
    def forward(self, x, *_, **__):
        return super().forward(x), None


class FeedForward(Twice):
    def forward(self, x, *_, **__):
        return super().forward(x)


def test_layer_on_streams_equals_that_of_transformers():
    """What is read, normalised, computed, mixed and written, in this order, around any attention and feed-forward."""
    config, released = configs()
    ours, reference = HyperBlock(config, dense=True), theirs.DeepseekV4DecoderLayer(released, 0)
    for mine, its in (("attention_connection", "attn_hc"), ("ffn_connection", "ffn_hc")):
        randomized(getattr(reference, its), getattr(ours, mine), SITE, 1.0)
    with torch.no_grad():
        reference.input_layernorm.weight.copy_(ours.attention_norm.weight.uniform_(0.5, 1.5))
        reference.post_attention_layernorm.weight.copy_(ours.ffn_norm.weight.uniform_(0.5, 1.5))
    ours.attention, ours.ffn = Twice(), Twice()
    reference.self_attn, reference.mlp = Attention(), FeedForward()
    x = torch.randn(2, 5, 4, DIM)
    context = MiniDS(config).attention_context(torch.zeros(2, 5, dtype=torch.int64))
    got, _ = ours(x, context)
    torch.testing.assert_close(got, reference(x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_router_equals_that_of_transformers(bias):
    config, released = configs()
    ours, reference = Router(config), theirs.DeepseekV4TopKRouter(released)
    with torch.no_grad():
        reference.weight.copy_(ours.weight.normal_(0, 4 * DIM**-0.5))
        reference.e_score_correction_bias.copy_(ours.bias.normal_(0, 1).mul_(bias))
    x = torch.randn(3, 11, DIM)
    _, weights, experts = reference(x)
    routing = ours(x)
    dense = torch.zeros(33, EXPERTS)
    got = dense.scatter(1, routing.experts.flatten(0, 1), routing.weights.flatten(0, 1))
    torch.testing.assert_close(got, dense.scatter(1, experts, weights), atol=1e-6, rtol=0)


def test_affinity_of_very_negative_logits_has_a_gradient():
    config, _ = configs()
    router, x = Router(config), torch.full((1, 1, DIM), 50.0)
    router.weight.data.fill_(-1.0)
    router(x).weights.sum().backward()
    assert router.weight.grad.isfinite().all()
