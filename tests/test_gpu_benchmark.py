"""The script for a GPU's ten minutes runs at toy size on a CPU, keeps going after a failure, and says what it needs."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu


def test_every_section_runs_at_toy_size(tmp_path):
    """As a command: the checks of shapes in this process cannot be compiled."""
    results = tmp_path / "gpu.json"
    only = ["--only", "fp8", "pretraining", "decoding"]
    subprocess.run(
        [sys.executable, gpu.__file__, "--toy", "--results", results, *only], check=True, env=gpu.with_minids()
    )
    found = json.loads(results.read_text())["found"]
    assert not [section for section in found.values() if "error" in section]
    assert found["fp8"]["bf16 / fp8"]["low"] > 0
    assert found["pretraining"]["compiled, tokens per second"]["low"] > 0
    assert found["decoding"]["equal tokens"] == f"{gpu.TOY.tokens} of {gpu.TOY.tokens}"


def test_a_section_that_fails_leaves_its_error_and_the_others(tmp_path, monkeypatch):
    def broken(size, device):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "SECTIONS", {"broken": broken, "works": lambda size, device: {"width": size.width}})
    results = tmp_path / "gpu.json"
    gpu.main("--toy", "--results", str(results), "--only", "broken", "works")
    found = json.loads(results.read_text())["found"]
    assert found["broken"]["error"] == "RuntimeError: no such kernel"
    assert found["works"]["width"] == gpu.TOY.width


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main("--only", "fp8")
    assert "there is no GPU: --toy tries the script on a CPU" in capsys.readouterr().err
