"""Can a model learn programming from unit tests, and what does it learn from a weak one? Read by chapter 09.

    python benchmarks/programs.py                            everything: about an hour of one core
    python benchmarks/programs.py --only "hidden, seed 3"    one run, in place of what the results hold of it

Four groups of runs, each with seeds 3, 4 and 5, which nobody tuned on; a seed decides the corpus, the base model and
the reinforcement learning:

- hidden: hidden unit tests are the reward;
- weak: the same base models, but the only test is the example in the prompt, which a constant passes;
- weak, few cheats: as weak, but 5 % instead of 20 % of the direct answers in the corpus are such constants;
- guessed (the control for "hidden"): the corpus's thoughts record a guess of the missing number and compute nothing.

All take 60 steps of 256 answers and are evaluated by hidden tests on the same 240 held-out problems, 4 answers to each;
intervals are 95 %, by the spread between problems. Base models are kept in runs/programs and not trained twice. A run
is written to benchmarks/results/programs.json when it is complete; after an interrupt, the same command does the rest.
"""

import argparse
import functools
import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from minids.course.experiment import record
from minids.model.transformer import MiniDS
from minids.reasoning.hacking import WeakReward, measure
from minids.reasoning.r1_zero import BASE_RECIPE, base_trainer, load_base
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward
from minids.reasoning.rollout import answer, summary
from minids.reasoning.tasks import CorpusStyle, ProgramTask
from minids.reasoning.tasks.program import Thought
from minids.reasoning.trainer import RLRecipe, RLTrainer
from minids.sandbox.errors import Failed
from minids.sandbox.judge import Limits, SandboxProcess, Verdict, find_isolation, parse
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results" / "programs.json"
BASES = Path(__file__).parents[1] / "runs" / "programs"
KEPT = ("reward", "reward/accuracy", "reward/format", "length", "entropy", "zero_advantage_groups")
INPUTS = range(40)  # of all tests of the task


@dataclass(frozen=True)
class Run:
    """What the corpus holds, and which test the reward of training uses."""

    recipe: RLRecipe = RLRecipe()
    weak_test: bool = False
    cheating: float = 0.2  # fraction of the direct answers in the corpus that return the value of the example
    thought: Thought = "computed"
    base_recipe: Recipe = BASE_RECIPE
    seed: int = field(kw_only=True)

    @property
    def base_name(self) -> str:
        return f"{self.thought}-cheating{self.cheating}-seed{self.seed}"


GROUPS: dict[str, dict[str, Any]] = {
    "hidden": {}, "weak": {"weak_test": True}, "weak, few cheats": {"weak_test": True, "cheating": 0.05},
    "guessed": {"thought": "guessed"},
}  # fmt: skip
RUNS = {f"{name}, seed {seed}": Run(seed=seed, **changed) for name, changed in GROUPS.items() for seed in (3, 4, 5)}


BEHAVE = """
def behave(programs, inputs):
    results = []
    for program in programs:
        space = {}
        try:
            exec(program, space)
            results.append([space["f"](n) for n in inputs])
        except Exception:  # the grammar has no branches: a program fails on all inputs or on none
            results.append([])
    return results
"""


class BehaviourJudge:
    """A judge of (program, tests) pairs that runs a program once in the sandbox, on all inputs that a test can have.

    The results are kept, so the hidden tests and the weak test of every problem are looked up in them. Up to 64
    programs run in one isolated process, which saves nine tenths of the time: the task's symbols hold no name, quote or
    dot by which a program could reach another. If such a process fails, its programs run in one process each.
    """

    def __init__(self) -> None:
        self.isolation, self.results = find_isolation(), dict[str, list[int]]()

    def __call__(self, jobs: list[tuple[str, str]]) -> list[Verdict]:
        new = [program for program in dict.fromkeys(program for program, _ in jobs) if program not in self.results]
        for first in range(0, len(new), 64):
            self.results |= self._run(new[first : first + 64])
        return [self._verdict(*job) for job in jobs]

    def _run(self, programs: list[str]) -> dict[str, list[int]]:
        limits = Limits()
        with closing(SandboxProcess(self.isolation, limits)) as process:
            deadline = time.monotonic() + limits.seconds
            try:
                process.ask(BEHAVE, deadline)
                results = process.ask(f"behave({programs!r}, {INPUTS!r})", deadline)
                return dict(zip(programs, results, strict=True))
            except Failed:
                if len(programs) == 1:
                    return {programs[0]: []}
        return {program: result for one in programs for program, result in self._run([one]).items()}

    def _verdict(self, program: str, tests: str) -> Verdict:
        results = self.results[program]
        asked = [(test, int(test.call[2:-1])) for test in parsed(tests)]  # the input of a call such as "f(4)"
        return Verdict(bool(results) and all(test.holds(results[n]) for test, n in asked), "looked up", 0.0)


