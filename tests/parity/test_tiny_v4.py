"""V4's attention, and a whole tiny V4, equal transformers' `deepseek_v4` on random weights, in prefill and decoding.

k = 3 of up to 15 entries, since a mistake in the indexer shows only where entries are left out; 16 index heads, since
with few of them scores of 0 tie, and two correct implementations choose differently.

Tolerances. Both compute in float32, whose step is 2^-22 = 2.4e-7 for values between 2 and 4, the largest ones compared.
An entry or a score is a few sums of up to 64 products, off by two steps at most; allowed are 2e-6. A layer's output has
passed a softmax and two matrices more, and is off by 8e-7; allowed are 5e-6. Through four layers, their experts and
hyper-connections the logits are off by up to 1e-5 in 14 draws of the weights; allowed are 5e-5. The frequencies of
transformers are float32 too, so at position 60 an angle is off by 60 * 2^-25 = 2e-6: inside these bounds. A query that
chooses another entry is off by 0.01 and more.
"""

import pytest
import torch
import transformers
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.masking_utils import create_sliding_window_causal_mask

from minids.config import ModelConfig, YaRN
from minids.model.compressor import complete_blocks
from minids.model.rope import rotations
from minids.model.sparse_attention import choose
from minids.model.transformer import MiniDS

transformers.logging.set_verbosity_error()

VOCAB, LENGTH, DIM, HEAD, EXPERTS, K = 97, 61, 64, 32, 8, 3
KINDS = {"window": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
LAYERS = ("window", "csa", "hca", "csa")
CONFIG = ModelConfig.preset(
    "nano", vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=len(LAYERS), num_nextn_predict_layers=0,
    max_position_embeddings=512, attention="csa", layer_types=LAYERS, num_attention_heads=4, q_lora_rank=24,
    qk_rope_head_dim=8, v_head_dim=HEAD, sliding_window=8, csa_block=4, hca_block=8, index_topk=K, index_n_heads=16,
    index_head_dim=16, o_groups=2, o_lora_rank=16, first_k_dense_replace=0, num_hash_layers=1,
    moe_intermediate_size=32, n_routed_experts=EXPERTS, num_experts_per_tok=2, n_group=1, topk_group=1,
    scoring_func="sqrtsoftplus", routed_scaling_factor=1.5, hc_mult=4,
)  # fmt: skip
YARN = YaRN(factor=4, original_max_position_embeddings=16)
ROPES = {
    "plain": (None, {}),
    "yarn": (YARN, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32, beta_slow=1)),
}
NO_CLAMP = 1e30
"""transformers' limit of the inner activations of experts (10 in V4), which minids does not have."""


def released(rope):
    config = DeepseekV4Config(
        vocab_size=VOCAB, hidden_size=DIM, moe_intermediate_size=32, num_hidden_layers=len(LAYERS),
        num_attention_heads=4, head_dim=HEAD, q_lora_rank=24, num_experts_per_tok=2, n_routed_experts=EXPERTS,
        layer_types=[KINDS[kind] for kind in LAYERS], mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        compress_rates={KINDS["csa"]: CONFIG.csa_block, KINDS["hca"]: CONFIG.hca_block}, sliding_window=8, o_groups=2,
        o_lora_rank=16, index_n_heads=16, index_head_dim=16, index_topk=K, hc_mult=4,
        max_position_embeddings=512, partial_rotary_factor=8 / HEAD, swiglu_limit=NO_CLAMP, rope_parameters=dict(rope),
    )  # fmt: skip
    config._attn_implementation = config._experts_implementation = "eager"
    return config


