"""R1-Zero in miniature over eight seeds, and what moves it: the runs that chapters/09_r1_zero.ipynb reads.

    python benchmarks/r1_zero.py                            everything: about 60 minutes of one core
    python benchmarks/r1_zero.py --only "recipe, seed 0"    one run, in place of what the results hold of it
    python benchmarks/r1_zero.py --keep-base                no run: the base of seed 0 to results/trace_base.safetensors

A seed decides the pre-training corpus, the base model and the reinforcement learning. The recipe was made while looking
at seeds 0, 1 and 2; seeds 3, 4 and 5 are fresh: they ran once, after the last change to it; 7 and 8 ran once
after the chapter had been written, on another machine. One run has another base,
which was trained on the same corpus with another optimizer; the variants change one thing each and start from the base
of seed 0. All take 60 steps of 256 answers and are evaluated on the
same 240 held-out problems, 4 answers to each; intervals are 95 %, by the spread between problems. Base models are kept
in runs/r1_zero and not trained twice. Results go to benchmarks/results/r1_zero.json.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save_file

from minids.course.experiment import record
from minids.model.transformer import MiniDS
from minids.reasoning.r1_zero import BASE_RECIPE, base_trainer, load_base
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward
from minids.reasoning.rollout import Sample, answer
from minids.reasoning.tasks import TraceTask
from minids.reasoning.trainer import RLRecipe, RLTrainer

TASK = TraceTask()
RESULTS = Path(__file__).parent / "results" / "r1_zero.json"
WEIGHTS = RESULTS.with_name("trace_base.safetensors")
BASES = Path(__file__).parents[1] / "runs" / "r1_zero"


@dataclass(frozen=True)
class Run:
    """What is learned from which rewards, and from what kind of base."""

    recipe: RLRecipe = RLRecipe()
    weights: dict[str, float] = field(default_factory=lambda: dict(R1_ZERO_WEIGHTS))
    base_optimizer: str = BASE_RECIPE.optimizer

    @property
    def base_name(self) -> str:
        return f"trace-{self.base_optimizer}-seed{self.recipe.seed}"


RUNS: dict[str, Run] = {f"recipe, seed {seed}": Run(RLRecipe(seed=seed)) for seed in (0, 1, 2, 3, 4, 5, 7, 8)} | {
    "base by AdamW, seed 2": Run(RLRecipe(seed=2), base_optimizer="adamw"),
    "format only": Run(weights={"format": 1.0}),
    "64 groups of 4": Run(RLRecipe(prompts=64, group_size=4)),
    "8 groups of 32": Run(RLRecipe(prompts=8, group_size=32)),
    "without the std": Run(RLRecipe(scale_by_std=False)),
    "KL weight 0.04": Run(RLRecipe(kl_weight=0.04)),
    "KL weight 0.2": Run(RLRecipe(kl_weight=0.2)),
}


def base(run: Run) -> tuple[MiniDS, float]:
    """The base model of a run, trained unless it is there, and the seconds of CPU that its training took."""
    folder = BASES / run.base_name
    if not (folder / "seconds").exists():
        began = time.process_time()
        trainer = base_trainer(TASK, replace(BASE_RECIPE, seed=run.recipe.seed, optimizer=run.base_optimizer))
        trainer.run(directory=folder, progress=False)
        if trainer.step < trainer.recipe.steps:  # run() returns when it is interrupted
            raise SystemExit(
                f"{run.base_name}: interrupted at step {trainer.step}; the same command goes on from there"
            )
        (folder / "seconds").write_text(str(time.process_time() - began))
    return load_base(folder, TASK), float((folder / "seconds").read_text())


def keep_base() -> None:
    """Write the base of seed 0 in half precision: the chapter begins with the same weights on any machine."""
    model, _ = base(RUNS["recipe, seed 0"])
    save_file({name: weight.half().contiguous() for name, weight in model.state_dict().items()}, WEIGHTS)


def writes_every_step(sample: Sample) -> bool:
    """Whether a thought holds a written value for each instruction of its problem."""
    return (sample.response.thought or "").count("=") >= sample.problem.difficulty


def habits(model: MiniDS) -> dict[str, float]:
    """How a base answers: the share of answers that write every step or none, and how many of each are right."""
    options = dict(max_new_tokens=RLRecipe().max_new_tokens, generator=torch.Generator().manual_seed(0))
    groups = answer(model.eval(), TASK.tokenizer, TASK.held_out(240), RuleReward(R1_ZERO_WEIGHTS), 4, **options)
    samples = [sample for group in groups for sample in group]
    careful = [sample for sample in samples if writes_every_step(sample)]
    at_once = [sample for sample in samples if "=" not in (sample.response.thought or "")]
    found = {"every step": careful, "no step": at_once}
    return {f"share: {name}": len(some) / len(samples) for name, some in found.items()} | {
        f"right: {name}": mean(sample.score.parts["accuracy"] for sample in some) for name, some in found.items()
    }


def carry_out(name: str) -> dict[str, Any]:
    """One run's curves over its steps, its evaluations, and some of its last answers."""
    run = RUNS[name]
    model, base_seconds = base(run)
    of_base = habits(model)
    began = time.process_time()
    curves: dict[str, list[float]] = {}
    trainer = RLTrainer(model, TASK.tokenizer, TASK, RuleReward(run.weights), run.recipe)
    evaluations = [{"step": 0} | trainer.evaluate()]
    while trainer.step < run.recipe.steps:
        metrics = trainer.train_step()
        share = mean(writes_every_step(sample) for group in trainer.groups for sample in group)
        kept = ("reward", "reward/accuracy", "reward/format", "length", "entropy", "kl", "zero_advantage_groups")
        for key in kept:
            curves.setdefault(key, []).append(metrics.get(key))
        curves.setdefault("writes_every_step", []).append(share)
        if trainer.step % run.recipe.evaluate_every == 0:
            evaluations.append({"step": trainer.step} | trainer.evaluate())
            print(name, trainer.step, f"{evaluations[-1]['held_out/pass@1']:.3f}", flush=True)
    return asdict(run) | {
        "base": of_base,
        "base_cpu_seconds": base_seconds,
        "cpu_seconds": time.process_time() - began,
        "evaluations": evaluations,
        "curves": curves,
        "last_answers": [[group[0].problem.prompt, group[0].response.text] for group in trainer.groups[:4]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--keep-base", action="store_true", help="write the base of seed 0 for the chapter, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.keep_base:
        return keep_base()
    for name in arguments.only:
        done = carry_out(name)
        runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
        runs[name] = done
        kept = {run: runs[run] for run in RUNS if run in runs}
        record(RESULTS, command="python benchmarks/r1_zero.py", base_recipe=asdict(BASE_RECIPE), runs=kept)


if __name__ == "__main__":
    main()
