"""`minids rl`: train a base model with rule-based rewards alone, as R1-Zero."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import tyro

from minids.cli.options import Device, call, check_resume, choose_device
from minids.model.transformer import MiniDS
from minids.reasoning.grpo import VARIANTS, Variant
from minids.reasoning.r1_zero import BASE_RECIPE, base_config, base_trainer, load_base, rule_reward
from minids.reasoning.rewards import R1_ZERO_WEIGHTS
from minids.reasoning.tasks import TASKS, Task, TaskName
from minids.reasoning.trainer import RLRecipe, RLTrainer, check
from minids.training.run import described_by, new_run, read_metrics, read_run, write_run
from minids.validation import check_value

BESIDE_RESUME = {"--resume", "--device"}


def run(command: str, arguments: list[str]) -> None:
    check_resume(arguments, BESIDE_RESUME, "a resumed run keeps its settings")
    call(rl_command, command, arguments)


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
    device: Device = "auto",
) -> None:
    """Train a base model with rule-based rewards, as R1-Zero, and store the run under runs/.

    Args:
        task: Task to learn: trace (arithmetic, rewarded by the answer), program (Python, rewarded by unit tests) or
            signs (find an expression by search, rewarded by its value; see also --max-new-tokens 192).
        variant: Published variant, which sets averaging, ratio, std, clips and KL weight: grpo; r1 (a ratio per answer,
            clip 10); dr_grpo (no std, constant divisor); dapo (mean over tokens, clip up to 1.28, dynamic sampling);
            gspo (one mean ratio per sequence, clip 0.0003 and 0.0004). Clips and ratios act from the second update on a
            batch of answers: add --mini-batches 16, as R1-Zero did; gspo is refused without.
        recipe: Training settings.
        format_weight: Weight of the format reward (accuracy has weight 1).
        language_weight: Weight of the language reward, the share of English words in the thought; 0 is R1-Zero.
        base: Folder of a run to start from; by default a base model is pre-trained first.
        base_steps: Optimizer steps of that pre-training.
        name: Name of the run's folder under runs/; by default rl-TASK.
        resume: Folder of a run to resume; all settings are then read from there.
        device: Device to train on; auto selects CUDA where available.
    """
    device = choose_device(device)
    if resume is not None:
        carry_out(resume, device)
        return
    directory = new_run(name or f"rl-{task}")
    if variant is not None:
        recipe = dataclasses.replace(recipe, **VARIANTS[variant])
    check_value("base_steps", base_steps, int)
    check_value("format_weight", format_weight, float, may_be_zero=True)
    check_value("language_weight", language_weight, float, may_be_zero=True)
    weights = {"accuracy": 1.0, "format": format_weight, "language": language_weight}
    family = TASKS[task]()
    rule_reward(task, weights)  # raises for unknown weights and an unavailable sandbox
    config = base_config(family.tokenizer.vocab_size) if base is None else load_base(base, family).config
    check(config, family.tokenizer, family, recipe)
    plan = dict(task=task, weights=weights, base=base and str(base.resolve()), base_steps=base_steps)
    family.tokenizer.save(directory)
    write_run(directory, "rl", plan | {"recipe": dataclasses.asdict(recipe)})
    carry_out(directory, device)


def carry_out(directory: Path, device: str) -> None:
    """Start or resume the run that run.json describes."""
    plan, quoted = read_run(directory), shlex.quote(str(directory))
    if plan["kind"] != "rl":
        raise ValueError(f"{directory} was made by {plan['kind']}: to train its model, use --base {quoted}")
    with described_by(directory):
        task, recipe = TASKS[plan["task"]](), RLRecipe(**plan["recipe"])
        base_recipe = dataclasses.replace(BASE_RECIPE, steps=plan["base_steps"], seed=recipe.seed)
        base, name, weights = plan["base"] and Path(plan["base"]), plan["task"], dict(plan["weights"])
    reward = rule_reward(name, weights)
    model = load_base(base, task) if base else _train_base(directory, task, base_recipe, device)
    if model is None:
        print(f"Stopped. Resume with:\n    python -m minids rl --resume {quoted}")
        return
    trainer = RLTrainer(model.to(device), task.tokenizer, task, reward, recipe)
    print(f"{directory}: reinforcement learning of {model.num_parameters():,} parameters", flush=True)
    trainer.run(directory=directory)
    if trainer.step < recipe.steps:
        print(f"\nStopped after step {trainer.step}. Resume with:\n    python -m minids rl --resume {quoted}")
        return
    _report(directory, task.held_out(1)[0].prompt)


def _train_base(directory: Path, task: Task, recipe: Any, device: str) -> MiniDS | None:
    """Pre-train the base model in the run's folder base/; return None if it was stopped."""
    print(f"{directory}/base: pre-training of a base model", flush=True)
    trainer = base_trainer(task, recipe, device=device)
    trainer.run(directory=directory / "base")
    return trainer.model if trainer.step == recipe.steps else None


def _report(directory: Path, prompt: str) -> None:
    evaluated = [metrics for metrics in read_metrics(directory) if "held_out/pass@1" in metrics]
    before, after = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})  # without metrics.jsonl
    for name in (name for name in after if name.startswith("held_out/pass") and not name.endswith("interval")):
        (old, old_half), (new, new_half) = ((m[name], m[f"{name}_interval"]) for m in (before, after))
        print(f"{name}: {old:.3f} ± {old_half:.3f} before, {new:.3f} ± {new_half:.3f} after")
    print(f"Stored in {directory}/: checkpoints, metrics.jsonl, samples/. Next:")
    print(f"    python -m minids sample {shlex.quote(str(directory))} --prompt {shlex.quote(prompt)}")
