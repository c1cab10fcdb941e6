"""What a run needs is counted as torch counts it, and compared with the smallest limit of the machine."""

import pytest
import torch

from minids.config import ModelConfig
from minids.model.transformer import MiniDS
from minids.training import memory
from minids.training.memory import check_training, machine_bytes, training_bytes
from minids.training.optimizer import make_optimizers
from minids.training.pretrain import Recipe

NANO = ModelConfig.preset("nano")


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_bytes_are_those_of_the_tensors_after_a_step(moments):
    model = MiniDS(NANO)
    (optimizer,) = make_optimizers(model, "adamw", 1e-3, 0.1, moments)
    out = model(torch.randint(NANO.vocab_size, (1, 16)), mtp=True)
    sum(logits.sum() for logits in (out.logits, *out.mtp_logits)).backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    tensors = {
        "weights": list(model.parameters()),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "optimizer": states,
    }
    counted = training_bytes(NANO, Recipe(moments=moments))
    for name, group in tensors.items():
        assert counted[name] == pytest.approx(sum(tensor.nbytes for tensor in group), rel=1e-3)  # biases are buffers


def test_muon_and_untrained_mtp_modules_need_less():
    whole = training_bytes(NANO, Recipe())
    assert training_bytes(NANO, Recipe(optimizer="muon"))["optimizer"] == whole["optimizer"] / 2
    assert training_bytes(NANO, Recipe(mtp_weight=0))["weights"] < whole["weights"]


def test_smallest_limit_counts(tmp_path, monkeypatch):
    machine = machine_bytes()
    assert machine > 1e9
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    for text, expected in (("max\n", None), ("123456789\n", 123456789)):
        (tmp_path / "memory.max").write_text(text)
        assert machine_bytes() == expected or expected is None and machine_bytes() >= machine


def test_run_is_refused_where_its_share_does_not_fit(monkeypatch):
    need = sum(training_bytes(NANO, Recipe()).values())
    monkeypatch.setattr(memory, "machine_bytes", lambda: need)
    check_training(NANO, Recipe(), "cpu")
    monkeypatch.setattr(memory, "machine_bytes", lambda: need - 1)
    with pytest.raises(ValueError, match="training .weights 0.00 GB.* needs at least 0.00 GB, but there is only"):
        check_training(NANO, Recipe(), "cpu")
    check_training(NANO, Recipe(), "cpu", local=1, world=4)
    with pytest.raises(ValueError, match="creating all weights in each of 8 processes"):
        check_training(NANO, Recipe(), "cpu", local=8, world=80)
