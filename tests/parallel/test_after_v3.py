"""Training on two processes against training on one, with several residual streams, an Engram, and V4's Muon."""

import dataclasses

import pytest
import torch
from training.helpers import RECIPE, counting_data

from minids.config import EngramConfig, ModelConfig
from minids.model.transformer import MiniDS
from minids.parallel.launch import launch
from minids.parallel.layout import Layout
from minids.parallel.trainer import ParallelTrainer
from minids.training.checkpoint import latest_checkpoint
from minids.training.pretrain import Trainer

CONFIG = ModelConfig.preset(
    "nano", num_hidden_layers=2, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, hc_mult=2,
    engram=EngramConfig(layers=(1,), rows=50, heads=2, dim=8), scoring_func="sqrtsoftplus", n_group=1, topk_group=1,
)  # fmt: skip
WANTED = dataclasses.replace(
    RECIPE, steps=6, batch_size=8, seq_len=12, optimizer="muon_v4", evaluation_batches=2, mtp_weight=0.3
)
SEEN = ("loss", "mtp_loss", "balance_loss", "gradient_norm", "max_violation")


def trainer(text, world):
    torch.manual_seed(0)
    model = MiniDS(CONFIG).double()
    if not text:
        return Trainer(model, counting_data(), WANTED)
    return ParallelTrainer(model, counting_data(), WANTED, Layout.parse(text, world))


def steps(each, count):
    metrics = [each.train_step() for _ in range(count)]
    return torch.tensor([[m[name] for name in SEEN] for m in metrics], dtype=torch.float64), each.evaluate()


def halves(text, folder):
    each = trainer(text, 2)
    first, _ = steps(each, 3)
    each.save(folder / text / "checkpoints")
    return first


def second_half(text, folder):
    each = trainer(text, 2)
    each.load(latest_checkpoint(folder / text / "checkpoints"))
    return steps(each, 3)


@pytest.mark.parametrize("text", ["dp=2", "ep=2"])
def test_steps_of_two_processes_equal_those_of_one(text, tmp_path):
    whole, bits = steps(trainer("", 1), 6)
    for first in launch(lambda rank: halves(text, tmp_path), 2):
        torch.testing.assert_close(first, whole[:3], atol=1e-9, rtol=0)
    for second, its_bits in launch(lambda rank: second_half(text, tmp_path), 2):
        torch.testing.assert_close(second, whole[3:], atol=1e-9, rtol=0)
        assert its_bits == pytest.approx(bits, abs=1e-9)


def test_a_pipeline_refuses_what_it_does_not_have():
    recipe, config = dataclasses.replace(WANTED, optimizer="adamw"), CONFIG.replace(num_hidden_layers=4)
    for changed in (config.replace(engram=None), config.replace(hc_mult=1)):
        with pytest.raises(ValueError, match="(hc_mult|engram)=.*a pipeline has"):
            Layout.parse("pp=2", 2).check(changed, recipe, 2)
    with pytest.raises(ValueError, match="qk_clip=100.0: is for training in one process"):
        Layout.parse("dp=2", 2).check(config, dataclasses.replace(recipe, qk_clip=100.0), 2)
