"""What `python -m minids rl` and `python -m minids r1` do."""

import dataclasses
import json
from pathlib import Path

import tyro

from minids.files import write_text_whole
from minids.reasoning.grpo import VARIANTS, Variant
from minids.reasoning.r1 import SHORT, STAGES, R1Recipe, R1Run, ledger_table
from minids.reasoning.rewards import R1_ZERO_WEIGHTS
from minids.reasoning.rl import RLRecipe, RLTrainer
from minids.reasoning.tasks import TASKS, TaskName
from minids.reasoning.zero import BASE_RECIPE, base_trainer, load_base, rule_reward


def rl_command(
    task: TaskName = "trace",
    variant: Variant | None = None,
    recipe: tyro.conf.OmitArgPrefixes[RLRecipe] = RLRecipe(),  # noqa: B008 - frozen
    format_weight: float = R1_ZERO_WEIGHTS["format"],
    language_weight: float = 0.0,
    base: Path | None = None,
    base_steps: int = BASE_RECIPE.steps,
    name: str | None = None,
    resume: Path | None = None,
    weaker_sandbox: bool = False,
) -> None:
    """Teach a base model by rewards alone, as R1-Zero was, and keep the run under runs/.

    Args:
        task: What to learn: trace (arithmetic, judged by the answer) or program (Python, judged by unit tests).
        variant: Set averaging, ratio, std and clips as published: grpo, dr_grpo, dapo or gspo.
        format_weight: Worth of the right form; a right answer is worth 1.
        language_weight: Worth of a thought in English only.
        base: Folder of a run to start from; by default a base is trained first.
        base_steps: Steps of that training.
        name: Folder under runs/; by default rl-TASK.
        resume: Folder of a run to go on with; all but weaker_sandbox is then read from there.
        weaker_sandbox: Run programs also where the sandbox's strong walls cannot be had.
    """
    directory = resume or Path("runs") / (name or f"rl-{task}")
    if resume is None:
        if directory.exists():
            raise ValueError(f"{directory} exists: choose another --name, or go on with --resume {directory}")
        if variant is not None:
            recipe = dataclasses.replace(recipe, **VARIANTS[variant])
        weights = {"accuracy": 1.0, "format": format_weight, "language": language_weight}
        plan = dict(task=task, weights=weights, base=base and str(base), base_steps=base_steps)
        plan["recipe"] = dataclasses.asdict(recipe)
        directory.mkdir(parents=True)
        write_text_whole(directory / "rl.json", json.dumps(plan, indent=1))
    _carry_out(directory, weaker_sandbox)


def _carry_out(directory: Path, weaker_sandbox: bool) -> None:
    """Begin the run that rl.json describes, or go on with it."""
    try:
        plan = json.loads((directory / "rl.json").read_text())
        task, recipe = TASKS[plan["task"]](), RLRecipe(**plan["recipe"])
        base_recipe = dataclasses.replace(BASE_RECIPE, steps=plan["base_steps"], seed=recipe.seed)
    except FileNotFoundError:
        raise ValueError(f"{directory} is no run of rl: it has no rl.json") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{directory / 'rl.json'} is damaged: not the description of a run") from None
    reward = rule_reward(plan["task"], plan["weights"], weaker_sandbox)
    if plan["base"] is not None:
        model = load_base(Path(plan["base"]), task)
    else:
        print(f"{directory}/base: a base model reads the web", flush=True)
        trainer = base_trainer(task, base_recipe)
        trainer.run(directory=directory / "base")
        if trainer.step < base_recipe.steps:
            print(f"Stopped. Go on with:\n    python -m minids rl --resume {directory}")
            return
        model = trainer.model
    task.tokenizer.save(directory)
    trainer = RLTrainer(model, task.tokenizer, task, reward, recipe)
    print(f"{directory}: {model.num_parameters():,} parameters learn from rewards", flush=True)
    trainer.run(directory=directory)
    if trainer.step < recipe.steps:
        print(f"\nStopped after step {trainer.step}. Go on with:\n    python -m minids rl --resume {directory}")
        return
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    before, *_, after = (metrics for metrics in map(json.loads, lines) if "held_out/pass@1" in metrics)
    for name in (name for name in after if name.startswith("held_out/pass") and not name.endswith("interval")):
        (old, old_half), (new, new_half) = ((m[name], m[f"{name}_interval"]) for m in (before, after))
        print(f"{name}: {old:.3f} ± {old_half:.3f} before, {new:.3f} ± {new_half:.3f} after")
    print(f"Kept in {directory}/: checkpoints, metrics.jsonl, samples/")


def r1_command(
    short: bool = False,
    seed: int = 0,
    stages: tuple[str, ...] = (),
    name: str | None = None,
    resume: Path | None = None,
) -> None:
    """Make R1 from a base model stage by stage, distil it into a small student, and keep all under runs/.

    Args:
        short: Smaller stages after the base, to look on.
        seed: Decides the first weights, the problems and every draw.
        stages: Only these stages, and what they need: base, zero, zero_english, cold_start, reasoning_rl,
            rejection_sft, r1, student, student_rl, student_sft, student_logits.
        name: Folder under runs/; by default r1, or r1-short.
        resume: Folder of a run to go on with; short and seed are then read from there.
    """
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"stages: there is no {unknown[0]!r}, only {', '.join(STAGES)}")
    directory = resume or Path("runs") / (name or ("r1-short" if short else "r1"))
    recipe = dataclasses.replace(SHORT if short else R1Recipe(), seed=seed)
    run = R1Run.load(directory) if resume else R1Run.begin(directory, recipe)
    try:
        print(ledger_table(run.run(stages)))
    except KeyboardInterrupt:
        print(f"\nStopped. Go on with:\n    python -m minids r1 --resume {directory}")
        return
    print(f"Kept in {directory}/: ledger.json, and for each stage checkpoints, metrics, examples and answers")
