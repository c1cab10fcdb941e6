"""Folders of safetensors: released names, exact round trips, FP8, and one clear line for every broken folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minids.config import ModelConfig, YaRN
from minids.interop.hf import load_pretrained, save_pretrained
from minids.model.transformer import MiniDS

RELEASED_V3 = {  # config.json of deepseek-ai/DeepSeek-V3 (FACTS.md section 1)
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def make_model(**changes):
    """A nano model in which no two numbers are alike, biases and norms included."""
    model = MiniDS(ModelConfig.preset("nano", **{"vocab_size": 272} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)


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
        ("model_type", "llama", "model_type='llama': only deepseek_v3 and deepseek_v2"),
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
        ("rope_scaling", RELEASED_V3["rope_scaling"] | {"attention_factor": 1.0}, "unknown rope_scaling field"),
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


# FP8.


def quantize(weight, block):
    """Blocks of E4M3 with one factor each, and what they stand for, a block at a time."""
    rows, columns = block
    quantized, meaning = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[part].abs().max() / 448
            quantized[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
            meaning[part] = quantized[part].float() * scale[i, j]
    return quantized, scale, meaning


def quantize_folder(folder, block):
    """Turn an export into FP8 as the release is: every linear layer; returns what the tensors stand for."""
    tensors = load_file(folder / "model.safetensors")
    meaning = dict(tensors)
    for name, weight in meaning.items():
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"], meaning[name] = quantize(weight, block)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fp8 = RELEASED_V3["quantization_config"] | {"weight_block_size": list(block)}
    edit_json(folder / "config.json", quantization_config=fp8)
    return meaning


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_fp8_weights_are_dequantised(tmp_path, block):
    """Widths that are, and that are not, multiples of a block: 136 = 128 + 8, 520 = 4 * 128 + 8, 24 and 256."""
    model = make_model(hidden_size=136, intermediate_size=520, moe_intermediate_size=24, kv_lora_rank=256)
    save_pretrained(model, tmp_path / "fp8")
    meaning = quantize_folder(tmp_path / "fp8", block)
    assert meaning["model.layers.0.mlp.gate_proj.weight"].shape == (520, 136)

    shutil.copytree(tmp_path / "fp8", tmp_path / "float")
    save_file(meaning, tmp_path / "float/model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "float/config.json", quantization_config=None)
    reference = load_pretrained(tmp_path / "float")
    loaded = load_pretrained(tmp_path / "fp8")
    assert_same(loaded, reference)
    assert not torch.equal(loaded.mtp[0].proj.weight, model.mtp[0].proj.weight)
    half = {"dtype": torch.bfloat16}
    assert_same(load_pretrained(tmp_path / "fp8", **half), load_pretrained(tmp_path / "float", **half))


def test_an_export_in_fp8_is_what_the_release_is(tmp_path):
    """Equal, number by number, to a plain export that an independent loop over the blocks has turned into FP8."""
    model = make_model(hidden_size=136, intermediate_size=520, moe_intermediate_size=24, kv_lora_rank=256)
    save_pretrained(model, tmp_path / "plain")
    quantize_folder(tmp_path / "plain", (128, 128))
    save_pretrained(model, tmp_path / "fp8", fp8=True)
    ours, wanted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("fp8", "plain"))
    assert ours.keys() == wanted.keys()
    assert all(ours[name].dtype == wanted[name].dtype for name in ours)
    assert all(torch.equal(ours[name].float(), wanted[name].float()) for name in ours)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == RELEASED_V3["quantization_config"]
    assert_same(load_pretrained(tmp_path / "fp8"), load_pretrained(tmp_path / "plain"))


# Folders that are not what they should be.


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def in_tensors(change):
    return lambda folder: edit_tensors(folder, change)


def in_index(change):
    def edit(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DOWN, UP = "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
EH_PROJ, COPY = "model.layers.3.eh_proj.weight", "model.layers.3.embed_tokens.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "config cut short": (lambda f: cut(f / "config.json", 100), "config.json: cannot be read"),
    "config no object": (lambda f: (f / "config.json").write_text("[1]"), "config.json: must hold an object"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: cannot be read"),
    "llama": (in_config(model_type="llama"), "model_type='llama'"),
    "other width": (in_config(vocab_size=512), "has shape [272, 64], must have [512, 64]"),
    "more layers": (
        in_config(num_hidden_layers=10**9),
        "a model of its config.json at least",
    ),
    "more experts": (
        in_config(n_routed_experts=10**9),
        "a model of its config.json at least",
    ),
    "one layer more": (
        in_config(num_hidden_layers=4),
        "model.layers.3.eh_proj.weight: does not belong",
    ),
    "one layer less": (
        in_config(num_hidden_layers=2),
        "model.layers.2.eh_proj.weight: is missing",
    ),
    "minids a list": (in_config(minids=[1]), "minids=[1]: must be an object"),
    "minids unknown": (in_config(minids={"x": 1}), "unknown config field 'x'"),
    "gptq": (in_config(quantization_config={"quant_method": "gptq"}), "must be fp8"),
    "only a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "neither model.safetensors nor model.safetensors.index.json (pickled weights are never read)",
    ),
    "cut short": (lambda f: cut(f / "model.safetensors", -10), "model.safetensors: cannot be read"),
    "cut to nothing": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors: cannot be read"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\x07" * 999), "model.safetensors: cannot be read"),
    "missing": (in_tensors(lambda t: t.pop(DOWN)), f"{DOWN}: is missing"),
    "missing in MTP": (in_tensors(lambda t: t.pop(EH_PROJ)), f"{EH_PROJ}: is missing"),
    "too much": (in_tensors(lambda t: t.update(x=torch.ones(1))), "x: does not belong to this model"),
    "transposed": (
        in_tensors(lambda t: t.update({UP: t[UP].T.contiguous()})),
        f"{UP}: has shape [64, 32], must have [32, 64]",
    ),
    "integers": (in_tensors(lambda t: t.update({UP: t[UP].int()})), f"{UP}: is stored as I32"),
    "FP8 without config": (
        in_tensors(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        f"{UP}: is stored as F8_E4M3",
    ),
    "another copy": (
        in_tensors(lambda t: t.update({COPY: t[COPY] + 1})),
        f"{COPY}: differs from model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_in_one_line(tmp_path, name):
    spoil, message = BROKEN[name]
    save_pretrained(make_model(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


SECOND = "model-00002-of-00005.safetensors"
BROKEN_SHARDS = {
    "shard missing": (lambda f: (f / SECOND).unlink(), f"{SECOND}: cannot be read"),
    "shard cut short": (lambda f: cut(f / SECOND, 5000), f"{SECOND}: cannot be read"),
    "shard swapped": (
        lambda f: shutil.copy(f / SECOND, f / SECOND.replace("00002", "00003")),
        "index.json says it lies",
    ),
    "index no JSON": (lambda f: cut(f / "model.safetensors.index.json", 50), "index.json: cannot be read"),
    "index empty": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map must name a file"),
    "path": (in_index(lambda m: m.update({DOWN: "../x.safetensors"})), "must name a file beside it"),
    "not a name": (in_index(lambda m: m.update({DOWN: 7})), "must name a file beside it"),
    "listed elsewhere": (
        in_index(lambda m: m.update({"lm_head.weight": SECOND})),
        f"lm_head.weight: model.safetensors.index.json says it lies in {SECOND}, but it lies in model-00003",
    ),
    "not listed": (in_index(lambda m: m.pop(DOWN)), f"{DOWN}: model.safetensors.index.json says"),
}


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_broken_shards_are_refused(tmp_path, name):
    spoil, message = BROKEN_SHARDS[name]
    save_pretrained(make_model(), tmp_path, max_shard_bytes=300_000)
    assert len(list(tmp_path.glob("model-*"))) == 5
    spoil(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), f"{UP}: is stored as F8_E4M3, must be one of F64"),
        (lambda t: t.update({UP: t[UP].float()}), f"{UP}: is stored as F32, must be one of F8_E4M3"),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 1)}), "_scale_inv: has shape [2, 1], must have [1, 1]"),
        (
            lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(3, 1)}),
            "lm_head.weight_scale_inv: does not belong",
        ),
    ],
)
def test_broken_fp8_is_refused(tmp_path, change, message):
    save_pretrained(make_model(), tmp_path)
    quantize_folder(tmp_path, (128, 128))
    edit_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(tmp_path)


# Exports that cannot be, or that go wrong half-way.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "gqa"}, "attention='gqa'"),
        ({"scoring_func": "softmax", "topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
    ],
)
def test_models_that_v3_cannot_express_are_not_exported(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_pretrained(make_model(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def snapshot(folder: Path):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path):
    save_pretrained(make_model(), tmp_path / "deep/out", max_shard_bytes=100_000)
    second = make_model()
    save_pretrained(second, tmp_path / "deep/out")
    assert sorted(path.name for path in (tmp_path / "deep/out").iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_pretrained(tmp_path / "deep/out"), second)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in (tmp_path / "deep/out").iterdir()}) == 1


@pytest.mark.parametrize("foreign", ["notes.txt", "config.json", "model.safetensors"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, foreign):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / foreign).write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"is no earlier export .it holds '{foreign}'"):
        save_pretrained(make_model(), tmp_path / "out")
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(make_model(), tmp_path / "out" / foreign)
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_pretrained(make_model(), tmp_path / "new", max_shard_bytes=0)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("limit", [100, 100_000])
def test_a_full_disk_leaves_the_earlier_export(tmp_path, limit):
    """The system refuses to let any file grow beyond `limit`: config.json fails at once, or the second shard does."""
    resource = pytest.importorskip("resource")
    save_pretrained(make_model(), tmp_path / "out")
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for name in ("out", "new"):
            with pytest.raises(OSError, match="File too large"):
                save_pretrained(make_model(intermediate_size=512), tmp_path / name, max_shard_bytes=90_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path) == before


def test_a_refused_move_brings_the_earlier_export_back(tmp_path, monkeypatch):
    save_pretrained(make_model(), tmp_path / "out")
    before = snapshot(tmp_path)
    rename = Path.rename

    def refuse_the_new_folder(path, target):
        if target == tmp_path / "out" and path.suffix != ".old":
            raise PermissionError(f"{target}: in use")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_folder)
    with pytest.raises(PermissionError):
        save_pretrained(make_model(), tmp_path / "out")
    assert snapshot(tmp_path) == before
