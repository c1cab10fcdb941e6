"""When does reinforcement learning lengthen a search? The runs on the task "signs" that chapter 09 reads.

    python benchmarks/search.py                            everything: about 40 minutes of one core
    python benchmarks/search.py --only "search, seed 4"    one run; Ctrl-C stops it, the same command goes on

A seed decides the pre-training corpus, the base model and the reinforcement learning. The corpus was made while
looking at seeds 0 and 1; seeds 4, 5 and 6 are fresh. Each base is trained once, and kept in runs/search with the
runs. Controls: the reward of the format alone; bases whose corpus answers at random after a failed search, or after
every thought, so that answers do not follow from thoughts; the base at other temperatures; as many tokens spent on
independent answers of the base. Evaluated on the same 120 held-out problems every 10 steps, 8 answers to each, 16 at
both ends; intervals are 95 %, by the spread between problems. Results go to benchmarks/results/search.json.
"""

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from minids.course.experiment import record
from minids.model.transformer import MiniDS
from minids.reasoning.budget import consensus
from minids.reasoning.habits import by_way, habits, mean_habits
from minids.reasoning.r1_zero import BASE_RECIPE, base_trainer, load_base, rule_reward
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, read_response
from minids.reasoning.rollout import Sample, answer, mean_with_interval, pass_at_k
from minids.reasoning.tasks import CorpusStyle, Problem, SignsTask, template
from minids.reasoning.tasks.signs import SIGNS, HabitMix, candidate, read_problem
from minids.reasoning.trainer import RLRecipe, RLTrainer
from minids.training.metrics import Metrics
from minids.training.run import read_metrics

TASK = SignsTask()
PROBLEMS = 120
RECIPE = RLRecipe(steps=50, max_new_tokens=192, evaluate_every=10, evaluation_problems=PROBLEMS, checkpoint_every=10)
BASE = replace(BASE_RECIPE, steps=900, evaluate_every=900, checkpoint_every=100)
CORPORA = {
    "follows": HabitMix(),
    "guesses": HabitMix(guess_after_failure=1.0),
    "unrelated": HabitMix(answer_follows=False),
}
TEMPERATURES = (0.3, 0.5, 0.7, 1.0)
PERFECT = HabitMix(
    guess=0, unchecked=0, one_check=0, patience=1, wrong_step=0, false_yes=0, overlooked=0, homework=0,
    systematic=0, forgetful=0,
)  # fmt: skip
YARDSTICKS = {
    "draws, forgets": replace(PERFECT, forgetful=1),
    "draws, remembers": PERFECT,
    "in order": replace(PERFECT, systematic=1),
}
"""Searches without mistakes and without a token limit."""
RESULTS = Path(__file__).parent / "results" / "search.json"
RUNS_FOLDER = Path(__file__).parents[1] / "runs" / "search"


@dataclass(frozen=True)
class Run:
    """What is learned, from which reward, and from which base."""

    seed: int
    corpus: str = "follows"
    accuracy: float = 1.0
    """Weight of the accuracy reward; at 0 the format is the only reward."""

    @property
    def base_name(self) -> str:
        return f"{self.corpus}-{self.seed}"

    @property
    def weights(self) -> dict[str, float]:
        return dict(R1_ZERO_WEIGHTS) if self.accuracy else {"format": 1.0}


RUNS: dict[str, Run] = (
    {f"search, seed {seed}": Run(seed) for seed in (4, 5, 6)}
    | {f"format only, seed {seed}": Run(seed, accuracy=0.0) for seed in (4, 5, 6)}
    | {f"answers do not follow, seed {seed}": Run(seed, "guesses") for seed in (4, 5)}
    | {f"answers never follow, seed {seed}": Run(seed, "unrelated") for seed in (4, 5)}
)


class Stopped(SystemExit):
    """A run was interrupted; its checkpoint remains, and the same command goes on from there."""


def base(name: str) -> tuple[MiniDS, float]:
    """The base model of that name, trained unless it is there, and the seconds of CPU that its training took.

    If it was interrupted, the seconds are extrapolated from its last part.
    """
    folder, (corpus, seed) = RUNS_FOLDER / f"base-{name}", name.split("-")
    if not (folder / "cpu_seconds").exists():
        began = time.process_time()
        trainer = base_trainer(SignsTask(CORPORA[corpus]), replace(BASE, seed=int(seed)))
        steps_taken = len(trainer.run(directory=folder, progress=False))
        if trainer.step < BASE.steps:
            raise Stopped(f"{name}: stopped at step {trainer.step}")
        (folder / "cpu_seconds").write_text(str((time.process_time() - began) * BASE.steps / steps_taken))
    return load_base(folder, TASK), float((folder / "cpu_seconds").read_text())


