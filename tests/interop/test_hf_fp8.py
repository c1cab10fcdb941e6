"""Folders in FP8 as the release is: dequantised on import, quantised on export, refused where broken."""

import json
import re
import shutil

import pytest
import torch
from hf_folders import RELEASED_V3, UP, assert_same, edit_json, edit_tensors, make_model, quantize_folder
from safetensors.torch import load_file, save_file

from minids.interop.hf import load_pretrained, save_pretrained


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), f"{UP}: is stored as F8_E4M3, must be one of F64"),
        (lambda t: t.update({UP: t[UP].float()}), f"{UP}: is stored as F32, must be one of F8_E4M3"),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 1)}), "_scale_inv: has shape [2, 1], must have [1, 1]"),
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
