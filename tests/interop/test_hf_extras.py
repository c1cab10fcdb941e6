"""What real folders hold beside the model: buffers, copies and MTP modules that are not used, and other files."""

import shutil

import pytest
import torch
from hf_folders import assert_same, edit_json, edit_tensors, make_model

from minids.config import ModelConfig
from minids.interop.hf import load_pretrained, read_config, save_pretrained

EMBEDDING, HEAD = "model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.cos_cached",
    ],
)
@pytest.mark.parametrize("mtp", [True, False])
def test_buffers_that_every_reader_recomputes_are_ignored(tmp_path, name, mtp):
    model = make_model()
    save_pretrained(model, tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({name: torch.full((4,), torch.nan)}))
    loaded = load_pretrained(tmp_path, mtp=mtp)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert len(loaded.mtp) == mtp


def test_names_that_only_resemble_a_buffer_are_refused(tmp_path):
    save_pretrained(make_model(), tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.inv_freq": torch.ones(4)}))
    with pytest.raises(ValueError, match="^model.inv_freq: is not a tensor of this model$"):
        load_pretrained(tmp_path)


COPIES = {
    "equal": (lambda t: None, []),
    "absent": (lambda t: (t.pop(EMBEDDING), t.pop(HEAD)), []),
    "stale": (lambda t: t.update({HEAD: t[HEAD] + 1}), [HEAD]),
    "of another vocabulary": (lambda t: t.update({EMBEDDING: t[EMBEDDING][:-8].clone()}), [EMBEDDING]),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_in_an_mtp_module_may_be_equal_absent_or_stale(tmp_path, caplog, kind):
    change, named = COPIES[kind]
    model = make_model()
    save_pretrained(model, tmp_path)
    edit_tensors(tmp_path, change)
    assert_same(load_pretrained(tmp_path), model)
    assert [record.getMessage().split()[1] for record in caplog.records] == named
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_mtp_modules_may_be_absent_though_the_config_counts_them(tmp_path):
    model = make_model(num_nextn_predict_layers=0)
    save_pretrained(model, tmp_path)
    edit_json(tmp_path / "config.json", num_nextn_predict_layers=1)
    assert len(load_pretrained(tmp_path).mtp) == 0


def test_the_module_of_the_whole_model_is_ignored_in_a_cut_one(tmp_path, caplog):
    """A guide's V3: two of three layers were kept, and the MTP module under its old number, 3."""
    model = make_model()
    save_pretrained(model, tmp_path)
    removed = "model.layers.2."
    edit_tensors(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.startswith(removed)])
    edit_json(tmp_path / "config.json", num_hidden_layers=2, first_k_dense_replace=1)
    loaded = load_pretrained(tmp_path)
    assert (len(loaded.layers), len(loaded.mtp)) == (2, 0)
    assert_same(loaded.layers[1], model.layers[1])
    assert caplog.messages == ["ignored: the MTP modules in layers [3], which do not follow layer 1"]


def test_v3_with_fewer_layers_than_dense_ones_is_dense(tmp_path):
    model = make_model(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0)
    save_pretrained(model, tmp_path)
    edit_json(tmp_path / "config.json", first_k_dense_replace=3, minids={})
    assert_same(load_pretrained(tmp_path), model)


@pytest.mark.parametrize("changes", [dict(hidden_size=36, moe_intermediate_size=12), dict(moe_intermediate_size=13)])
def test_widths_that_are_no_multiple_of_8_are_loaded_and_run(tmp_path, changes):
    model = make_model(**changes)
    save_pretrained(model, tmp_path)
    tokens = torch.arange(20)[None]
    assert torch.equal(load_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    loss = model.to(torch.bfloat16)(tokens).logits.logsumexp(-1).sum()
    loss.backward()
    assert model.layers[1].ffn.experts.up_proj.grad.isfinite().all()


def test_other_files_in_the_folder_change_nothing(tmp_path):
    model = make_model()
    save_pretrained(model, tmp_path / "a", max_shard_bytes=300_000)
    (tmp_path / "a/consolidated.safetensors").write_bytes(b"no safetensors")
    (tmp_path / "a/._model-00001-of-00005.safetensors").write_bytes(b"\0\5\26\7")
    (tmp_path / "a/pytorch_model.bin").write_bytes(b"\x80")
    shutil.copy(tmp_path / "a/config.json", tmp_path / "a/params.json")
    assert_same(load_pretrained(tmp_path / "a"), model)


def test_the_config_of_a_folder_is_read_alone(tmp_path):
    config = ModelConfig.preset("nano", expert_balance_alpha=0.1)
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        read_config(tmp_path / "x")
    save_pretrained(make_model(expert_balance_alpha=0.1), tmp_path / "y")
    assert read_config(tmp_path / "y") == config
