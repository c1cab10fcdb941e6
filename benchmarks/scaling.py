"""How much faster several processes train than one: the same batch shared out (strong), or a batch for each (weak).

    python benchmarks/scaling.py                                      1, 2 and 4 processes, preset nano
    python benchmarks/scaling.py --preset small --processes 1 2 4 8   on a machine with 8 GPUs
    python benchmarks/scaling.py --parallel ep={n}                    experts shared out instead of the data

Every cell is a run of `torchrun -m minids train`, the first steps left out. The efficiency is the tokens per second of
n processes, over n times those of one (weak) or of the same batch on one (strong); "exposed" is the share of its time
in which rank 0 waited for others (on CPUs). More processes than cores or GPUs show that the parts fit together, not how
fast they are: the table says so. Results: benchmarks/results/scaling.json, and their figure beside it.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from minids.course import plots
from minids.course.experiment import record

RESULTS = Path(__file__).parent / "results" / "scaling.json"
WARM_UP = 4  # steps


def measure(processes: int, batch_size: int, arguments: argparse.Namespace) -> dict:
    """Median tokens per second of all processes together, with the quartiles, and of the exposed communication."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "minids", "train", "--preset", arguments.preset, "--name", "run", "--tokenizer", "bytes"]
    command += ["--data", "stdlib", "--max-bytes", "2000000", "--seq-len", str(arguments.seq_len)]
    command += ["--batch-size", str(batch_size), "--steps", str(arguments.steps), "--warmup-steps", "2"]
    command += ["--evaluate-every", "100000", "--evaluation-batches", "1", "--checkpoint-every", "100000"]
    command += ["--parallel", arguments.parallel.format(n=processes)]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(finished.stdout + finished.stderr)
        lines = Path(folder, "runs/run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines[WARM_UP:]]
    low, median, high = statistics.quantiles((step["tokens_per_second"] for step in steps), n=4)
    row = {"processes": processes, "batch_size": batch_size, "tokens_per_second": median, "quartiles": [low, high]}
    if "exposed_communication" in steps[0]:
        row["exposed_communication"] = statistics.median(step["exposed_communication"] for step in steps)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=8, help="of all together (strong), or of each (weak)")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--parallel", default="dp={n}", help="the layout of n processes")
    arguments = parser.parse_args()
    devices, load = torch.cuda.device_count() or os.cpu_count(), os.getloadavg()[0]
    print(f"{devices} {'GPUs' if torch.cuda.is_available() else 'CPU cores'} here")
    print(f"{'scaling':10}{'processes':>10}{'batch':>8}{'tokens/s':>12}{'efficiency':>12}{'exposed':>9}")
    measured = functools.cache(functools.partial(measure, arguments=arguments))  # one process is weak and strong
    rows = []
    for kind in ("strong", "weak"):
        for processes in arguments.processes:
            batch_size = arguments.batch_size * (processes if kind == "weak" else 1)
            row = {"kind": kind} | measured(processes, batch_size)
            first = next((each for each in rows if each["kind"] == kind), row)
            ideal = first["tokens_per_second"] * processes / first["processes"]
            row |= {"efficiency": row["tokens_per_second"] / ideal, "crowded": processes > devices}
            rows.append(row)
            exposed = f"{row['exposed_communication']:.0%}" if "exposed_communication" in row else ""
            print(f"{kind:10}{processes:>10}{batch_size:>8}{row['tokens_per_second']:>12,.0f}", end="")
            print(f"{row['efficiency']:>12.0%}{exposed:>9}", end="")
            print("  more processes than devices: no speed" * row["crowded"], flush=True)
    record(RESULTS, devices=devices, load_before=load, arguments=vars(arguments), rows=rows)
    draw(rows, devices).savefig(RESULTS.with_suffix(".png"), dpi=120)


def draw(rows: list[dict], devices: int) -> Figure:
    """Tokens per second by processes, beside what n times one process would be."""
    series = {}
    for kind in ("strong", "weak"):
        mine = [row for row in rows if row["kind"] == kind]
        series[kind] = ([row["processes"] for row in mine], [row["tokens_per_second"] for row in mine])
    x, y = series["strong"]
    series["ideal"] = (x, [y[0] * processes / x[0] for processes in x])
    return plots.lines(series, "processes", "tokens per second", f"{devices} devices", marked=True)


if __name__ == "__main__":
    main()
