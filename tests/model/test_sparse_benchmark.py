"""benchmarks/sparse_attention.py runs at toy size; what it stored shows what its docstring and the chapter say."""

import json

import pytest

from benchmarks import sparse_attention as benchmark

WAYS = ("window", "untrained", "exact", "warmed up")


def test_it_runs_at_toy_size_and_writes_every_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "STEPS", {"dense": 2, "warm-up": 2, "sparse": 1})
    monkeypatch.setattr(benchmark, "BATCH", 2)
    benchmark.main("--seeds", "3", "--results", str(tmp_path / "out.json"))
    stored = json.loads((tmp_path / "out.json").read_text())
    (run,) = stored["runs"]
    assert (
        run["seed"] == 3 and run["dense"]["mass"] == pytest.approx([1, 1]) and len(run["warm-up"]["indexer_loss"]) == 2
    )
    for way in WAYS:
        for k in map(str, benchmark.CHOSEN):
            assert 0 <= run[way][k]["accuracy"] <= 1 and len(run[way][k]["mass"]) == 2
    assert all(mass <= run["exact"]["4"]["mass"][0] + 1e-6 for way in WAYS for mass in run[way]["4"]["mass"][:1])
    assert {"loss", "indexer_loss", "accuracy", "window"} <= run["sparse"].keys()
    assert "seed 3: dense" in capsys.readouterr().out


@pytest.mark.parametrize("k, warmed_up", [("4", 0.9), ("8", 0.99)])
def test_the_stored_runs_tell_the_ways_apart(k, warmed_up):
    """Chance is 1 / 64 = 0.016. Three seeds; the spread of each way is far below the distance between them.

    In seed 1 the heads of the second layer attend to different tokens: the four tokens that all heads share catch 0.83
    of the attention at best, and the indexer's 0.72, so its accuracy is 0.94 in place of 1.00.
    """
    stored = json.loads(benchmark.RESULTS.read_text())
    assert len(stored["runs"]) == 3
    accuracy = {way: [run[way][k]["accuracy"] for run in stored["runs"]] for way in WAYS}
    assert max(accuracy["window"]) < 0.025 and max(accuracy["untrained"]) < 0.2
    assert min(accuracy["exact"]) > 0.99 and min(accuracy["warmed up"]) > warmed_up
    for run in stored["runs"]:
        assert run["warm-up"]["indexer_loss"][-1] < 0.2 * run["warm-up"]["indexer_loss"][0]
        assert run["sparse"]["accuracy"] > 0.9 and run["sparse"]["window"]["accuracy"] < 0.025