@torch.no_grad()
def randomize(model):
    """Uneven attention, norms that are not 1, and sinks, biases of places and of experts that are not 0."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and "norm" in name:
            weight.uniform_(0.5, 1.5)
        elif weight.ndim == 1 or name.endswith("position_bias"):
            weight.normal_(0, 1)
        elif "experts" in name or weight.ndim == 2:
            weight.normal_(0, weight.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.25)
        elif name.endswith("tid2eid"):
            buffer.copy_(torch.rand(VOCAB, EXPERTS).argsort(1)[:, :2])
    return model.eval()


ATTENTION = {
    "q_a_proj": "q_down_proj", "q_a_norm": "q_norm", "q_b_proj": "q_up_proj", "kv_proj": "kv_proj",
    "kv_norm": "kv_norm", "o_b_proj": "o_proj", "sinks": "sink.logit",
}  # fmt: skip
COMPRESSOR = {"kv_proj": "content_proj", "gate_proj": "logit_proj", "position_bias": "place_bias", "kv_norm": "norm"}
INDEXER = {"q_b_proj": "q_proj", "scorer.weights_proj.weight": "head_weights"}
SITE = {"fn": "proj", "base": "bias", "scale": "scale"}


def with_prefix(names, theirs, ours):
    return {theirs + name: ours + own for name, own in names.items()}


NAMES = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
NAMES |= with_prefix(ATTENTION, "self_attn.", "attention.")
NAMES |= with_prefix(COMPRESSOR, "self_attn.compressor.", "attention.compressor.")
NAMES |= with_prefix(COMPRESSOR, "self_attn.compressor.indexer.", "attention.indexer.compressor.")
NAMES |= with_prefix(INDEXER, "self_attn.compressor.indexer.", "attention.indexer.")
NAMES |= with_prefix(SITE, "attn_hc.", "attention_connection.") | with_prefix(SITE, "ffn_hc.", "ffn_connection.")
NAMES |= with_prefix(
    {name: name for name in ("gate_proj", "up_proj", "down_proj")}, "mlp.shared_experts.", "ffn.shared."
)
NAMES |= {"mlp.gate.weight": "ffn.router.weight", "mlp.gate.e_score_correction_bias": "ffn.router.bias"}
OUTSIDE = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
OUTSIDE |= with_prefix({f"hc_{name}": own for name, own in SITE.items()}, "model.hc_head.", "norm.collapse.")


def own_tensors(name, tensor):
    """Names and values in minids of one tensor of transformers."""
    layer, inner = "", name
    if name.startswith("model.layers."):
        number, inner = name.removeprefix("model.layers.").split(".", 1)
        layer = f"layers.{number}."
    names = NAMES if layer else OUTSIDE
    if inner == "self_attn.o_a_proj.weight":
        return {f"{layer}attention.group_proj.weight": tensor.unflatten(0, (CONFIG.o_groups, -1)).mT}
    if inner == "mlp.experts.gate_up_proj":
        gate, up = tensor.chunk(2, 1)
        return {f"{layer}ffn.experts.gate_proj": gate.mT, f"{layer}ffn.experts.up_proj": up.mT}
    if inner == "mlp.experts.down_proj":
        return {f"{layer}ffn.experts.down_proj": tensor.mT}
    if inner in names:
        return {layer + names[inner]: tensor}
    return {f"{layer}{names[inner.removesuffix('.weight')]}.weight": tensor}


def pair_of(rope="plain"):
    """Both models with the same weights; every tensor of transformers has a place, every parameter of ours a value."""
    yarn, parameters = ROPES[rope]
    theirs, ours = (
        randomize(DeepseekV4ForCausalLM(released(parameters))),
        MiniDS(CONFIG.replace(rope_scaling=yarn)).eval(),
    )
    state = ours.state_dict()
    missing = set(state) - {"layers.0.ffn.router.bias"}  # unused where experts are looked up
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith("tid2eid"):
                copies = {"hash_routing.tables": tensor[None].float()}
            else:
                copies = own_tensors(name, tensor)
            for own, value in copies.items():
                state[own].copy_(value)
                missing.remove(own)
    assert not missing
    return ours, theirs


@pytest.fixture(scope="module", params=ROPES)
def pair(request):
    torch.manual_seed(1)
    return pair_of(request.param)


def tokens():
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def attentions(pair, kind):
    layer = LAYERS.index(kind)
    return pair[0].layers[layer].attention, pair[1].model.layers[layer].self_attn, layer


def near(got, want, tolerance):
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("length", [61, 60, 5, 3])
@pytest.mark.parametrize("kind", ["csa", "hca"])
@torch.no_grad()
def test_entries(pair, kind, length):
    mine, other, layer = attentions(pair, kind)
    x, latent = torch.randn(2, length, DIM), torch.randn(2, length, 24)
    context = pair[0].attention_context(tokens()[:, :length])
    want, _ = other.compressor(x, latent, context.positions, None, layer)
    got = mine.compressor(x, context)
    assert got.shape == (2, length // mine.compressor.block, HEAD)
    torch.testing.assert_close(got, want[:, 0], atol=2e-6, rtol=0)


@torch.no_grad()
def test_index_scores_and_choice(pair, monkeypatch):
    """transformers' scores, as they are when it takes the best of them; and the sets that it takes."""
    mine, other, layer = attentions(pair, "csa")
    x, seen = torch.randn(2, LENGTH, DIM), []
    context = pair[0].attention_context(tokens())
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, *a, **k: seen.append(self) or topk(self, *a, **k))
    latent = other.q_a_norm(other.q_a_proj(x))
    best = other.compressor.indexer(x, latent, context.positions, None, layer)
    monkeypatch.undo()

    indexer, blocks = mine.indexer, LENGTH // CONFIG.csa_block
    rotation = rotations(mine.rope, context.positions, mine.rope_dim, x.dtype)
    scores = indexer.scores(x, latent, indexer.compressor(x, context), rotation)
    complete = complete_blocks(context.positions, CONFIG.csa_block, blocks)
    assert scores.std() > 0.1 and (scores == 0).float().mean() < 0.01
    torch.testing.assert_close(scores.masked_fill(~complete, -torch.inf), seen[0], atol=2e-6, rtol=0)
    reference = torch.zeros(2, LENGTH, blocks + 1, dtype=torch.bool)
    reference.scatter_(-1, torch.where(best < 0, blocks, best), True)
    chosen = choose(scores, complete, K)
    assert torch.equal(chosen, reference[..., :blocks])
    assert not torch.equal(chosen, complete & ~complete.roll(-K, 1))  # other entries than the last k


