"""The mixture of experts: planted mistakes in capacity, shared expert and dense layers, caught (PITFALLS 16)."""

import itertools

import plain_model as plain
import torch
import torch.nn.functional as F
from pitfalls import after_init, assert_caught, close, each_mistake
from plain_model import NANO, build, random_stream, random_tokens
from torch import nn

from minids.model import layers, transformer
from minids.model.moe import Experts, MoE

# 16. No dropping, a plain shared expert, dense first layers, no biases ---------------------------------------------


def check_16_no_token_is_dropped():
    module = build().layers[1].ffn
    x = random_stream(1, 1, 64).expand(2, 8, 64)  # sixteen times the same token: all want the same two experts
    out, routing = module(x)
    assert routing.tokens_per_expert.sum() == 32 and routing.tokens_per_expert.max() == 16
    close(out, out[:1, :1].expand_as(out))
    x = random_stream(2, 8, 64)
    out, routing = module(x)
    want, load = plain.mixture(dict(module.named_parameters()), NANO, x.flatten(0, 1))
    assert routing.tokens_per_expert.tolist() == load
    close(out.flatten(0, 1), want)


def plant_capacity(mp, factor):
    """Each expert reads its first `factor` * mean tokens; the rest get nothing from it."""
    by_expert = Experts.by_expert

    def dropping(self, x, experts, weights, load):
        chosen = F.one_hot(experts, len(load)).sum(1)
        place = (chosen.cumsum(0) - 1).gather(1, experts)
        kept = place < factor * experts.numel() / len(load)
        return by_expert(self, x, experts, weights * kept, load)

    mp.setattr(Experts, "by_expert", dropping)


def plant_capacity_factor_of_1(mp):
    plant_capacity(mp, 1.0)


def plant_capacity_factor_of_1_25(mp):
    plant_capacity(mp, 1.25)


def check_16_shared_expert_is_added_unweighted():
    for shared in (1, 2):
        module = build(NANO.replace(n_shared_experts=shared)).layers[1].ffn
        module.experts.down_proj.data.zero_()
        w = plain.part(dict(module.named_parameters()), "shared.")
        assert w["down_proj.weight"].shape == (64, shared * NANO.moe_intermediate_size)
        x = random_stream(1, 4, 64)
        close(module(x)[0][0], torch.stack([plain.swiglu(w, v) for v in x[0]]))


def plant_shared(mp, weigh):
    def forward(self, x, experts=None):
        routing = self.router(x)
        return self.experts(x, routing) + weigh(self, routing, self.shared(x)), routing

    mp.setattr(MoE, "forward", forward)


def plant_shared_scaled_by_2_5(mp):
    plant_shared(mp, lambda self, routing, out: 2.5 * out)


def plant_shared_averaged_with_the_chosen(mp):
    plant_shared(mp, lambda self, routing, out: out / (1 + routing.experts.shape[-1]))


def plant_shared_weighted_by_a_gate(mp):
    plant_shared(mp, lambda self, routing, out: out * routing.scores.amax(-1, keepdim=True))


def plant_shared_left_out(mp):
    plant_shared(mp, lambda self, routing, out: 0 * out)


def check_16_first_layers_are_dense_and_nothing_has_a_bias():
    model = build(NANO.replace(num_hidden_layers=4, first_k_dense_replace=3))
    assert [isinstance(layer.ffn, MoE) for layer in model.layers] == [False, False, False, True]
    assert model(random_tokens(1, 3)).tokens_per_expert.shape == (1, 8)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {"layers.3.ffn.router.bias", "mtp.0.block.ffn.router.bias"}
    nothing = torch.zeros(1, 3, 64, dtype=torch.float64)
    for layer in model.layers:
        out = layer.ffn(nothing)
        assert not (out[0] if isinstance(out, tuple) else out).any()


def plant_every_layer_a_mixture(mp):
    block = transformer.Block
    mp.setattr(transformer, "Block", lambda config, dense: block(config, dense=False))


def plant_only_the_first_layer_dense(mp):
    block, made = transformer.Block, itertools.count()
    mp.setattr(transformer, "Block", lambda config, dense: block(config, dense=dense and next(made) % 3 == 0))


def plant_feed_forward_with_biases(mp):
    def add(self):
        self.down_proj.bias = nn.Parameter(torch.ones(self.down_proj.out_features))

    after_init(mp, layers.SwiGLU, add)


# The table ---------------------------------------------------------------------------------------------------------

PITFALLS = [
    (16, check_16_no_token_is_dropped, {
        "capacity factor 1": plant_capacity_factor_of_1,
        "capacity factor 1.25": plant_capacity_factor_of_1_25,
    }),
    (16, check_16_shared_expert_is_added_unweighted, {
        "shared times 2.5": plant_shared_scaled_by_2_5,
        "shared averaged": plant_shared_averaged_with_the_chosen,
        "shared gated": plant_shared_weighted_by_a_gate,
        "shared left out": plant_shared_left_out,
    }),
    (16, check_16_first_layers_are_dense_and_nothing_has_a_bias, {
        "no dense layer": plant_every_layer_a_mixture,
        "one dense layer of three": plant_only_the_first_layer_dense,
        "feed-forward with biases": plant_feed_forward_with_biases,
    }),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
