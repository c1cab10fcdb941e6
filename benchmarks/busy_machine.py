"""Training on a machine that others use too: what OpenMP's waiting costs alone, and beside three busy processes.

    python benchmarks/busy_machine.py --repeats 5      about six minutes of all cores

torch's threads meet at the end of each parallel loop. By default a thread that waits there spins, and takes the
processor from the thread that it waits for when there are fewer free processors than threads. `OMP_WAIT_POLICY=passive`
lets it sleep. Each measurement is a process of its own, since OpenMP reads the variable once, when torch loads: some
steps of the `tiny` preset, then steps per second for `--seconds`. The settings take turns. Ratios are medians with the
smallest and largest. Results go to benchmarks/results/busy_machine.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "busy_machine.json"
SETTINGS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spins 1,000 times": {"GOMP_SPINCOUNT": "1000"},
}
BUSY = [sys.executable, "-c", "while True: pass"]


def steps_per_second(seconds: float) -> float:
    """Train the `tiny` preset on random tokens for `seconds`; return steps per second, after three steps."""
    import torch

    from minids.config import ModelConfig
    from minids.data.batches import Batch
    from minids.model.transformer import MiniDS
    from minids.training.loss import LossDenominators, losses

    torch.manual_seed(0)
    model = MiniDS(ModelConfig.preset("tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(model.config.vocab_size, (4, 257))
    batch = Batch(tokens, torch.zeros_like(tokens), torch.zeros_like(tokens))
    denominators = LossDenominators.of(batch)
    began, steps = 0.0, -3
    while steps <= 0 or time.perf_counter() - began < seconds:
        if steps == 0:
            began = time.perf_counter()
        losses(model, model(tokens[:, :-1], mtp=True), batch, denominators).total(0.3).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps / (time.perf_counter() - began)


def measure(setting: dict[str, str], neighbours: int, seconds: float) -> float:
    """Return the steps per second of a process of its own with `setting`, beside `neighbours` busy processes."""
    cleared = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    others = [subprocess.Popen(BUSY) for _ in range(neighbours)]
    try:
        command = [sys.executable, __file__, "--child", "--seconds", str(seconds)]
        return float(subprocess.run(command, env=cleared | setting, check=True, capture_output=True, text=True).stdout)
    finally:
        for other in others:
            other.kill()
            other.wait()


def spread(figures: list[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--neighbours", type=int, default=3, help="busy processes beside the training")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments or None)
    if options.child:
        print(steps_per_second(options.seconds))
        return
    from minids.course.experiment import record

    load = os.getloadavg()
    rounds = [
        {
            name: {n: measure(setting, n, options.seconds) for n in (0, options.neighbours)}
            for name, setting in SETTINGS.items()
        }
        for _ in range(options.repeats)
    ]
    found = {
        name: {
            "alone / default alone": spread([r[name][0] / r["default"][0] for r in rounds]),
            "busy / default alone": spread([r[name][options.neighbours] / r["default"][0] for r in rounds]),
            "steps per second alone": spread([r[name][0] for r in rounds]),
            "steps per second beside others": spread([r[name][options.neighbours] for r in rounds]),
        }
        for name in SETTINGS
    }
    print(json.dumps(found, indent=1))
    settings = {"neighbours": options.neighbours, "seconds": options.seconds, "load_average": [load, os.getloadavg()]}
    record(options.results, **settings, found=found)


if __name__ == "__main__":
    main()
