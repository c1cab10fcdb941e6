"""A mixture of experts against a dense model on text, at equal work per token: the larger run of chapter 05.

    python benchmarks/mixture_on_text.py      half an hour on two cores

A mixture of 128 experts, 4 per token and a shared one, against a dense model with as many activated parameters. What is
limited is what the weights can hold, not the text: few activated parameters, each byte read once, and bytes, so that no
vocabulary holds words. Each variant gets the best of four learning rates, found in a fifth of the steps on a seed that
is not among the others. The text is that of Python's library, so other Python versions give slightly other figures.
Results go to benchmarks/results/mixture_on_text.json.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch

from minids.config import ModelConfig
from minids.cost import matmul_parameters, num_parameters
from minids.course.experiment import builtin_text, record, trial
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results" / "mixture_on_text.json"
MIXTURE = ModelConfig.preset(
    "nano", hidden_size=64, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=160,
    moe_intermediate_size=32, n_routed_experts=128, num_experts_per_tok=4, n_group=1, topk_group=1,
    num_nextn_predict_layers=0,
)  # fmt: skip
DENSE_TWIN = MIXTURE.replace(first_k_dense_replace=3, intermediate_size=192)  # as wide as five experts and a router
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
SCREENING_SEED, SEEDS = 9, (0, 1, 2)


def compare(steps: int, seeds: Sequence[int] = SEEDS) -> dict:
    """Train both with the best of their learning rates; return what was found of each."""
    recipe = Recipe(steps=steps, batch_size=32, seq_len=128, warmup_steps=steps // 20, evaluation_batches=100)
    short = replace(recipe, steps=steps // 5, warmup_steps=steps // 100, seed=SCREENING_SEED)
    found = {}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for name, config in {"dense": DENSE_TWIN, "mixture": MIXTURE}.items():
            screening = pool.map(train, repeat(config), [replace(short, learning_rate=rate) for rate in RATES])
            rates = {rate: run["bits_per_byte"][-1] for rate, run in zip(RATES, screening, strict=True)}
            chosen = replace(recipe, learning_rate=min(RATES, key=rates.__getitem__))
            runs = pool.map(train, repeat(config), [replace(chosen, seed=seed) for seed in seeds])
            found[name] = {
                "parameters": num_parameters(config),
                "active": num_parameters(config, active=True),
                "multiplied": matmul_parameters(config),
                "screened": {"seed": SCREENING_SEED, "steps": short.steps, "bits_per_byte": rates},
                "runs": [{"seed": seed} | run for seed, run in zip(seeds, runs, strict=True)],
                "config": config.to_dict(),
                "recipe": asdict(chosen),
            }
            print(name, *(f"{run['bits_per_byte'][-1]:.4f}" for run in found[name]["runs"]), flush=True)
    return found


def train(config: ModelConfig, recipe: Recipe) -> dict:
    """Bits per byte after every fifth of the steps, and the CPU seconds of training with its evaluations."""
    torch.set_num_threads(1)
    began = time.process_time()
    recipe = replace(recipe, evaluate_every=max(recipe.steps // 5, 1))
    metrics = trial(config, builtin_text("bytes", 30_000_000), recipe).metrics
    validated = [m for m in metrics if "validation_bits_per_byte" in m]
    return {
        "tokens": [m["tokens"] for m in validated],
        "bits_per_byte": [m["validation_bits_per_byte"] for m in validated],
        "cpu_seconds": round(time.process_time() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2300, help="steps of each run, of 4,096 bytes")
    record(RESULTS, seeds=list(SEEDS), variants=compare(parser.parse_args().steps))


if __name__ == "__main__":
    main()
