import errno
import json

import pytest
import torch
from training.helpers import RECIPE, counting_data, nano

from minids import files
from minids.training import checkpoint
from minids.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from minids.training.pretrain import Trainer

TENSORS = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "random": {"cpu": torch.get_rng_state()}}


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "step-00000001", TENSORS, {"step": 1, "text": "größer"})
    tensors, state = load_checkpoint(tmp_path / "step-00000001")
    assert state == {"step": 1, "text": "größer"}
    assert torch.equal(tensors["model"]["weight"], TENSORS["model"]["weight"])
    assert torch.equal(tensors["random"]["cpu"], TENSORS["random"]["cpu"])


def test_files_that_the_state_does_not_name_are_ignored_with_a_line(tmp_path, caplog):
    """A copy of another step, or what an operating system leaves: loaded, it would replace or break the state."""
    save_checkpoint(tmp_path / "step", TENSORS, {"step": 1})
    for name in ("extra.safetensors", "._model.safetensors", ".DS_Store"):
        (tmp_path / "step" / name).write_bytes(b"no safetensors")
    tensors, state = load_checkpoint(tmp_path / "step")
    assert tensors.keys() == TENSORS.keys() and state == {"step": 1}
    (message,) = caplog.messages
    assert message.startswith("ignored: .DS_Store, ._model.safetensors, extra.safetensors in ")


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    trainer = Trainer(nano(), counting_data(), RECIPE)
    trainer.train_step()
    trainer.save(tmp_path)
    files = sorted(path.name for path in latest_checkpoint(tmp_path).iterdir())
    assert files == ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]


def test_a_checkpoint_holds_the_router_biases_and_the_data_position(tmp_path):
    """PITFALLS 13: a lost bias is a lost balance."""
    trainer = Trainer(nano(), counting_data(), RECIPE)
    for _ in range(3):
        trainer.train_step()
    trainer.save(tmp_path)
    torch.manual_seed(5)
    other = Trainer(nano(), counting_data(), RECIPE)
    other.load(latest_checkpoint(tmp_path))
    assert other.step == 3 and other.stream.position == 3
    for a, b in zip(trainer.model.routers(), other.model.routers(), strict=True):
        assert a.bias.abs().max() > 0 and torch.equal(a.bias, b.bias)
    assert trainer.train_step()["loss"] == other.train_step()["loss"]


def damage(folder, how):
    path = folder / "model.safetensors"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "one bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()
    elif how == "state truncated":
        (folder / "state.json").write_text((folder / "state.json").read_text()[:-5])
    elif how == "state missing":
        (folder / "state.json").unlink()
    elif how == "state not an object":
        (folder / "state.json").write_text("[1, 2]")
    elif how == "other format":
        fields = json.loads((folder / "state.json").read_text()) | {"format": 99}
        del fields["digest"]
        (folder / "state.json").write_text(json.dumps(fields | {"digest": checkpoint._digest_of_fields(fields)}))
    elif how == "state edited":
        path = folder / "state.json"
        path.write_text(path.read_text().replace('"step": 1', '"step": 2'))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors is damaged"),
        ("one bit", "model.safetensors is damaged"),
        ("missing", "model.safetensors is missing"),
        ("state truncated", "state.json is damaged"),
        ("state missing", "is not a checkpoint"),
        ("state not an object", "state.json is damaged"),
        ("state edited", "state.json is damaged"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, how, message):
    folder = tmp_path / "step-00000001"
    save_checkpoint(folder, TENSORS, {"step": 1})
    damage(folder, how)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "step-00000001", TENSORS, {"step": 1})

    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "step-00000002", TENSORS, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(latest_checkpoint(tmp_path))[1]["step"] == 1


def test_writing_a_folder_removes_its_own_unfinished_copies_only(tmp_path):
    for name in (".*.1.new", ".other.1.new"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path / "*", {"model": {}}, {"step": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["*", ".other.1.new"]


def test_an_existing_checkpoint_is_not_overwritten(tmp_path):
    save_checkpoint(tmp_path / "step-00000001", TENSORS, {"step": 1})
    with pytest.raises(ValueError, match="exists already"):
        save_checkpoint(tmp_path / "step-00000001", TENSORS, {"step": 1})


def test_optimizer_state_of_an_unknown_parameter_is_refused(tmp_path):
    trainer = Trainer(nano(), counting_data(), RECIPE)
    trainer.train_step()
    state = checkpoint.optimizer_tensors(trainer.model, trainer.optimizers)
    renamed = {"ghost/exp_avg": next(iter(state.values()))}
    with pytest.raises(ValueError, match="'ghost'"):
        checkpoint.load_optimizer_tensors(trainer.model, trainer.optimizers, renamed)
