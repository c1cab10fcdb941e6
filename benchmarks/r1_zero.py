"""R1-Zero in miniature over three seeds, and what moves it: the runs that chapters/09_r1_zero.ipynb reads.

    python benchmarks/r1_zero.py                            everything: about 25 minutes of one core
    python benchmarks/r1_zero.py --only "recipe, seed 0"    one run, in place of what the results hold of it

A seed decides the web, the base model and the reinforcement learning. The recipe runs with seeds 0, 1 and 2; the
variants change one thing each and start from the base of seed 0. All take 60 steps of 256 answers and are judged on the
same 240 held-out problems, 4 answers to each; intervals are 95 %, by the spread between problems. Base models are kept
in runs/r1_zero and not trained twice. Results go to benchmarks/results/r1_zero.json.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from minids.course.experiment import record
from minids.model.transformer import MiniDS
from minids.reasoning.rewards import R1_ZERO_WEIGHTS
from minids.reasoning.rl import RLRecipe, RLTrainer
from minids.reasoning.rollout import Sample, answer
from minids.reasoning.tasks import TraceTask
from minids.reasoning.zero import BASE_RECIPE, base_trainer, load_base, rule_reward

TASK = TraceTask()
RESULTS = Path(__file__).parent / "results" / "r1_zero.json"
BASES = Path(__file__).parents[1] / "runs" / "r1_zero"
FORMAT_ONLY = {"format": 1.0}

RUNS: dict[str, tuple[RLRecipe, dict[str, float]]] = {
    f"recipe, seed {seed}": (RLRecipe(seed=seed), dict(R1_ZERO_WEIGHTS)) for seed in (0, 1, 2)
} | {
    "format only": (RLRecipe(), FORMAT_ONLY),
    "64 groups of 4": (RLRecipe(prompts=64, group_size=4), dict(R1_ZERO_WEIGHTS)),
    "8 groups of 32": (RLRecipe(prompts=8, group_size=32), dict(R1_ZERO_WEIGHTS)),
    "without the std": (RLRecipe(scale_by_std=False), dict(R1_ZERO_WEIGHTS)),
    "KL weight 0.04": (RLRecipe(kl_weight=0.04), dict(R1_ZERO_WEIGHTS)),
    "KL weight 0.2": (RLRecipe(kl_weight=0.2), dict(R1_ZERO_WEIGHTS)),
}


def base(seed: int) -> tuple[MiniDS, float]:
    """The base model of a seed, trained unless it is there, and the seconds of CPU that its training took."""
    folder = BASES / f"base-{seed}"
    if not (folder / "seconds").exists():
        began = time.process_time()
        base_trainer(TASK, replace(BASE_RECIPE, seed=seed)).run(directory=folder, progress=False)
        (folder / "seconds").write_text(str(time.process_time() - began))
    return load_base(folder, TASK), float((folder / "seconds").read_text())


def writes_every_step(sample: Sample) -> bool:
    """Whether a thought holds a written value for each instruction of its problem."""
    return (sample.response.thought or "").count("=") >= sample.problem.difficulty


def habits(seed: int) -> dict[str, float]:
    """How a base answers: the share of answers that write every step or none, and how many of each are right."""
    model, _ = base(seed)
    with rule_reward("trace") as reward:
        dice = torch.Generator().manual_seed(0)
        groups = answer(model.eval(), TASK.tokenizer, TASK.held_out(240), reward, 4, max_new_tokens=72, generator=dice)
    samples = [sample for group in groups for sample in group]
    careful = [sample for sample in samples if writes_every_step(sample)]
    at_once = [sample for sample in samples if "=" not in (sample.response.thought or "")]
    found = {"every step": careful, "no step": at_once}
    return {f"share: {name}": len(some) / len(samples) for name, some in found.items()} | {
        f"right: {name}": mean(sample.score.parts["accuracy"] for sample in some) for name, some in found.items()
    }


def carry_out(name: str) -> dict[str, Any]:
    """One run's curves over its steps, its evaluations, and some of its last answers."""
    recipe, weights = RUNS[name]
    model, base_seconds = base(recipe.seed)
    began = time.process_time()
    curves: dict[str, list[float]] = {}
    with rule_reward("trace", weights) as reward:
        trainer = RLTrainer(model, TASK.tokenizer, TASK, reward, recipe)
        evaluations = [{"step": 0} | trainer.evaluate()]
        while trainer.step < recipe.steps:
            metrics, groups = trainer.train_step()
            share = mean(writes_every_step(sample) for group in groups for sample in group)
            kept = ("reward", "reward/accuracy", "reward/format", "length", "entropy", "kl", "zero_advantage_groups")
            for key in kept:
                curves.setdefault(key, []).append(metrics.get(key))
            curves.setdefault("writes_every_step", []).append(share)
            if trainer.step % recipe.evaluate_every == 0:
                evaluations.append({"step": trainer.step} | trainer.evaluate())
                print(name, trainer.step, f"{evaluations[-1]['held_out/pass@1']:.3f}", flush=True)
    return {
        "recipe": asdict(recipe),
        "weights": weights,
        "base_cpu_seconds": base_seconds,
        "cpu_seconds": time.process_time() - began,
        "evaluations": evaluations,
        "curves": curves,
        "last_answers": [[group[0].problem.prompt, group[0].response.text] for group in groups[:4]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    torch.set_num_threads(1)
    for name in parser.parse_args().only:
        done = carry_out(name)
        runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
        runs[name] = done
        ordered = {run: runs[run] for run in RUNS if run in runs}
        bases = {f"seed {seed}": habits(seed) for seed in sorted({run["recipe"]["seed"] for run in ordered.values()})}
        record(RESULTS, base_recipe=asdict(BASE_RECIPE), bases=bases, runs=ordered)


if __name__ == "__main__":
    main()
