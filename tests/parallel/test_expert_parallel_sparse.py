"""Sparse attention on many processes: the indexers' loss and gradients are those of one process."""

import dataclasses

import pytest
import torch
from training.helpers import RECIPE, counting_data

from minids.config import ModelConfig
from minids.model.transformer import MiniDS
from minids.parallel.activations import activation_bytes
from minids.parallel.launch import launch
from minids.parallel.layout import Layout
from minids.parallel.plan import plan
from minids.parallel.trainer import ParallelTrainer
from minids.training.pretrain import Trainer

CONFIG = ModelConfig.preset(
    "nano", num_hidden_layers=2, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, index_topk=4,
    index_n_heads=16, index_head_dim=8,
)  # fmt: skip
WANTED = dataclasses.replace(RECIPE, steps=20, batch_size=8, seq_len=12, learning_rate=3e-3, evaluation_batches=2)
SEEN = ("loss", "mtp_loss", "balance_loss", "indexer_loss", "gradient_norm")


def course(text, world):
    """The metrics of five steps, and the evaluation after them; in float64, as in test_trainer.py."""
    torch.manual_seed(0)
    model, data = MiniDS(CONFIG).double(), counting_data()
    each = ParallelTrainer(model, data, WANTED, Layout.parse(text, world)) if text else Trainer(model, data, WANTED)
    metrics = [each.train_step() for _ in range(5)]
    return [[m[name] for name in SEEN] for m in metrics], each.evaluate()


@pytest.mark.parametrize("text", ["dp=2", "ep=2"])
def test_the_first_steps_equal_those_of_one_process(text):
    metrics, bits = course("", 1)
    for its_metrics, its_bits in launch(lambda rank: course(text, 2), 2):
        wanted, got = (torch.tensor(each, dtype=torch.float64) for each in (metrics, its_metrics))
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
        assert its_bits == pytest.approx(bits, abs=1e-10)


def test_what_does_not_train_the_indexers_is_refused():
    """Neither a pipeline, nor a warm-up of many processes: FSDP would leave its gradients apart."""
    with pytest.raises(
        ValueError, match="index_topk=4: a pipeline has None only; with 2 processes nearest possible: pp=1"
    ):
        Layout(pp=2, schedule="one_f_one_b").check(CONFIG, WANTED, 2)
    warm_up = dataclasses.replace(WANTED, index_stage="dense_warmup")
    with pytest.raises(ValueError, match="index_stage='dense_warmup': a warm-up of the indexers runs in one process; "):
        Layout(dp=2).check(CONFIG, warm_up, 2)
    Layout().check(CONFIG, warm_up, 1)  # without torchrun, `minids train` makes a Trainer
    with pytest.raises(RuntimeError, match="a warm-up of the indexers runs without torchrun"):
        launch(lambda rank: ParallelTrainer(MiniDS(CONFIG), counting_data(), warm_up, Layout()), 1)


def test_the_plan_counts_what_the_loss_keeps():
    """The products of all index heads and pairs of tokens are kept for backward."""
    dense = activation_bytes(CONFIG.replace(index_topk=None), WANTED, 2)
    scores = 4 * 2 * 12 * 12 * CONFIG.index_n_heads * 3  # float32; 2 rows of 12 x 12 pairs, in 2 layers and one module
    assert activation_bytes(CONFIG, WANTED, 2) > dense + scores
    assert "parameters" in plan(Layout(dp=2), CONFIG, WANTED, "cpu")