def outputs_of_transformers(pair, layer, x, sizes):
    """One layer's attention in transformers, on parts of x that continue a cache, or on all of it without one."""
    model, attention = pair[1].model, pair[1].model.layers[layer].self_attn
    cache = transformers.DynamicCache(config=model.config) if len(sizes) > 1 else None
    if cache is not None:
        cache.layers[0] = cache.layers[layer]  # the mask is made for the number of tokens in the first layer's cache
    outs, start = [], 0
    for part in x.split(sizes, 1):
        positions = torch.arange(start, start + part.shape[1]).expand(len(x), -1)
        rope = {kind: model.rotary_emb(part, position_ids=positions, layer_type=kind) for kind in ("main", "compress")}
        mask = create_sliding_window_causal_mask(
            config=model.config, inputs_embeds=part, attention_mask=None, past_key_values=cache, position_ids=positions
        )
        outs.append(attention(part, rope, positions, mask, cache)[0])
        start += part.shape[1]
    return torch.cat(outs, 1)


def outputs_of_ours(pair, layer, x, sizes):
    """The same in minids; always with a cache where there are several parts."""
    model, cache, outs = pair[0], pair[0].new_cache(len(x), x.shape[1]) if len(sizes) > 1 else None, []
    for part in x.split(sizes, 1):
        context = model.attention_context(torch.zeros(part.shape[:2], dtype=torch.int64), cache)
        outs.append(model.layers[layer].attention(part, context, cache and cache.layers[layer]))
        if cache is not None:
            cache.advance(part.shape[1])
    return torch.cat(outs, 1)


SIZES = {"whole": [61], "decoding": [30, *[1] * 31], "from nothing": [1] * 61, "chunks": [7, 13, 3, 38]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_output(pair, kind, sizes):
    """Both in the same parts; transformers' full pass is the reference of all."""
    x, layer = torch.randn(2, LENGTH, DIM), LAYERS.index(kind)
    want = outputs_of_transformers(pair, layer, x, [LENGTH])
    near(outputs_of_ours(pair, layer, x, sizes), want, 5e-6)
    torch.testing.assert_close(outputs_of_transformers(pair, layer, x, sizes), want, atol=5e-6, rtol=0)


@torch.no_grad()
def test_logits_of_a_whole_tiny_v4(pair):
    """With hyper-connections, hash-routed and other mixtures of experts, and the final collapse."""
    ours, theirs = pair
    want, cache = theirs(tokens()).logits, ours.new_cache(2, LENGTH)
    near(ours(tokens()).logits, want, 5e-5)
    near(torch.cat([ours(part, cache=cache).logits for part in tokens().split(SIZES["chunks"], 1)], 1), want, 5e-5)


@torch.no_grad()
def test_cached_decoding_of_a_whole_tiny_v4(pair):
    """Both decode from their own cache, a prefill and then token by token, as one full pass of transformers."""
    ours, theirs = pair
    want, cache = theirs(tokens()).logits, ours.new_cache(2, LENGTH)
    first, *rest = tokens().split(SIZES["decoding"], 1)
    out = theirs(first, use_cache=True)
    got, reference = [ours(first, cache=cache).logits], [out.logits]
    for token in rest:
        got.append(ours(token, cache=cache).logits)
        out = theirs(token, past_key_values=out.past_key_values, use_cache=True)
        reference.append(out.logits)
    near(torch.cat(reference, 1), want, 5e-5)
    near(torch.cat(got, 1), want, 5e-5)
