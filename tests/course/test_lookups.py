"""The look-up task has one answer, its models are equally large and attend as the package does; the benchmarks run."""

import json

import pytest
import torch

from benchmarks import attention, lookups
from minids.course.lookups import ATTRIBUTES, ITEMS, KINDS, VALUES, LookupModel, draw_lookups, lookup_accuracy
from minids.model.kv_cache import AttentionContext
from minids.model.rope import rotations


def test_each_query_names_one_item_and_asks_for_another_attribute():
    drawn = draw_lookups(500, torch.Generator().manual_seed(0))
    assert drawn.items.shape == (500, ITEMS, ATTRIBUTES) and drawn.items.max() < VALUES
    assert (drawn.given != drawn.asked).all()
    for items, given, value, asked, answer in zip(*drawn, strict=True):
        (found,) = (items[:, given] == value).nonzero()
        assert items[found.item(), asked] == answer


def test_the_models_are_equally_large():
    sizes = [sum(weight.numel() for weight in LookupModel(config).parameters()) for config in KINDS.values()]
    assert max(sizes) < 1.002 * min(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_the_last_token_equals_the_layers(kind):
    model, x = LookupModel(KINDS[kind]).double(), torch.randn(3, 5, 64, dtype=torch.float64)
    positions = torch.zeros(3, 5, dtype=torch.int64)
    rotation = rotations(KINDS[kind], positions, model.attention.rope_dim, x.dtype)
    context = AttentionContext(torch.arange(3)[:, None], positions, rotation)
    torch.testing.assert_close(model.attend(x), model.attention(x, context)[:, -1], rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_accuracy():
    config = KINDS["MLA, rank 8 + 8"]
    assert lookup_accuracy(config, seed=1, steps=3, batch=8) == lookup_accuracy(config, seed=1, steps=3, batch=8)


def test_the_lookup_benchmark_runs_at_toy_size(tmp_path, capsys):
    results = tmp_path / "lookups.json"
    lookups.main("--kinds", "MQA", "MHA", "--seeds", "0", "1", "--steps", "1", "--results", str(results))
    found = json.loads(results.read_text())["found"]
    assert {kind: run["cached_values"] for kind, run in found.items()} == {"MQA": 16, "MHA": 128}
    assert all(len(run["accuracy"]) == 2 for run in found.values())
    assert "MQA: 16 values" in capsys.readouterr().out


def test_the_attention_benchmark_adds_to_its_results(tmp_path, capsys):
    results = str(tmp_path / "attention.json")
    for variant in ("MQA", "MLA"):
        attention.main("--variants", variant, "--seeds", "0", "--steps", "1", "--results", results)
    found = json.loads((tmp_path / "attention.json").read_text())
    assert list(found["configs"]) == list(found["validation_bits_per_byte"]) == ["MQA", "MLA"]
