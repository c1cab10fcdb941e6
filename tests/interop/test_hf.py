"""Folders of safetensors: released configs and names, exact round trips, shards and number formats."""

import json
import re

import pytest
import torch
from hf_folders import RELEASED_V3, assert_same, make_model
from safetensors.torch import load_file

from minids.config import ModelConfig, YaRN
from minids.interop.hf import load_pretrained, save_pretrained
from minids.model.transformer import MiniDS

# Configs.


def test_released_v3_config():
    config = ModelConfig.from_hf(RELEASED_V3)
    assert config.replace(initializer_range=0.006, aux_loss_alpha=0.0001) == ModelConfig.preset("v3")
    with torch.device("meta"):
        assert MiniDS(config).num_parameters() == 671_026_419_200
    again = config.to_hf()
    assert ModelConfig.from_hf(again) == config
    for name in RELEASED_V3.keys() & again.keys() - {"rope_scaling"}:
        assert again[name] == RELEASED_V3[name], name
    assert again["rope_parameters"].items() >= RELEASED_V3["rope_scaling"].items() - {("type", "yarn")}


def test_released_v2_lite_config():
    changes = dict(model_type="deepseek_v2", q_lora_rank=None, topk_method="greedy", n_group=None, topk_group=None)
    fields = {name: value for name, value in RELEASED_V3.items() if name not in ("scoring_func", "norm_topk_prob")}
    config = ModelConfig.from_hf(fields | changes | {"num_key_value_heads": None, "n_shared_experts": None})
    assert (config.q_lora_rank, config.n_group, config.topk_group, config.n_shared_experts) == (None, 1, 1, 0)
    assert config.scoring_func == "softmax" and not config.norm_topk_prob


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "llama", "model_type='llama': only deepseek_v3, deepseek_v32 and deepseek_v2"),
        ("model_type", None, "model_type=None"),
        ("tie_word_embeddings", True, "tie_word_embeddings=True"),
        ("attention_bias", True, "attention_bias=True"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("moe_layer_freq", 2, "moe_layer_freq=2"),
        ("rope_interleave", False, "rope_interleave=False"),
        ("kv_lora_rank", None, "config.json lacks 'kv_lora_rank'"),
        ("hidden_size", "7168", "hidden_size='7168': must be a whole number"),
        ("q_lora_rank", "1536", "q_lora_rank='1536': must be a whole number, at least 1"),
        ("rope_scaling", "yarn", "rope_scaling='yarn': must be an object"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope_type='linear': only default and yarn"),
        ("rope_scaling", {"type": "yarn", "factor": 2}, "must name original_max_position_embeddings"),
        ("rope_scaling", RELEASED_V3["rope_scaling"] | {"factor": "40"}, "factor='40': must be a finite number"),
        ("rope_scaling", RELEASED_V3["rope_scaling"] | {"low_freq_factor": 1.0}, "unknown rope_scaling field"),
    ],
)
def test_configs_that_mean_another_model_are_refused(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_hf(RELEASED_V3 | {field: value})


# Out and in again.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "num_nextn_predict_layers": 2, "n_shared_experts": 2},
        {"first_k_dense_replace": 3, "n_shared_experts": 0, "num_nextn_predict_layers": 0},
        {"rope_scaling": YaRN(factor=4), "expert_balance_alpha": 0.1, "initializer_range": 0.5, "rms_norm_eps": 1e-5},
    ],
)
@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 50_000])
def test_round_trip_is_exact(tmp_path, changes, max_shard_bytes):
    model = make_model(**changes)
    save_pretrained(model, tmp_path, max_shard_bytes=max_shard_bytes)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same(loaded, model)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_released_names_and_layouts(tmp_path):
    model = make_model(num_nextn_predict_layers=2)
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    experts = [f"mlp.experts.{e}.{part}_proj" for e in range(8) for part in ("gate", "up", "down")]
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    every = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{name}" for name in attention)]
    dense = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    mixture = ["mlp.gate", *experts, *(f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down"))]
    mtp = ["enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"]
    layers = [every + dense, every + mixture, every + mixture, every + mixture + mtp, every + mixture + mtp]
    expected = {f"model.layers.{i}.{name}.weight" for i, names in enumerate(layers) for name in names}
    expected |= {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(1, 5)}
    assert set(stored) == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}

    own = dict(model.named_parameters())
    same = torch.testing.assert_close
    same(stored["model.layers.2.mlp.experts.5.down_proj.weight"], own["layers.2.ffn.experts.down_proj"][5].T)
    same(stored["model.layers.2.mlp.gate.e_score_correction_bias"], own["layers.2.ffn.router.bias"].detach())
    same(stored["model.layers.4.enorm.weight"], own["mtp.1.embedding_norm.weight"].detach())
    same(stored["model.layers.4.shared_head.head.weight"], own["head.weight"].detach())
    hidden, embedding = own["mtp.1.proj.weight"].detach().chunk(2, 1)
    same(stored["model.layers.4.eh_proj.weight"], torch.cat((embedding, hidden), 1))


def test_shards(tmp_path):
    model = make_model()
    save_pretrained(model, tmp_path / "a", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert [s.name for s in shards] == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    contents = {shard.name: load_file(shard) for shard in shards}
    assert index["weight_map"] == {name: file for file, tensors in contents.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in contents.values()]
    assert len(sizes) > 3 and max(sizes) <= 100_000 and sum(sizes) == index["metadata"]["total_size"]
    save_pretrained(model, tmp_path / "b", max_shard_bytes=1)  # a tensor is never split
    assert_same(load_pretrained(tmp_path / "b"), model)


def test_number_formats(tmp_path):
    model = make_model().to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_pretrained(tmp_path)
    assert_same(loaded, model)
    assert loaded.head.weight.dtype == torch.bfloat16 and loaded.routers()[0].bias.dtype == torch.float32
    assert_same(load_pretrained(tmp_path, dtype=torch.float32), model.float())


def test_without_prediction_modules(tmp_path):
    model = make_model(num_nextn_predict_layers=2)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, mtp=False)
    assert loaded.config.num_nextn_predict_layers == 0 and len(loaded.mtp) == 0
    assert loaded.num_parameters() == model.num_parameters()
