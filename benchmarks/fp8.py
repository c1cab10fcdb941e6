"""What training in FP8 costs in loss, against FP32 and against BF16.

    python benchmarks/fp8.py --steps 400 --seeds 0 1 2 --precisions fp32 bf16 fp8

Trains the preset `tiny` by the default recipe in every precision (FP8 is V3's, emulated), with the same seeds, and
reports the validation losses and the gaps to FP32 and to BF16. Writes benchmarks/results/fp8_loss.json. The speed of
FP8 layers is measured by benchmarks/gpu.py, on a Hopper GPU.
"""

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from minids.config import ModelConfig
from minids.course.experiment import builtin_text, record, trial
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results" / "fp8_loss.json"
PRECISIONS = ("fp32", "bf16", "fp8")


def gaps(runs: dict[str, list[float]]) -> dict[str, list[float]]:
    """Gaps in per cent of each lower precision to each higher one, of each seed."""
    present = [precision for precision in PRECISIONS if precision in runs]
    return {
        f"{low} to {high}": [100 * (a / b - 1) for a, b in zip(runs[low], runs[high], strict=True)]
        for i, high in enumerate(present)
        for low in present[i + 1 :]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds, the same in every precision")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="precisions to compare")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = builtin_text("bpe:2048", max_bytes=5_000_000)
    config = ModelConfig.preset("tiny").replace(vocab_size=data.tokenizer.vocab_size)
    runs: dict[str, list[float]] = {precision: [] for precision in arguments.precisions}
    for seed in arguments.seeds:
        for precision, found in runs.items():
            recipe = Recipe(steps=arguments.steps, precision=precision, seed=seed, evaluate_every=arguments.steps)
            found.append(trial(config, data, recipe).validation)
            print(f"seed {seed}, {precision}: {found[-1]:.4f} bits per byte", flush=True)
    for name, values in gaps(runs).items():
        print(f"{name}, %: {', '.join(f'{value:+.2f}' for value in values)}; mean {statistics.mean(values):+.2f}")
    spread = {name: 100 * statistics.stdev(found) / statistics.mean(found) for name, found in runs.items()
              if len(found) > 1}  # fmt: skip
    record(
        RESULTS, seeds=arguments.seeds, recipe=asdict(recipe), config=config.to_dict(),
        validation_bits_per_byte=runs, gap_percent=gaps(runs), spread_percent=spread,
    )  # fmt: skip


if __name__ == "__main__":
    main()
