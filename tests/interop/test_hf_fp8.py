"""Folders in FP8 as the release is: dequantised on import, quantised on export, refused where broken."""

import json
import math
import re
import shutil

import pytest
import torch
from hf_folders import (
    RELEASED_IN_FP8,
    RELEASED_V3,
    UP,
    assert_same,
    edit_json,
    edit_tensors,
    make_model,
    quantize_folder,
)
from safetensors.torch import load_file, save_file

from minids.config import ModelConfig
from minids.interop.hf import load_pretrained, save_pretrained
from minids.interop.names import released_in_fp8, released_tensors, shared_copies
from minids.model.transformer import MiniDS


@pytest.mark.parametrize(
    "block, scale_dtype, parts",
    [
        ((128, 128), torch.float32, RELEASED_IN_FP8),
        ((64, 32), torch.float32, (*RELEASED_IN_FP8, "eh")),  # as exports of version 0.1
        ((128, 128), torch.float8_e8m0fnu, RELEASED_IN_FP8),
    ],
)
def test_fp8_weights_are_dequantised(tmp_path, block, scale_dtype, parts):
    """Widths that are, and that are not, multiples of a block: 136 = 128 + 8, 520 = 4 * 128 + 8, 24 and 256."""
    model = make_model(hidden_size=136, intermediate_size=520, moe_intermediate_size=24, kv_lora_rank=256)
    save_pretrained(model, tmp_path / "fp8")
    meaning = quantize_folder(tmp_path / "fp8", block, parts, scale_dtype)
    assert meaning["model.layers.0.mlp.gate_proj.weight"].shape == (520, 136)

    shutil.copytree(tmp_path / "fp8", tmp_path / "float")
    save_file(meaning, tmp_path / "float/model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "float/config.json", quantization_config=None)
    reference = load_pretrained(tmp_path / "float")
    loaded = load_pretrained(tmp_path / "fp8")
    assert_same(loaded, reference)
    assert torch.equal(loaded.mtp[0].proj.weight, model.mtp[0].proj.weight) == ("eh" not in parts)
    assert not torch.equal(loaded.layers[0].attention.o_proj.weight, model.layers[0].attention.o_proj.weight)
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


def test_an_export_of_v3_in_fp8_has_the_tensors_and_bytes_of_the_release():
    """91,991 tensors of 688,574,839,360 bytes, as the headers of deepseek-ai/DeepSeek-V3 say (docs/ERRATA.md)."""
    with torch.device("meta"):
        model = MiniDS(ModelConfig.preset("v3"))
    shapes = {name: tuple(tensor.shape) for name, tensor in released_tensors(model).items()}
    shapes |= {copy: shapes[original] for copy, original in shared_copies(model.config).items()}
    sizes = {}
    for name, shape in shapes.items():
        width = 1 if released_in_fp8(name) else 4 if name.endswith("correction_bias") else 2
        sizes[name] = width * math.prod(shape)
        if width == 1:
            sizes[f"{name}_scale_inv"] = 4 * math.prod(math.ceil(n / 128) for n in shape)
    assert (len(sizes), sum(sizes.values())) == (91_991, 688_574_839_360)


def test_the_mtp_projection_keeps_the_format_of_the_trunk(tmp_path):
    """A reader that holds it as a plain linear layer would take FP8 values without their scale."""
    model = make_model().to(torch.bfloat16)
    save_pretrained(model, tmp_path, fp8=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.3.eh_proj.weight_scale_inv" not in stored
    assert torch.equal(stored["model.layers.3.eh_proj.weight"].roll(64, 1), model.mtp[0].proj.weight)
    assert {name: str(stored[name].dtype).removeprefix("torch.") for name in FORMATS} == FORMATS


FORMATS = {  # one tensor of each kind, as in the headers of the release
    "model.embed_tokens.weight": "bfloat16",
    "model.layers.0.self_attn.q_a_proj.weight": "float8_e4m3fn",
    "model.layers.0.self_attn.q_a_proj.weight_scale_inv": "float32",
    "model.layers.0.self_attn.q_a_layernorm.weight": "bfloat16",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": "float8_e4m3fn",
    "model.layers.0.self_attn.kv_b_proj.weight": "float8_e4m3fn",
    "model.layers.0.self_attn.o_proj.weight": "float8_e4m3fn",
    "model.layers.0.mlp.down_proj.weight": "float8_e4m3fn",
    "model.layers.1.mlp.gate.weight": "bfloat16",
    "model.layers.1.mlp.gate.e_score_correction_bias": "float32",
    "model.layers.1.mlp.shared_experts.up_proj.weight": "float8_e4m3fn",
    "model.layers.1.mlp.experts.0.gate_proj.weight": "float8_e4m3fn",
    "model.layers.1.input_layernorm.weight": "bfloat16",
    "model.layers.3.enorm.weight": "bfloat16",
    "model.layers.3.embed_tokens.weight": "bfloat16",
    "model.layers.3.shared_head.head.weight": "bfloat16",
    "model.norm.weight": "bfloat16",
    "lm_head.weight": "bfloat16",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), f"{UP}: is stored as F8_E4M3, must be one of F64"),
        (lambda t: t.update({UP: t[UP].float()}), f"{UP}: is stored as F32, must be one of F8_E4M3"),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 1)}), "_scale_inv: has shape [2, 1], must have [1, 1]"),
        (
            lambda t: t.update({f"{UP}_scale_inv": torch.ones(1, 1, dtype=torch.uint8)}),
            "_scale_inv: is stored as U8, must be one of F32, BF16, F16, F64, F8_E8M0",
        ),
        (
            lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(3, 1)}),
            "lm_head.weight_scale_inv: is not a tensor",
        ),
    ],
)
def test_broken_fp8_is_refused(tmp_path, change, message):
    save_pretrained(make_model(), tmp_path)
    quantize_folder(tmp_path, (128, 128))
    edit_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(tmp_path)
