"""R1 in miniature with three seeds: the ledger of the stages, distillation, and what thinking buys. Chapter 10.

    python benchmarks/r1.py --seeds 0 1 2

Takes some twenty minutes of one core for each seed. The runs are kept as runs/r1-seed0 and so on; what is finished,
or was made by `python -m minids r1 --seed 0 --name r1-seed0`, is read and not made again. The figures go to
benchmarks/results/r1.json, which the chapter reads.
"""

import argparse
import json
import shutil
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minids.course.experiment import record
from minids.reasoning.budget import answer_within, consensus
from minids.reasoning.r1 import MAX_NEW_TOKENS, R1_WEIGHTS, STAGES, R1Recipe, R1Run, ledger_table
from minids.reasoning.rewards import RuleReward
from minids.reasoning.rollout import answer, mean_with_interval, summary
from minids.training.run import read_metrics

RESULTS = Path(__file__).parent / "results" / "r1.json"
THINKERS = ("base", "zero", "r1", "student_sft")
BUDGETS = (0, 8, 16, 24, 32, 40, 48, 64)
VOTERS = (1, 2, 4, 8, 16)
PROBLEMS, SHOWN = 120, 8
WEAKER = (500, 1000)
"""Steps of pre-training."""
CHAIN = ("base", "cold_start", "reasoning_rl", "rejection_sft", "r1")
RL_STAGES = ("zero", "zero_english", "reasoning_rl", "r1", "student_rl")
CURVE = ("step", "reward", "reward/accuracy", "reward/format", "reward/language", "length", "held_out/pass@1")


def thinking(run: R1Run, stage: str) -> dict[str, Any]:
    """Accuracy against a forced budget of thought, and against the number of votes, with the tokens that they cost."""
    model, problems, reward = run.model(stage).eval(), run.task.held_out(PROBLEMS), RuleReward(R1_WEIGHTS)
    asked = model, run.task.tokenizer, problems, reward
    budgets = []
    for budget in BUDGETS:
        generator = torch.Generator().manual_seed(1)
        figures = summary(answer_within(*asked, 4, thought_tokens=budget, generator=generator))
        budgets.append({name: figures[name] for name in ("pass@1", "pass@1_interval", "length")} | {"budget": budget})
    groups = answer(*asked, max(VOTERS), max_new_tokens=MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(2))
    length = summary(groups)["length"]
    votes = []
    for voters in VOTERS:
        mean, half = mean_with_interval(consensus(groups, voters))
        votes.append({"voters": voters, "cons": mean, "cons_interval": half, "length": voters * length})
    return {"budgets": budgets, "votes": votes}


def weaker_students(run: R1Run) -> list[dict[str, Any]]:
    """What rewards and R1's answers make of students that have read less: the ledger's rows of `WEAKER` students."""
    rows = []
    for steps in WEAKER:
        other = R1Run(run.directory / f"student-{steps}", replace(run.recipe, student_steps=steps), progress=False)
        if not other.directory.exists():
            for stage in CHAIN:
                shutil.copytree(run.directory / stage, other.directory / stage)
            (other.directory / "student_sft").mkdir()
            shutil.copy(run.directory / "student_sft" / "examples.jsonl", other.directory / "student_sft")
        found = {row["stage"]: row for row in other.run(["student_rl", "student_sft"])}
        rows += [found[stage] | {"student_steps": steps} for stage in ("student", "student_rl", "student_sft")]
        print(f"{other.directory}:", *(f"{r['stage']} {r['pass@1']:.3f}" for r in rows[-3:]), flush=True)
    return rows


def curve(path: Path) -> list[dict[str, Any]]:
    """What the chapter draws of a stage of reinforcement learning."""
    return [{name: m[name] for name in CURVE if name in m} for m in read_metrics(path)]


def answers(run: R1Run) -> dict[str, list[dict[str, Any]]]:
    """Two answers of every stage to the same few held-out problems, a few of each difficulty."""
    samples = run.recipe.evaluation_samples
    shown = [i * samples + k for i in range(SHOWN) for k in range(2)]
    found = {}
    for stage in STAGES:
        lines = (run.directory / stage / "held_out.jsonl").read_text().splitlines()
        found[stage] = [json.loads(lines[i]) for i in shown]
    return found


def measure(run: R1Run) -> dict[str, Any]:
    """Everything of one seed."""
    rows = run.run()
    print(ledger_table(rows), flush=True)
    of_stage = {stage: run.directory / stage for stage in STAGES}
    return {
        "seed": run.recipe.seed,
        "ledger": rows,
        "reasons": {
            stage: json.loads((folder / "reasons.json").read_text())
            for stage, folder in of_stage.items()
            if (folder / "reasons.json").exists()
        },
        "curves": {stage: curve(of_stage[stage]) for stage in RL_STAGES},
        "thinking": {stage: thinking(run, stage) for stage in THINKERS},
        "weaker_students": weaker_students(run),
        "answers": answers(run) if run.recipe.seed == 0 else {},
    }


def opened(seed: int) -> R1Run:
    """The seed's run, begun now where there is none."""
    directory, recipe = Path("runs") / f"r1-seed{seed}", R1Recipe(seed=seed)
    run = R1Run.load(directory) if directory.exists() else R1Run.begin(directory, recipe)
    if run.recipe != recipe:
        raise ValueError(f"{directory} was made with {run.recipe}, which is not the recipe of today")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [opened(seed) for seed in arguments.seeds]
    seeds = [measure(run) for run in runs]
    for i, stage in enumerate(STAGES):
        reached = [of_seed["ledger"][i]["pass@1"] for of_seed in seeds]
        spread = f", standard deviation over seeds {statistics.stdev(reached):.3f}" if len(reached) > 1 else ""
        print(f"{stage:16} pass@1 {statistics.fmean(reached):.3f}{spread}")
    sizes = {stage: runs[0].model(stage).num_parameters() for stage in ("base", "student")}
    record(RESULTS, recipe=asdict(runs[0].recipe), parameters=sizes, problems=PROBLEMS, seeds=seeds)


if __name__ == "__main__":
    main()
