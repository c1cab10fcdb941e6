"""The released V3 config, models with no two values alike, and edits of an exported folder, for tests of interop.hf."""

import json

import torch
from safetensors.torch import load_file, save_file

from minids.config import ModelConfig
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
DOWN, UP = "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"


def make_model(**changes):
    """A nano model in which no two numbers are alike, biases and norms included."""
    model = MiniDS(ModelConfig.preset("nano", **{"vocab_size": 272} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantize(weight, block, powers_of_two=False):
    """Blocks of E4M3 with one factor each, and what they stand for, a block at a time."""
    rows, columns = block
    quantized, meaning = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[part].abs().max() / 448
            if powers_of_two:
                scale[i, j] = 2.0 ** scale[i, j].log2().ceil()
            quantized[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
            meaning[part] = quantized[part].float() * scale[i, j]
    return quantized, scale, meaning


RELEASED_IN_FP8 = ("q_a", "q_b", "kv_b", "o", "gate", "up", "down")  # and kv_a_proj_with_mqa; not eh_proj


def quantize_folder(folder, block, parts=RELEASED_IN_FP8, scale_dtype=torch.float32):
    """Turn an export into FP8 as the release is: some linear layers; returns what the tensors stand for.

    With a `scale_dtype` of 8 bits the factors are powers of two.
    """
    tensors = load_file(folder / "model.safetensors")
    meaning = dict(tensors)
    for name, weight in meaning.items():
        if name.endswith((*(f".{part}_proj.weight" for part in parts), ".kv_a_proj_with_mqa.weight")):
            tensors[name], scale, meaning[name] = quantize(weight, block, scale_dtype.itemsize == 1)
            tensors[f"{name}_scale_inv"] = scale.to(scale_dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fp8 = RELEASED_V3["quantization_config"] | {"weight_block_size": list(block)}
    edit_json(folder / "config.json", quantization_config=fp8)
    return meaning
