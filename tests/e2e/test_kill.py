"""Killed with SIGKILL anywhere, also while a checkpoint is being written, and resumed: the same curve, bit for bit."""

import json
import os
import signal
import subprocess
import sys

import pytest
from training.helpers import counting_text

ARGUMENTS = "train --preset nano --steps 9 --batch-size 2 --seq-len 32 --warmup-steps 2 --evaluate-every 4"
ARGUMENTS += " --evaluation-batches 1 --checkpoint-every 2 --device cpu"
# Runs the command line with one function replaced by itself and, at the n-th call, SIGKILL before or after it.
DRIVER = """
import importlib, os, signal, sys
module, name, n, when = sys.argv[1:5]
module = importlib.import_module(module)
original, calls = getattr(module, name), 0
def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(n) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if calls == int(n) and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(module, name, deadly)
sys.argv = ["minids", *sys.argv[5:]]
from minids.cli.main import main
sys.exit(main())
"""
KILLS = {
    "in the third step": ("minids.training.pretrain", "losses", 3, "before"),
    "while writing the second checkpoint's tensors": ("minids.files", "save_file", 5, "before"),
    "before the second checkpoint is on disk": ("minids.files", "flush_to_disk", 10, "before"),
    "before the second checkpoint is renamed": ("minids.files", "flush_to_disk", 12, "after"),
    "after the second checkpoint is renamed": ("minids.files", "flush_to_disk", 14, "before"),
    "while deleting an old checkpoint": ("minids.training.loop", "remove_checkpoint", 1, "before"),
}


def run(folder, *command, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, **options
    )


def curve(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    lines = (json.dumps({"text": document.text, "domain": document.domain}) for document in counting_text())
    (folder / "text.jsonl").write_text("\n".join(lines))
    finished = run(folder, "-m", "minids", *ARGUMENTS.split(), "--data", "text.jsonl", "--name", "undisturbed")
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("when", KILLS)
def test_the_curve_goes_on_bit_for_bit(folder, when):
    name = when.replace(" ", "-")
    kill = [str(part) for part in KILLS[when]]
    killed = run(folder, "-c", DRIVER, *kill, *ARGUMENTS.split(), "--data", "text.jsonl", "--name", name)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(curve_so_far(folder / "runs" / name)) < 9
    resumed = run(folder, "-m", "minids", "train", "--resume", f"runs/{name}", "--device", "cpu")
    assert resumed.returncode == 0, resumed.stderr
    assert not list((folder / "runs" / name / "checkpoints").glob(".*"))
    assert curve(folder / "runs" / name / "metrics.jsonl") == curve(folder / "runs/undisturbed/metrics.jsonl")


def curve_so_far(directory):
    path = directory / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []
