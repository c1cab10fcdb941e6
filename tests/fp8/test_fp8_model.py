"""A whole model in FP8: what is converted, its gradients, resuming a run, export and import."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain_model import NANO, build, random_tokens
from safetensors.torch import load_file, save_file
from training.helpers import RECIPE, counting_data, nano

from minids.fp8.formats import dequantize, quantize
from minids.fp8.linear import AFTER_ATTENTION, Casting, convert_to_fp8
from minids.interop.hf import load_pretrained, save_pretrained
from minids.training.pretrain import Trainer


def test_conversion_keeps_parameters_and_what_v3_keeps_precise():
    model = build(dtype=torch.float32)
    before, order = dict(model.named_parameters()), list(model.state_dict())
    convert_to_fp8(model)
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == order and all(after[name] is before[name] for name in before)
    report = model.precision_report()
    assert report.keys() == {name.rpartition(".")[0] for name in before}
    kept = {name for name, precision in report.items() if precision == "float32"}
    assert kept == {name for name in report if "norm" in name or name in ("embedding", "head")
                    or name.endswith((".router", "q_norm"))}  # fmt: skip
    assert {report[name] for name in report.keys() - kept} == {"E4M3, emulated in float32"}
    assert model.layers[1].attention.o_proj.casting == AFTER_ATTENTION
    assert model.layers[1].attention.kv_down_proj.casting == Casting()


def test_conversion_keeps_parameters_and_their_names():
    """An optimizer that was made before goes on with the same tensors, and a checkpoint has the same names."""
    model = build(dtype=torch.float32)
    before = dict(model.named_parameters())
    convert_to_fp8(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is weight for name, weight in before.items())


def test_conversion_can_be_partial_and_refuses_half_precision():
    model = build(dtype=torch.float32)
    convert_to_fp8(model, where=lambda name: name.startswith("layers.0."))
    converted = {name for name, precision in model.precision_report().items() if precision != "float32"}
    assert converted and all(name.startswith("layers.0.") for name in converted)
    model = build(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="weights are torch.bfloat16"):
        convert_to_fp8(model)
    assert set(model.precision_report().values()) == {"bfloat16"}


def test_gradients_of_a_whole_model_point_where_float32_does():
    every_expert = NANO.replace(num_experts_per_tok=8, topk_group=4)  # no choice that rounding could change
    model, tokens = build(every_expert, dtype=torch.float32), random_tokens(8, 65)

    def loss_and_gradient():
        model.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want_loss, want = loss_and_gradient()
    convert_to_fp8(model)
    loss, got = loss_and_gradient()
    assert got.keys() == want.keys() and loss == pytest.approx(want_loss, rel=0.01)
    for name in want:
        assert F.cosine_similarity(got[name].flatten(), want[name].flatten(), dim=0) > 0.97, name


def test_a_run_in_fp8_resumes_bit_for_bit(tmp_path):
    def trainer():
        model = nano()
        convert_to_fp8(model)
        return Trainer(model, counting_data(), replace(RECIPE, steps=2, checkpoint_every=1))

    history = trainer().run(directory=tmp_path, progress=False)
    resumed = trainer()
    resumed.load(tmp_path / "checkpoints" / "step-00000001")
    for want in history[1:]:
        got = resumed.train_step()
        assert all(got[key] == want[key] for key in ("step", "loss", "mtp_loss", "gradient_norm", "max_violation"))


def test_an_fp8_model_is_exported_and_its_weights_load_as_fp8(tmp_path):
    """`weight_scale_inv` is the scale of `quantize`; the loader's own dequantisation agrees with `dequantize`."""
    model = build(NANO.replace(hidden_size=192, moe_intermediate_size=160), dtype=torch.float32)
    convert_to_fp8(model)
    save_pretrained(model, tmp_path)
    for name, parameter in load_pretrained(tmp_path).named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])

    tensors, want = load_file(tmp_path / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if "_proj" in name:
            tensors[name], scale = quantize(weight, (128, 128))
            tensors[f"{name}_scale_inv"] = scale
            want[name] = dequantize(tensors[name], scale, (128, 128))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_pretrained(tmp_path)
    assert torch.equal(loaded.layers[0].attention.o_proj.weight, want["model.layers.0.self_attn.o_proj.weight"])
    assert torch.equal(loaded.layers[1].ffn.experts.up_proj[3].T, want["model.layers.1.mlp.experts.3.up_proj.weight"])
    error = loaded.layers[0].attention.o_proj.weight - model.layers[0].attention.o_proj.weight
    assert 0 < error.abs().max() <= 2**-4 * model.layers[0].attention.o_proj.weight.abs().max()
