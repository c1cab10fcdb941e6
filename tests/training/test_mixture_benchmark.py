"""The larger run of chapter 05 compares a mixture with a dense model at equal work, and stores what it trained."""

import json
from dataclasses import replace

import pytest

from benchmarks import mixture_on_text
from benchmarks.mixture_on_text import DENSE_TWIN, MIXTURE, RESULTS, SEEDS
from minids.config import ModelConfig
from minids.cost import matmul_parameters, num_parameters
from minids.course.experiment import builtin_text
from minids.training.pretrain import Recipe


def test_the_dense_model_does_at_least_the_work_of_the_mixture():
    dense, mixture = matmul_parameters(DENSE_TWIN), matmul_parameters(MIXTURE)
    assert mixture <= dense <= 1.02 * mixture
    assert num_parameters(MIXTURE) > 8 * num_parameters(DENSE_TWIN)


def test_what_is_stored_is_of_these_models_with_equal_recipes():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["variants"]
    configs = {name: ModelConfig.from_dict(variant["config"]) for name, variant in found.items()}
    assert configs == {"dense": DENSE_TWIN, "mixture": MIXTURE}
    recipes = [Recipe(**variant["recipe"]) for variant in found.values()]
    assert replace(recipes[0], learning_rate=recipes[1].learning_rate) == recipes[1]
    for variant in found.values():
        rates = variant["screened"]["bits_per_byte"]
        assert str(variant["recipe"]["learning_rate"]) == min(rates, key=rates.__getitem__)
        assert [run["seed"] for run in variant["runs"]] == list(SEEDS) and variant["screened"]["seed"] not in SEEDS


@pytest.mark.parametrize("config", [DENSE_TWIN, MIXTURE], ids=["dense", "mixture"])
def test_a_run_is_evaluated_after_every_fifth_of_its_steps(config, monkeypatch):
    monkeypatch.setattr(mixture_on_text, "builtin_text", lambda *_: builtin_text("bytes", 100_000))
    run = mixture_on_text.train(config, Recipe(steps=10, batch_size=2, seq_len=32, evaluation_batches=2))
    assert run["tokens"] == [64 * step for step in (2, 4, 6, 8, 10)]
    assert run["bits_per_byte"][-1] < run["bits_per_byte"][0]


def test_the_stored_gain_exceeds_what_seeds_change():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["variants"]
    ends = {name: [run["bits_per_byte"][-1] for run in variant["runs"]] for name, variant in found.items()}
    spread = max(max(bits) - min(bits) for bits in ends.values())
    assert min(ends["dense"]) - max(ends["mixture"]) > spread
    seconds = {name: sum(run["cpu_seconds"] for run in variant["runs"]) for name, variant in found.items()}
    assert round(seconds["mixture"] / seconds["dense"], 2) == 1.37, "chapter 05: 37 % more CPU seconds"
