"""The stored runs of benchmarks/hyper_connections.py, muon.py and engram.py say what is told of them."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def stored(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_gain_falls_with_sinkhorn_iterations():
    found = stored("hyper_connections_gain")["largest_and_smallest_sum"]
    largest = {name: max(pair[0] for pair in pairs) for name, pairs in found.items()}
    by_iterations = [largest[f"spread 12, {n} iterations"] for n in (1, 20, 100)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    assert by_iterations[0] > 3.9 and by_iterations[-1] < 1.3 and largest["identity + 0.1 noise"] > 30


def test_free_mixing_of_trained_models_has_a_gain_and_the_constrained_has_none():
    runs = stored("hyper_connections_training")["runs"]
    assert all(run["gain_and_smallest_sum"][0] > 100 for run in runs["free mixing"])
    assert all(run["gain_and_smallest_sum"][0] < 1.2 for run in runs["doubly stochastic"])


def test_v4s_muon_beats_the_others_by_more_than_the_seeds_and_the_steps_do_not_matter():
    found = stored("muon_optimizers")["validation_bits_per_byte"]
    bits = {name: row["by_seed"] for name, row in found.items()}
    assert max(bits["V4's Muon"]) < min(bits["Muon, experts by AdamW"]) < max(bits["AdamW"])
    mean = {name: statistics.mean(row) for name, row in bits.items()}
    assert abs(mean["V4's Muon"] - mean["V4's Muon, 5 steps"]) < statistics.stdev(bits["V4's Muon"])


def test_clip_bounds_logits_that_grow():
    runs = stored("muon_qk_clip")["runs"]
    largest = {name: [max(run["max_attention_logit"]) for run in rows] for name, rows in runs.items()}
    assert min(largest["observed only"]) > 80 and max(largest["clipped at 30"]) < 50


def test_division_between_experts_and_memory_shows_nothing():
    rows = [row["validation_bits_per_byte"] for row in stored("engram")["divisions"]]
    means = [statistics.mean(row) for row in rows]
    assert max(means) - min(means) < max(map(statistics.stdev, rows))


def test_a_memory_recalls_local_facts_and_experts_alone_do_not():
    table = stored("engram_facts")["recalled"]
    local = {name: [run["local"] for run in row["runs"]] for name, row in table.items()}
    assert max(local["64 experts"]) < 0.7 < 0.95 < min(local["48 experts"])
