"""benchmarks/compressed_attention.py runs at toy size; what it stored shows what its docstring says."""

import json

import pytest

from benchmarks import compressed_attention as benchmark

CHANCE = 1 / benchmark.VOCAB
WAYS = ("newest", "untrained", "warmed up")


def test_it_runs_at_toy_size_and_writes_every_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "STEPS", {"window": 1, "hca": 2, "csa": 2, "warm-up": 2})
    monkeypatch.setattr(benchmark, "BATCH", 2)
    benchmark.main("--seeds", "3", "--results", str(tmp_path / "out.json"))
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert run["seed"] == 3 and run["warm-up"].keys() == {"first", "last"}
    for kind in ("window", "hca", "csa"):
        assert 0 <= run[kind]["accuracy"] < 5 * CHANCE and 3 < run[kind]["loss"] < 6
    for way in WAYS:
        assert list(run[way]) == [str(k) for k in benchmark.CHOSEN]
        assert all(0 <= accuracy <= 1 for accuracy in run[way].values())
    assert '"seed": 3' in capsys.readouterr().out


def test_the_stored_runs_tell_the_kinds_and_the_choices_apart():
    """Three seeds; the spread of each is far below the distance between them. Chance is 1 / 64 = 0.016.

    hca and csa are still learning when training ends, so their accuracies are no measure of which is better. With one
    of up to 11 entries csa keeps most of its accuracy, if the indexer was warmed up; with four it keeps all of it.
    """
    stored = json.loads(benchmark.RESULTS.read_text())
    runs = stored["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2] and stored["steps"] == benchmark.STEPS
    for run in runs:
        assert run["window"]["accuracy"] < 2 * CHANCE
        assert run["hca"]["accuracy"] > 0.4 and run["csa"]["accuracy"] > 0.7
        assert max(run["newest"].values()) < 2 * CHANCE
        assert run["untrained"]["1"] < 0.25 < 0.6 < run["warmed up"]["1"]
        assert run["warmed up"]["4"] == pytest.approx(run["csa"]["accuracy"], abs=0.01)
        assert run["warm-up"]["last"] < 0.1 * run["warm-up"]["first"]
