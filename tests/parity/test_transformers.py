"""The model equals transformers' DeepSeek-V3, through the folder that one writes and the other reads, both ways.

Weights are drawn so that logits are of size one and attention is uneven: a mistake anywhere shows in them.
"""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config
from transformers.modeling_layers import MtpModel

from minids.config import ModelConfig, YaRN
from minids.inference.generate import Sampling, generate
from minids.interop.hf import load_pretrained, save_pretrained
from minids.model.transformer import MiniDS

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, LENGTH = 64, 40
GROUPS_KEPT = {1: 1, 2: 1, 4: 2}
BIASES = {
    "no": lambda n: torch.zeros(n),
    "mixed": lambda n: torch.randn(n) / 4,
    "negative": lambda n: -1 - torch.rand(n),
}
# Sixteen positions are the original context: most of the forty lie beyond it.
YARN = {
    "plain": None,
    "yarn": YaRN(factor=8, original_max_position_embeddings=16),
    "yarn_lite": YaRN(factor=8, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707),
    "yarn_uneven": YaRN(factor=8, original_max_position_embeddings=16, mscale=0.5, mscale_all_dim=1.5),
    "yarn_no_square": YaRN(factor=8, original_max_position_embeddings=16, mscale_all_dim=0),
}


def make_config(q_lora_rank=32, groups=4, rope="yarn", **changes):
    changes = {"num_nextn_predict_layers": 0} | changes
    return ModelConfig.preset(
        "nano", vocab_size=VOCAB, max_position_embeddings=128, q_lora_rank=q_lora_rank, n_group=groups,
        topk_group=GROUPS_KEPT[groups], rope_scaling=YARN[rope], **changes,
    )  # fmt: skip


