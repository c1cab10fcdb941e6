"""`minids bench`: compare this package with transformers, and with itself, in one run each.

Both sides have the same weights and batches (side_by_side.py). What is measured: bench_training.py, bench_decoding.py,
and here the time until a command can begin.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from json import dumps
from typing import Literal

import torch
from tqdm import tqdm
from tyro.conf import Positional

from minids.cli import bench_decoding, bench_training
from minids.cli.options import call
from minids.cli.side_by_side import row_of


def startup(repeats: int) -> list[dict]:
    """CPU seconds until a command can begin, over those of `import torch`; each in a process of its own."""
    commands = {
        "minids --help": ["-m", "minids", "--help"],
        "minids cost v3": ["-m", "minids", "cost", "v3"],
        "minids train --help": ["-m", "minids", "train", "--help"],
    }

    def start(arguments: list[str]) -> float:
        began = os.times()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        ended = os.times()
        return ended.children_user + ended.children_system - began.children_user - began.children_system

    rows = []
    for name, arguments in commands.items():
        ratios = [start(arguments) / start(["-c", "import torch"]) for _ in range(repeats + 1)]
        rows.append(row_of(f"start-up, {name} / import torch", ratios[1:], "<= 1.6"))
    return rows


Question = Literal[
    "train",
    "compiled-train",
    "memory",
    "loss",
    "decode",
    "compiled",
    "prefill",
    "experts",
    "context",
    "speculative",
    "startup",
]
QUESTIONS: dict[Question, Callable[[int], list[dict]]] = {
    "train": bench_training.training,
    "compiled-train": bench_training.compiled_training,
    "memory": bench_training.peak_memory,
    "loss": bench_training.memory_of_loss,
    "decode": bench_decoding.decoding,
    "compiled": bench_decoding.compiled_decoding,
    "prefill": bench_decoding.prefill,
    "experts": bench_training.number_of_experts,
    "context": bench_decoding.context_length,
    "speculative": bench_decoding.speculation,
    "startup": startup,
}


def run(command: str, arguments: list[str]) -> None:
    call(bench_command, command, arguments)


def bench_command(
    names: Positional[tuple[Question, ...]] = tuple(QUESTIONS), repeats: int = 7, json: bool = False
) -> None:
    """Compare this package with transformers, and print ratios with their spread.

    Args:
        names: Measurements to run; `speculative` uses the newest run.
        repeats: Number of measurements of both sides in alternation; raise it on a busy machine.
        json: Print the figures as JSON, for a program to read.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2, to measure a spread")
    torch.set_num_threads(1)
    rows = [row for name in tqdm(names, disable=json) for row in QUESTIONS[name](repeats)]
    if torch.cuda.is_available():
        rows += bench_training.cuda_training(repeats)
    machine = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if json:
        print(dumps({"machine": machine, "rows": rows}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("| what | figure | smallest to largest | aim |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['median']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['aim']} |")
