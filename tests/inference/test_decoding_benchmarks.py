"""The scripts under benchmarks/ that measure decoding run, at toy size, and write what their docstrings promise."""

import json

from benchmarks import decoding, speculative_depth


def test_speculative_depth_runs_at_toy_size(tmp_path, capsys):
    results = tmp_path / "depth.jsonl"
    sizes = {"layers": 1, "steps": 2, "repeats": 1, "prompts": 2, "tokens": 4, "max-bytes": 20_000}
    sizes |= {"tokenizer": "bytes", "batch-size": 2, "seq-len": 32, "results": results}
    speculative_depth.main(*[word for name, value in sizes.items() for word in (f"--{name}", str(value))])
    (line,) = results.read_text().splitlines()
    found = json.loads(line)
    assert found["layers"] == 1 and 0 < found["teacher_forced_acceptance"]["temperature 0.8"] <= 1
    assert set(found["decoding"]) == {"temperature 0.8", "greedy"}
    assert "1 layers, temperature 0.8: plain / speculative:" in capsys.readouterr().out


def test_forced_acceptance_is_what_was_asked_for(tmp_path, capsys):
    results = tmp_path / "depth.jsonl"
    sizes = {"layers": 1, "steps": 0, "repeats": 1, "prompts": 1, "tokens": 8, "results": results}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    speculative_depth.main(*words, "--forced", "0", "1")
    found = json.loads(results.read_text())["forced"]
    assert {mode: [row["accepted"] for row in rows] for mode, rows in found.items()} == {
        "temperature 0.8": [0, 1],
        "greedy": [0, 1],
    }
    assert "1 layers, greedy, acceptance forced to 1.0: plain / speculative" in capsys.readouterr().out


def test_decoding_runs_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {"batches": 1, "layers": 1, "tokens": 3, "repeats": 2, "reading-mib": 1, "results": tmp_path / "out.json"}
    decoding.main(*[word for name, value in sizes.items() for word in (f"--{name}", str(value))])
    (found,) = json.loads((tmp_path / "out.json").read_text())["found"]
    assert found["limit"]["mebibytes_per_step"] > 1
    assert {"plain / compiled", "compiled step / limit"} < set(found["ratios"])