@torch.no_grad()
def randomize(model, bias="mixed"):
    """Matrices of standard deviation 1 / sqrt(width), norms between 0.5 and 1.5, and the wanted balancing biases."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("router.bias", "e_score_correction_bias")):
            tensor.copy_(BIASES[bias](len(tensor)))
        elif tensor.ndim == 1 and "inv_freq" not in name:
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim > 1:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model.eval()


def export(model, folder):
    """The same model in transformers, through the folder."""
    save_pretrained(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def assert_same_logits(ours, theirs, atol=1e-4):
    tokens = torch.randint(VOCAB, (2, LENGTH))
    logits, reference = ours(tokens).logits, theirs(tokens).logits
    assert reference.std() > 0.3
    torch.testing.assert_close(logits, reference, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Ours and theirs, with all switched on: compressed queries, four groups, negative biases, YaRN, two MTPs."""
    torch.manual_seed(1)
    ours = randomize(MiniDS(make_config(num_nextn_predict_layers=2)), "negative")
    return ours, export(ours, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("groups", GROUPS_KEPT)
@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_export(tmp_path, q_lora_rank, groups, bias):
    ours = randomize(MiniDS(make_config(q_lora_rank, groups)), bias)
    assert_same_logits(ours, export(ours, tmp_path))


@pytest.mark.parametrize("rope", YARN)
def test_export_long_context(tmp_path, rope):
    ours = randomize(MiniDS(make_config(rope=rope)))
    assert_same_logits(ours, export(ours, tmp_path))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shared", [0, 2])
def test_export_other_numbers_of_shared_experts(tmp_path, shared):
    ours = randomize(MiniDS(make_config(n_shared_experts=shared)))
    assert_same_logits(ours, export(ours, tmp_path))


def test_export_dense(tmp_path):
    ours = randomize(MiniDS(make_config(first_k_dense_replace=3)))
    assert_same_logits(ours, export(ours, tmp_path))


def test_transformers_misses_nothing_and_leaves_only_the_prediction_layers(tmp_path):
    model = MiniDS(make_config(num_nextn_predict_layers=1))
    save_pretrained(model, tmp_path, max_shard_bytes=100_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert info["unexpected_keys"] and all(key.startswith("model.layers.3.") for key in info["unexpected_keys"])
    assert theirs.dtype == torch.float32 and theirs.num_parameters() == sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("mtp") and not name.endswith("bias")
    )


# The way back.


def shape_of(config):
    """The arguments of a transformers config of the same shape, without what only V3 has."""
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim first_k_dense_replace
        moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group
        max_position_embeddings"""
    return {name: getattr(config, name) for name in names.split()}


ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 500.0},
    "yarn": dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0),
    "yarn_without_mscale": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("bias", ["mixed", "negative"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("q_lora_rank", "groups"), [(32, 4), (None, 2)])
def test_import(tmp_path, q_lora_rank, groups, rope, bias):
    config = DeepseekV3Config(**shape_of(make_config(q_lora_rank, groups)), rope_parameters=dict(ROPES[rope]))
    theirs = randomize(AutoModelForCausalLM.from_config(config), bias)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_import_v2(tmp_path, q_lora_rank, method):
    shape = shape_of(make_config(q_lora_rank)) | ({"n_group": None, "topk_group": None} if method == "greedy" else {})
    config = DeepseekV2Config(**shape, topk_method=method, routed_scaling_factor=3.0, rope_parameters=ROPES["yarn"])
    theirs = randomize(AutoModelForCausalLM.from_config(config))
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert ours.config.scoring_func == "softmax" and all(router.bias is None for router in ours.routers())
    assert_same_logits(ours, theirs)


def test_there_and_back_is_exact(tmp_path, pair):
    ours, _ = pair
    export(ours, tmp_path / "out").save_pretrained(tmp_path / "back")
    back = load_pretrained(tmp_path / "back")
    assert back.config == ours.config.replace(num_nextn_predict_layers=0)  # transformers drops the prediction layers
    expected = {name: value for name, value in ours.state_dict().items() if not name.startswith("mtp")}
    torch.testing.assert_close(back.state_dict(), expected, atol=0, rtol=0)


# Piece by piece, and step by step.


@torch.no_grad()
def test_decoding(pair):
    """A prefill, chunks and single tokens from our cache: each position as in transformers' one pass over all."""
    ours, theirs = pair
    tokens = torch.randint(VOCAB, (2, LENGTH))
    cache = ours.new_cache(2, LENGTH)
    parts = tokens.split([9, 5, 3, 1, 1, 1, 12, *[1] * 8], 1)
    logits = torch.cat([ours(part, cache=cache).logits for part in parts], 1)
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_generation(pair):
    ours, theirs = pair
    prompts = torch.randint(VOCAB, (3, 12))
    reference = theirs.generate(prompts, max_new_tokens=25, do_sample=False)[:, 12:]
    assert generate(ours, prompts.tolist(), max_new_tokens=25, sampling=Sampling(0)) == reference.tolist()


@pytest.mark.parametrize("rope", YARN)
@pytest.mark.parametrize("q_lora_rank", [32, None])
@torch.no_grad()
def test_attention(tmp_path, q_lora_rank, rope):
    ours = randomize(MiniDS(make_config(q_lora_rank, rope=rope)))
    theirs = export(ours, tmp_path)
    x = torch.randn(2, LENGTH, 64)
    context = ours.attention_context(torch.zeros(2, LENGTH, dtype=torch.int64))
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    for mine, other in zip(ours.layers, theirs.model.layers, strict=True):
        reference, _ = other.self_attn(x, theirs.model.rotary_emb(x, context.positions), mask)
        assert reference.std() > 0.2
        torch.testing.assert_close(mine.attention(x, context), reference, atol=4e-6, rtol=0)


@pytest.mark.parametrize("bias", BIASES)
@torch.no_grad()
def test_router_and_mixture(tmp_path, bias):
    ours = randomize(MiniDS(make_config()), bias)
    theirs = export(ours, tmp_path)
    x = torch.randn(4, 50, 64)
    for mine, other in zip(ours.layers[1:], theirs.model.layers[1:], strict=True):
        routing = mine.ffn.router(x)
        _, weights, experts = other.mlp.gate(x)
        reference = torch.zeros(200, 8).scatter_(1, experts, weights)
        scattered = torch.zeros(4, 50, 8).scatter_(2, routing.experts, routing.weights)
        torch.testing.assert_close(scattered.flatten(0, 1), reference, atol=1e-6, rtol=0)
        torch.testing.assert_close(mine.ffn(x)[0], other.mlp(x), atol=4e-5, rtol=0)


@torch.no_grad()
def test_prediction_modules(pair, monkeypatch):
    """Both modules through transformers' own reader of a release's MTP layers, which feeds eh_proj [enorm; hnorm].

    It chains the normalised stream where we chain the one before the norm (PITFALLS 19), so the chain is made here.
    """
    ours, theirs = pair
    monkeypatch.setattr(theirs, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\."])
    reader = MtpModel.from_pretrained(theirs).eval()
    tokens = torch.randint(VOCAB, (2, LENGTH))
    out = ours(tokens, mtp=True)
    hidden = out.hidden
    for k, (layer, logits) in enumerate(zip(reader.layers, out.mtp_logits, strict=True), start=1):
        layer.use_post_norm = False
        embedded, positions = theirs.model.embed_tokens(tokens[:, k:]), torch.arange(LENGTH - k)[None]
        mask = torch.full((LENGTH - k, LENGTH - k), -torch.inf).triu(1)[None, None]
        hidden = layer(embedded, hidden[:, :-1], reader.rotary_emb(embedded, positions), mask, positions, None)
        reference = theirs.lm_head(layer.post_norm(hidden))
        assert reference.std() > 0.3
        torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
