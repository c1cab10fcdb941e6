"""The measurements run and report what they say; how fast anything is, no test asserts."""

import json
import sys

import pytest
import torch

from minids.cli import bench_decoding, bench_training
from minids.cli.main import main
from minids.cli.side_by_side import in_transformers
from minids.config import ModelConfig
from minids.model.transformer import MiniDS


@pytest.fixture
def small(monkeypatch):
    config = ModelConfig.preset("nano", num_nextn_predict_layers=0, num_hidden_layers=2, max_position_embeddings=2048)
    for room in (bench_training, bench_decoding):
        monkeypatch.setattr(room, "CONFIG", config)
    monkeypatch.setattr(bench_training, "BATCH", 2)
    monkeypatch.setattr(bench_training, "SEQ_LEN", 16)


def test_every_ratio_is_reported_with_its_spread(small, monkeypatch, capsys):
    questions = ["train", "decode", "prefill", "experts", "context"]
    monkeypatch.setattr(sys, "argv", ["minids", "bench", *questions, "--repeats", "2", "--json"])
    assert main() == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["threads"] == 1
    whats = [row["what"] for row in report["rows"]]
    assert sum("training step, transformers" in what for what in whats) == 2
    assert sum("decoding at batch" in what for what in whats) == 4
    assert sum("experts /" in what for what in whats) == 2 and sum("position" in what for what in whats) == 1
    assert sum("prefill" in what for what in whats) == 1
    for row in report["rows"]:
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert len(row["cpu_seconds"]) == 2


def test_the_compiled_step_is_compared_at_both_batches(small, monkeypatch):
    """Whether it is compiled does not matter for the report; tests/inference compiles it."""
    plain = bench_decoding.generate
    monkeypatch.setattr(
        bench_decoding, "generate", lambda *arguments, compiled=False, **options: plain(*arguments, **options)
    )
    rows = bench_decoding.compiled_decoding(2)
    assert [row["what"].partition(",")[0] for row in rows] == 2 * ["decoding at batch 1"] + 2 * ["decoding at batch 16"]
    assert [row["aim"] for row in rows] == [">= 3", ">= 4", "", ">= 2"]


def test_memory_of_the_loss_is_counted_the_same_every_time():
    """Of the tensors that are made, so that a busy machine changes nothing."""
    (row,), (again,) = bench_training.memory_of_loss(2), bench_training.memory_of_loss(2)
    assert row == again and row["median"] >= 3
    assert "32,768 words" in row["what"]


def test_both_sides_have_the_same_weights():
    config = ModelConfig.preset("nano", num_nextn_predict_layers=0)
    model = MiniDS(config).eval()
    twin = in_transformers(model).eval()
    tokens = torch.randint(config.vocab_size, (2, 12))
    torch.testing.assert_close(twin(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