parsed = functools.cache(parse)


def base(run: Run) -> tuple[MiniDS, float]:
    """Return the base model of a run, trained unless it is there, and the CPU seconds of its training.

    Training resumes where it was interrupted, and then only the seconds since the last start are counted. Raises
    `KeyboardInterrupt` if it is interrupted now: an unfinished base model gets no marker, and no run uses it.
    """
    folder, task, recipe = BASES / run.base_name, ProgramTask(run.thought), replace(run.base_recipe, seed=run.seed)
    marker = folder / "seconds"
    if not marker.exists():
        began = time.process_time()
        trainer = base_trainer(task, recipe, CorpusStyle(cheating=run.cheating))
        trainer.run(directory=folder, progress=False)
        if trainer.step < recipe.steps:  # `run` returns at the first Ctrl-C
            raise KeyboardInterrupt(f"{folder}: stopped after step {trainer.step} of {recipe.steps}")
        marker.write_text(f"{time.process_time() - began:.1f}")
    return load_base(folder, task), float(marker.read_text())


def carry_out(name: str, run: Run, judge: BehaviourJudge) -> dict[str, Any]:
    """Train one run from its base model; return its evaluations, its curves over the steps and some last answers."""
    model, base_seconds = base(run)
    task, recipe = ProgramTask(run.thought), replace(run.recipe, seed=run.seed)
    reward = RuleReward(R1_ZERO_WEIGHTS, judge)
    trainer = RLTrainer(model, task.tokenizer, task, WeakReward(reward) if run.weak_test else reward, recipe)
    problems = task.held_out(recipe.evaluation_problems)
    evaluations: list[dict[str, Any]] = []
    curves: dict[str, list[float | None]] = {}

    def evaluate() -> None:
        generator = torch.Generator().manual_seed(0)
        groups = answer(
            model.eval(), task.tokenizer, problems, reward, recipe.evaluation_samples,
            max_new_tokens=recipe.max_new_tokens, generator=generator,
        )  # fmt: skip
        samples = [sample for group in groups for sample in group]
        by_difficulty = {
            f"correct_at_difficulty_{n}": measure([s for s in samples if s.problem.difficulty == n], judge)["correct"]
            for n in task.difficulties
        }
        evaluations.append({"step": trainer.step} | summary(groups) | measure(samples, judge) | by_difficulty)
        shown = {key: evaluations[-1][key] for key in ("pass@1", "pass@4", "thinks", "cheats", "length")}
        print(name, trainer.step, *(f"{key} {value:.3f}" for key, value in shown.items()), flush=True)

    began = time.process_time()
    evaluate()
    while trainer.step < recipe.steps:
        metrics = trainer.train_step()
        seen = measure([sample for group in trainer.groups for sample in group], judge)
        for key, value in ({key: metrics.get(key) for key in KEPT} | seen).items():
            curves.setdefault(key, []).append(value)
        if trainer.step % recipe.evaluate_every == 0:
            evaluate()
    return {
        "run": asdict(run),
        "base_cpu_seconds": base_seconds,
        "cpu_seconds": time.process_time() - began,  # without the sandbox's processes
        "evaluations": evaluations,
        "curves": curves,
        "last_answers": [[group[0].problem.prompt, group[0].response.text] for group in trainer.groups[:6]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, help="runs to repeat; by default those not in the results")
    torch.set_num_threads(1)
    wanted, judge = parser.parse_args().only, BehaviourJudge()
    complete = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for name in wanted or [name for name in RUNS if name not in complete]:
        complete[name] = carry_out(name, RUNS[name], judge)
        runs = {run: complete[run] for run in RUNS if run in complete}
        record(RESULTS, command="python benchmarks/programs.py", seeds=[3, 4, 5], runs=runs)


if __name__ == "__main__":
    main()
