"""What training in FP8 costs in loss, and what it gains in speed where the hardware has it.

    python benchmarks/fp8.py loss --steps 400 --seeds 0 1 2
    python benchmarks/fp8.py speed                             # needs a Hopper GPU

`loss` trains the preset `tiny` by the default recipe in float32 and in FP8 (V3's, emulated), with the same seeds, and
reports the validation loss of each. `speed` runs one 4096-wide layer forward and backward in bfloat16 and in FP8,
taking turns, and reports the ratios. Both write to benchmarks/results/.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from minids.config import ModelConfig
from minids.course.experiment import builtin_text, record, trial
from minids.fp8.linear import Fp8Linear
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results"


def loss(steps: int, seeds: list[int]) -> None:
    """Bits per byte of held-out text after training in each precision."""
    data = builtin_text("bpe:2048", max_bytes=5_000_000)
    config = ModelConfig.preset("tiny").replace(vocab_size=data.tokenizer.vocab_size)
    runs: dict[str, list[float]] = {"fp32": [], "fp8": []}
    for seed in seeds:
        for precision, found in runs.items():
            recipe = Recipe(steps=steps, precision=precision, seed=seed, evaluate_every=steps)
            found.append(trial(config, data, recipe).validation)
            print(f"seed {seed}, {precision}: {found[-1]:.4f} bits per byte", flush=True)
    gaps = [100 * (fp8 / fp32 - 1) for fp32, fp8 in zip(runs["fp32"], runs["fp8"], strict=True)]
    spread = 100 * statistics.stdev(runs["fp32"]) / statistics.mean(runs["fp32"]) if len(seeds) > 1 else None
    print(f"gaps in per cent: {[round(gap, 3) for gap in gaps]}; spread of float32 between seeds: {spread}")
    record(
        RESULTS / "fp8_loss.json", seeds=seeds, recipe=asdict(recipe), config=config.to_dict(),
        validation_bits_per_byte=runs, gap_percent=gaps, fp32_spread_percent=spread,
    )  # fmt: skip


def speed(repeats: int, tokens: int = 8192, width: int = 4096) -> None:
    """Milliseconds of a layer's forward and backward pass."""
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layers = {
        "bf16": nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16),
        "fp8": Fp8Linear(nn.Linear(width, width, bias=False, device="cuda")),
    }
    print("fp8 runs as:", layers["fp8"].computes_in)
    gradient = torch.randn_like(x)

    def step(layer: nn.Module) -> None:
        layer(x).backward(gradient)

    times: dict[str, list[float]] = {name: [] for name in layers}
    for layer in layers.values():
        step(layer)
    for _ in range(repeats):
        for name, layer in layers.items():
            times[name].append(milliseconds(lambda layer=layer: step(layer)))
    ratios = sorted(bf16 / fp8 for bf16, fp8 in zip(times["bf16"], times["fp8"], strict=True))
    print(f"bf16 / fp8: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    record(RESULTS / "fp8_speed.json", tokens=tokens, width=width, milliseconds=times, ratios=ratios)


def milliseconds(work: Callable[[], None]) -> float:
    """Of the GPU, over ten rounds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["loss", "speed"])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.question == "loss":
        torch.set_num_threads(1)
        loss(arguments.steps, arguments.seeds)
    elif torch.cuda.is_available():
        speed(arguments.repeats)
    else:
        parser.error("speed needs a CUDA device")


if __name__ == "__main__":
    main()
