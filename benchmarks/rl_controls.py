"""What does reinforcement learning change: the sharpness of the distribution, the style, or what can be solved at all?

    python -m benchmarks.rl_controls                  six seeds: about 20 minutes of one core beyond the bases
    python -m benchmarks.rl_controls --seeds 0 1      some of them, in place of what the results hold of them

Each seed takes the base model of benchmarks/r1_zero.py and the same 60 steps of the recipe. Two controls:
- temperature: base and trained model answer 120 held-out problems, 4 answers each, at T = 0.3, 0.5, 0.7 and 1. A lower
  temperature sharpens the distribution without training; what it achieves as well is no achievement of training;
- pass@k: 80 held-out problems, 64 answers each, T = 1. Training that only selects among what the base can do raises
  pass@1 and leaves pass@k at large k where it was. Uniform random answers are the control: there are 21 of them.
The style of an answer is read from its whole text, so that a broken format does not hide written steps. Results go to
benchmarks/results/rl_controls.json.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.r1_zero import Run, base
from minids.course.experiment import record
from minids.model.transformer import MiniDS
from minids.reasoning.r1_zero import rule_reward
from minids.reasoning.rollout import Sample, answer, pass_at_k
from minids.reasoning.tasks import TraceTask
from minids.reasoning.trainer import RLRecipe, RLTrainer

TASK = TraceTask()
RESULTS = Path(__file__).parent / "results" / "rl_controls.json"
TEMPERATURES = (0.3, 0.5, 0.7, 1.0)
STYLES = ("no step", "some steps", "every step")
KS = (1, 2, 4, 8, 16, 32, 64)


def style(sample: Sample) -> str:
    """How many values an answer writes, inside the tags or not: one for every instruction, some, or none."""
    written = sample.response.text.count("=")
    return "every step" if written >= sample.problem.difficulty else "some steps" if written else "no step"


def sampled(model: MiniDS, problems: int, samples: int, temperature: float) -> list[list[Sample]]:
    """Groups of scored answers to held-out problems, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return answer(
        model.eval(), TASK.tokenizer, TASK.held_out(problems), rule_reward("trace"), samples,
        max_new_tokens=RLRecipe().max_new_tokens, temperature=temperature, generator=generator,
    )  # fmt: skip


def habits(groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """pass@1, format and length; of each style its share, the share that is correct, and the share with an answer."""
    samples = [sample for group in groups for sample in group]
    found: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[style(sample)].append(sample)
    return {
        "pass@1": fmean(sample.score.parts["accuracy"] for sample in samples),
        "format": fmean(sample.score.parts["format"] for sample in samples),
        "length": fmean(len(sample.response.tokens) for sample in samples),
        "share": {name: len(found[name]) / len(samples) for name in STYLES},
        "correct": {name: _mean([s.score.parts["accuracy"] for s in found[name]]) for name in STYLES},
        "readable": {name: _mean([s.response.answer is not None for s in found[name]]) for name in STYLES},
    }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def trained(seed: int) -> MiniDS:
    """The base of a seed after the recipe's steps."""
    run = Run(RLRecipe(seed=seed))
    trainer = RLTrainer(base(run)[0], TASK.tokenizer, TASK, rule_reward("trace"), run.recipe)
    while trainer.step < run.recipe.steps:
        trainer.train_step()
    return trainer.model


def measure(model: MiniDS) -> dict[str, Any]:
    """Both controls on one model."""
    correct = [sum(s.score.parts["accuracy"] == 1 for s in group) for group in sampled(model, 80, max(KS), 1.0)]
    return {
        "temperatures": {str(t): habits(sampled(model, 120, 4, t)) for t in TEMPERATURES},
        "pass@k": {str(k): fmean(pass_at_k(max(KS), c, k) for c in correct) for k in KS},
        "correct of 64, by problem": correct,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    torch.set_num_threads(1)
    for seed in parser.parse_args().seeds:
        began = time.process_time()
        done: dict[str, Any] = {"base": measure(base(Run(RLRecipe(seed=seed)))[0]), "trained": measure(trained(seed))}
        stored = json.loads(RESULTS.read_text())["seeds"] if RESULTS.exists() else {}
        stored[str(seed)] = done | {"cpu_seconds": time.process_time() - began}
        kept = {seed: stored[seed] for seed in sorted(stored)}
        chance = {str(k): 1 - (20 / 21) ** k for k in KS}
        record(RESULTS, command="python -m benchmarks.rl_controls", random_answers=chance, seeds=kept)
        for name in ("base", "trained"):
            passes = ", ".join(f"{k} {p:.2f}" for k, p in done[name]["pass@k"].items())
            print(f"seed {seed}, {name}: pass@k {passes}", flush=True)


if __name__ == "__main__":
    main()