def sampled(model: MiniDS, samples: int, temperature: float = 1.0) -> list[list[Sample]]:
    """Groups of answers to the held-out problems; accuracy and format are scored whatever the run's reward is."""
    return answer(
        model.eval(), TASK.tokenizer, TASK.held_out(PROBLEMS), rule_reward("signs"), samples,
        max_new_tokens=RECIPE.max_new_tokens, temperature=temperature, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


def measured(groups: list[list[Sample]]) -> dict[str, Any]:
    """pass@k, habits and lengths of groups of answers."""
    flat, size = [sample for group in groups for sample in group], len(groups[0])
    correct = [int(sum(sample.score.parts["accuracy"] for sample in group)) for group in groups]
    figures: dict[str, Any] = {}
    for k in (k for k in (1, 2, 4, 8, 16) if k <= size):
        values = [pass_at_k(size, right, k) for right in correct]
        figures[f"pass@{k}"], figures[f"pass@{k}_interval"] = mean_with_interval(values)
    return figures | mean_habits(flat) | {
        "tokens": fmean(len(sample.response.tokens) for sample in flat),
        "unfinished": fmean(not sample.response.ended for sample in flat),
        "format": fmean(sample.score.parts["format"] for sample in flat),
        "by_way": by_way(flat),
    }  # fmt: skip


def judged(groups: list[list[Sample]]) -> dict[str, Any]:
    """The figures of all problems and of each difficulty, how many attempts answers have, and some answers."""
    of_difficulty = {n: [g for g in groups if g[0].problem.difficulty == n] for n in TASK.difficulties}
    counts = Counter(habits(sample.problem, sample.response).attempts for group in groups for sample in group)
    return measured(groups) | {
        "by_difficulty": {n: measured(some) for n, some in of_difficulty.items()},
        "answers_by_attempts": [counts[n] for n in range(max(counts) + 1)],
        "answers": [
            [sample.problem.prompt, sample.response.text, sample.score.parts["accuracy"]]
            for group in groups[:6]
            for sample in group[:4]
        ],
    }


class Searcher(RLTrainer):
    """The trainer, with this file's evaluation."""

    def train_step(self) -> Metrics:
        began = time.process_time()
        return super().train_step() | {"cpu_seconds": time.process_time() - began}

    def evaluate(self) -> Metrics:
        return {"held_out": judged(sampled(self.model, 16 if self.step in (0, self.recipe.steps) else 8))}


def carry_out(name: str) -> dict[str, Any]:
    """One run: its settings, evaluations and training curves."""
    run, folder = RUNS[name], RUNS_FOLDER / name.replace(", ", "-").replace(" ", "-")
    model, base_seconds = base(run.base_name)
    recipe = replace(RECIPE, seed=run.seed)
    trainer = Searcher(model, TASK.tokenizer, TASK, rule_reward("signs", run.weights), recipe)
    trainer.run(directory=folder, progress=False)
    if trainer.step < recipe.steps:
        raise Stopped(f"{name}: stopped at step {trainer.step}")
    metrics = read_metrics(folder)
    kept = ("reward", "reward/accuracy", "reward/format", "length", "unfinished", "entropy", "zero_advantage_groups")
    return asdict(run) | {
        "recipe": asdict(recipe),
        "weights": run.weights,
        "base_cpu_seconds": base_seconds,
        "cpu_seconds": sum(of_step.get("cpu_seconds", 0.0) for of_step in metrics),
        "evaluations": [
            {"step": of_step["step"]} | of_step["held_out"] for of_step in metrics if "held_out" in of_step
        ],
        "curves": {key: [of_step.get(key) for of_step in metrics if of_step["step"]] for key in kept},
    }


def yardsticks() -> dict[str, Any]:
    """The figures of the three searches of `YARDSTICKS` on the held-out problems, 8 answers to each, by a program."""
    return {
        name: judged([written(problem, mix) for problem in TASK.held_out(PROBLEMS)]) for name, mix in YARDSTICKS.items()
    }


def written(problem: Problem, mix: HabitMix) -> list[Sample]:
    """Answers to one problem as the corpus would have them."""
    task, rng = SignsTask(mix), random.Random(problem.prompt)
    chain = candidate(read_problem(problem.prompt)[0], "".join(sign for sign in problem.answer if sign in SIGNS))
    texts = [template(*task.solve(rng, chain, CorpusStyle())) + "<eos>" for _ in range(8)]
    responses = [read_response(TASK.tokenizer.encode(text, allow_special=True), TASK.tokenizer) for text in texts]
    scores = rule_reward("signs")([problem] * 8, responses)
    return [Sample(problem, [], response, [], score) for response, score in zip(responses, scores, strict=True)]


def base_controls(name: str, budget: float) -> dict[str, Any]:
    """The base at other temperatures, and with `budget` tokens a problem spent on independent answers."""
    model, _ = base(name)
    by_temperature = {temperature: sampled(model, 16, temperature) for temperature in TEMPERATURES}
    figures: dict[str, Any] = {"temperatures": {t: judged(groups) for t, groups in by_temperature.items()}}
    figures["equal_budget"] = []
    for temperature, groups in by_temperature.items():
        tokens = figures["temperatures"][temperature]["tokens"]
        k = min(max(round(budget / tokens), 1), 16)
        correct = [int(sum(sample.score.parts["accuracy"] for sample in group)) for group in groups]
        oracle = mean_with_interval([pass_at_k(16, right, k) for right in correct])
        vote = mean_with_interval(consensus(groups, k))
        figures["equal_budget"].append(
            dict(temperature=temperature, answers=k, tokens=k * tokens, budget=budget)
            | {"pass@k": oracle[0], "pass@k_interval": oracle[1], "cons@k": vote[0], "cons@k_interval": vote[1]}
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    torch.set_num_threads(1)
    for name in parser.parse_args().only:
        done = carry_out(name)
        last = done["evaluations"][-1]
        if name.startswith("search"):
            done["base"] = base_controls(RUNS[name].base_name, budget=last["tokens"])
        print(name, f"pass@1 {done['evaluations'][0]['pass@1']:.3f} -> {last['pass@1']:.3f}", flush=True)
        runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
        runs[name] = done
        kept = {run: runs[run] for run in RUNS if run in runs}
        corpora = {kind: asdict(mix) for kind, mix in CORPORA.items()}
        record(
            RESULTS, command="python benchmarks/search.py", base_recipe=asdict(BASE), corpora=corpora,
            held_out_problems=PROBLEMS, yardsticks=yardsticks(), runs=kept,
        )  # fmt: skip


if __name__ == "__main__":
    main()
