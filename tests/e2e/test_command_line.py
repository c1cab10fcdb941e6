"""The commands of the README, an interruption, and a full disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minids.training.run import load_run

SMALL = "--preset nano --data text.jsonl --batch-size 2 --seq-len 32 --warmup-steps 2 --evaluate-every 5".split()
SMALL += "--evaluation-batches 1 --checkpoint-every 5 --device cpu".split()


def test_train_sample_export_import(folder, minids):
    status, out, err = minids("train", *SMALL, "--steps", "10")
    assert status == 0, err
    assert "bits per byte" in out and "python -m minids sample runs/nano" in out
    assert sorted(p.name for p in Path("runs/nano").iterdir()) == [
        "checkpoints", "loss.png", "metrics.jsonl", "run.json", "tokenizer.json",
    ]  # fmt: skip
    metrics = [json.loads(line) for line in Path("runs/nano/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 11))
    assert "validation_bits_per_byte" in metrics[4] and "validation_bits_per_byte" in metrics[9]
    assert Path("runs/nano/loss.png").read_bytes().startswith(b"\x89PNG")

    status, out, _ = minids("sample", "runs/nano", "--prompt", "one two", "--max-new-tokens", 20)
    assert status == 0 and out.startswith("one two")
    assert minids("sample", "--prompt", "one two", "--max-new-tokens", 20)[1] == out  # the newest run, the same seed
    greedy = ("--prompt", "one", "--max-new-tokens", 20, "--temperature", 0)
    plain, fast = minids("sample", *greedy)[1], minids("sample", *greedy, "--speculative")[1]
    assert fast.startswith(plain.rstrip("\n")) and "% of the drafts accepted" in fast

    assert minids("export", "runs/nano", "exported")[0] == 0
    assert minids("import", "exported", "back")[0] == 0
    ours, theirs = load_run(Path("runs/nano"))[0], load_run(Path("runs/back"))[0]
    tokens = torch.randint(256, (1, 20))
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert minids("sample", "runs/back", *greedy)[1] == plain


def test_a_second_run_takes_another_name_and_bpe_works(folder, minids):
    assert minids("train", *SMALL, "--steps", "1")[0] == 0
    assert minids("train", *SMALL, "--steps", "1", "--tokenizer", "bpe:300")[0] == 0
    model, tokenizer = load_run(Path("runs/nano-2"))
    assert model.config.vocab_size == tokenizer.vocab_size <= 300
    assert minids("train", *SMALL, "--steps", "1", "--tokenizer", "runs/nano-2")[0] == 0
    assert Path("runs/nano-3/tokenizer.json").read_text() == Path("runs/nano-2/tokenizer.json").read_text()


def test_the_interactive_prompt(folder, minids, monkeypatch):
    assert minids("train", *SMALL, "--steps", "1")[0] == 0
    answers = iter(["one two", "x" * 5000, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    status, out, _ = minids("sample", "runs/nano", "--max-new-tokens", 5)
    assert status == 0 and "one two" in out and "the context holds 4096" in out


def test_an_existing_name_is_not_overwritten(folder, minids):
    assert minids("train", *SMALL, "--steps", "1", "--name", "mine")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    status, _, err = minids("train", *SMALL, "--steps", "1", "--name", "mine")
    assert status == 2 and "runs/mine exists" in err
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and limits")
def test_ctrl_c_saves_and_says_how_to_go_on(folder):
    command = [sys.executable, "-m", "minids", "train", *SMALL, "--steps", "100000"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics = folder / "runs/nano/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    step = int(out.split("Stopped after step ")[1].split()[0])
    assert "python -m minids train --resume runs/nano" in out
    assert [p.name for p in sorted((folder / "runs/nano/checkpoints").iterdir())][-1] == f"step-{step:08d}"
    assert metrics.read_text().count("\n") == step


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and limits")
def test_a_full_disk_gets_one_line_and_keeps_what_was_there(folder):
    """No file may grow beyond 300 kB, which the first checkpoint does."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "from minids.cli.main import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", limited, "train", *SMALL, "--steps", "10"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2, finished.stderr
    last = finished.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("minids: ") and "Traceback" not in finished.stderr
    assert list((folder / "runs/nano/checkpoints").iterdir()) == []
