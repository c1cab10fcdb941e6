"""Every broken folder is refused in one clear line."""

import json
import re
import shutil

import pytest
import torch
from hf_folders import DOWN, UP, edit_json, edit_tensors, make_model

from minids.interop.hf import load_pretrained, save_pretrained


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


EH_PROJ = "model.layers.3.eh_proj.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "config cut short": (lambda f: cut(f / "config.json", 100), "config.json: cannot be read"),
    "config no object": (lambda f: (f / "config.json").write_text("[1]"), "config.json: must hold a JSON object"),
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
        "model.layers.3.eh_proj.weight: is not a tensor",
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
    "too much": (in_tensors(lambda t: t.update(x=torch.ones(1))), "x: is not a tensor of this model"),
    "transposed": (
        in_tensors(lambda t: t.update({UP: t[UP].T.contiguous()})),
        f"{UP}: has shape [64, 32], must have [32, 64]",
    ),
    "integers": (in_tensors(lambda t: t.update({UP: t[UP].int()})), f"{UP}: is stored as I32"),
    "FP8 without config": (
        in_tensors(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        f"{UP}: is stored as F8_E4M3",
    ),
    "another prefix": (
        in_tensors(lambda t: t.update({f"module.{name}": t.pop(name) for name in list(t)})),
        "model.embed_tokens.weight: is missing; the files hold module.model.embed_tokens.weight: remove the prefix",
    ),
    "a pointer of Git LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "model.safetensors: cannot be read: it is a Git LFS pointer: fetch the file itself with git lfs pull",
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
        "index.json names the file",
    ),
    "index no JSON": (lambda f: cut(f / "model.safetensors.index.json", 50), "index.json: cannot be read"),
    "index empty": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map must name a file"),
    "path": (in_index(lambda m: m.update({DOWN: "../x.safetensors"})), "must name a file beside it"),
    "not a name": (in_index(lambda m: m.update({DOWN: 7})), "must name a file beside it"),
    "listed elsewhere": (
        in_index(lambda m: m.update({"lm_head.weight": SECOND})),
        f"lm_head.weight: model.safetensors.index.json names the file {SECOND}, but it is in model-00003",
    ),
    "not listed": (in_index(lambda m: m.pop(DOWN)), f"{DOWN}: model.safetensors.index.json names the file"),
}


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_broken_shards_are_refused(tmp_path, name):
    spoil, message = BROKEN_SHARDS[name]
    save_pretrained(make_model(), tmp_path, max_shard_bytes=300_000)
    assert len(list(tmp_path.glob("model-*"))) == 5
    spoil(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(tmp_path)
