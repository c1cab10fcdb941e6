"""The ways to choose tokens do what they say, and benchmarks/sparse_text.py runs and stored what the chapter says."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import sparse_text as benchmark
from minids.config import ModelConfig
from minids.course.token_choice import (
    by_probability,
    by_window,
    caught_mass,
    choosing,
    copy_accuracy,
    passages,
    sparse_attentions,
)
from minids.model.transformer import MiniDS

CONFIG = ModelConfig.preset(
    "nano", vocab_size=64, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0,
    index_topk=24, index_n_heads=16, index_head_dim=16,
)  # fmt: skip
WAYS = {"window": by_window, "exact": by_probability, "indexer": None}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MiniDS(CONFIG)


def test_the_second_half_of_a_passage_is_its_first():
    tokens = passages(5, 12, 64, torch.Generator().manual_seed(0))
    assert tokens.shape == (5, 24) and torch.equal(tokens[:, :12], tokens[:, 12:])
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_all_ways_are_dense_attention_if_k_is_the_length(model, way):
    tokens = passages(2, 12, 64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(choosing(model, 24, WAYS[way])(tokens).logits, model.eval()(tokens).logits)
    assert caught_mass(choosing(model, 24, WAYS[way]), tokens) == pytest.approx([1, 1])


@torch.no_grad()
def test_a_window_sees_nothing_older_and_the_others_do(model):
    """Layers of two see 2 * (k - 1) tokens back."""
    tokens = passages(1, 12, 64, torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 64
    for way, scores in WAYS.items():
        chooser = choosing(model, 4, scores)
        change = (chooser(tokens).logits - chooser(other).logits).abs()[0, 8:].max().item()
        assert change < 1e-6 if way == "window" else change > 1e-6, way


@torch.no_grad()
def test_the_exact_choice_catches_the_most(model):
    tokens = passages(4, 12, 64, torch.Generator().manual_seed(0))
    caught = {way: caught_mass(choosing(model, 4, scores), tokens, first=4)[0] for way, scores in WAYS.items()}
    assert caught["exact"] > max(caught["window"], caught["indexer"]) and min(caught.values()) > 0


def test_a_chooser_is_a_copy(model):
    chooser = choosing(model, 4, by_window)
    assert [attention.topk for attention in sparse_attentions(chooser)] == [4, 4]
    assert [attention.topk for attention in sparse_attentions(model)] == [24, 24]
    with torch.no_grad():
        chooser.head.weight.zero_()
    assert model.head.weight.abs().max() > 0 and "scores" not in vars(model.layers[0].attention.indexer)


def test_accuracy_of_an_untrained_model_is_chance(model):
    assert copy_accuracy(model, 12) == copy_accuracy(model, 12) < 0.1


def test_the_benchmark_runs_at_toy_size():
    tiny = dict(steps=1, warmup_steps=0, batch_size=2, seq_len=32, evaluate_every=1, evaluation_batches=1)
    short = replace(benchmark.DENSE, **tiny)
    warm_up = replace(short, index_stage="dense_warmup", optimizer="adamw")
    found = benchmark.run(3, benchmark.builtin_text(max_bytes=50_000), short, warm_up)
    assert found["seed"] == 3 and len(found["warm-up"]["indexer_loss"]) == 1
    assert all(found[way]["bits_per_byte"] > 0 for way in benchmark.WAYS)
    assert all(found["exact"]["mass"][0] >= found[way]["mass"][0] for way in ("window", "untrained"))


def test_the_stored_runs_show_little_to_gain_on_text():
    """What an indexer could gain over a window is a fiftieth of what a bad choice loses, in each of three seeds."""
    runs = json.loads(benchmark.RESULTS.read_text())["runs"]
    assert [run["seed"] for run in runs] == list(benchmark.SEEDS)
    for run in runs:
        loss = {way: run[way]["bits_per_byte"] for way in benchmark.WAYS}
        assert loss["dense"] < loss["exact"] < loss["window"] < loss["dense"] + 0.08
        assert loss["untrained"] > loss["window"] + 1 > loss["window"] + 30 * (loss["window"] - loss["exact"])
