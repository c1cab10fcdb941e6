"""Which way of teaching a small student gets furthest with the same number of answers? Four ways and a control. Ch. 10.

    python -m benchmarks.distillation --seeds 0 1 2

Takes some three minutes of one core for each seed. Student and teacher are dense models of 60 thousand parameters and
start from the same pre-training of 1,000 steps; the teacher then learned 4,000 worked solutions, two epochs. Every way
makes 60 updates of 64 answers, each answer used once (where the rules keep fewer than 3,840, a few twice); in between,
pass@1 on the same 120 held-out problems, and at the end the bits per byte of held-out pre-training documents. The
learning rates were not tuned: RL has that of chapter 09, the others share that of benchmarks/r1.py and its schedule.
Models are kept in runs/distillation and not trained twice; the figures go to benchmarks/results/distillation.json, and
the pre-trained student of seed 0 to distillation_student.safetensors beside it, from which chapter 10 starts.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minids.course.experiment import record
from minids.model.transformer import MiniDS
from minids.reasoning.distill import Attempt, LogitTrainer, select, student_config
from minids.reasoning.on_policy import OnPolicyTrainer
from minids.reasoning.r1 import MAX_NEW_TOKENS, R1_WEIGHTS
from minids.reasoning.r1_zero import BASE_RECIPE, load_base, pretraining_text
from minids.reasoning.rewards import RuleReward
from minids.reasoning.rollout import answer, evaluate
from minids.reasoning.sft import Example, SFTTrainer, careful_solutions, sft_recipe
from minids.reasoning.tasks import TraceTask
from minids.reasoning.trainer import RLRecipe, RLTrainer
from minids.training.loss import bits_per_byte
from minids.training.pretrain import Recipe, Trainer, validation_batches

RESULTS = Path(__file__).parent / "results" / "distillation.json"
MODELS = Path(__file__).parents[1] / "runs" / "distillation"
TASK, REWARD = TraceTask(), RuleReward(R1_WEIGHTS)
PRETRAINING = replace(BASE_RECIPE, steps=1000, evaluate_every=1000, checkpoint_every=1000)
WORKED = {"teacher": (4000, 2, 2e-3), "cold_start": (200, 4, 1e-3)}
"""Models that learned worked solutions: how many, for how many epochs, at which learning rate."""
UPDATES, ANSWERS, MARKS = 60, 64, (10, 20, 40, 60)
PROBLEMS, ATTEMPTS = 4400, 1
RATES = {"RL": 3e-4, "samples": 2e-3, "unfiltered samples": 2e-3, "logits": 2e-3, "on-policy": 2e-3}


def kept_model(name: str, seed: int, make: Callable[[], Trainer]) -> MiniDS:
    """The model of a training, which is run unless it was run before."""
    folder = MODELS / f"{name}-seed{seed}"
    if not (folder / "finished").exists():
        trainer = make()
        trainer.run(directory=folder, progress=False)
        if trainer.step < trainer.recipe.steps:
            raise KeyboardInterrupt(f"stopped while training {folder}")
        (folder / "finished").touch()
    return load_base(folder, TASK)


def student(seed: int) -> MiniDS:
    """The student as pre-trained."""

    def make() -> Trainer:
        torch.manual_seed(seed)
        model = MiniDS(student_config(TASK.tokenizer.vocab_size))
        return Trainer(model, pretraining_text(TASK, seed), replace(PRETRAINING, seed=seed))

    return kept_model("student", seed, make)


def worked(name: str, seed: int) -> MiniDS:
    """A model of `WORKED`: the student after SFT on worked solutions."""
    count, epochs, rate = WORKED[name]

    def make() -> Trainer:
        examples = careful_solutions(TASK, random.Random(f"{name} {seed}"), count, TASK.difficulties, widths=(1,))
        recipe = sft_recipe(count, epochs=epochs, learning_rate=rate, seed=seed)
        return SFTTrainer(student(seed), examples, pretraining_text(TASK, seed), recipe)

    return kept_model(name, seed, make)


def judge(model: MiniDS) -> dict[str, float]:
    """What the model gets right of the held-out problems, with the parts of the reward."""
    problems = TASK.held_out(120)
    figures = evaluate(model.eval(), TASK.tokenizer, problems, REWARD, samples=4, max_new_tokens=MAX_NEW_TOKENS)
    names = ("pass@1", "pass@1_interval", "pass@4", "length", "reward/format", "reward/language")
    return {name: figures[name] for name in names}


def forgetting(seed: int, model: MiniDS) -> float:
    """Bits per byte of held-out pre-training documents; more than before means that the model forgot."""
    batches = validation_batches(pretraining_text(TASK, seed), PRETRAINING)
    return bits_per_byte(model.eval(), batches, TASK.tokenizer.token_bytes())


def lessons(seed: int) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """The teacher's answers to training problems: those that the rules keep, and those to every problem."""
    drawn = TASK.draw(random.Random(f"lessons {seed}"), PROBLEMS)
    problems = list({problem.prompt: problem for problem in drawn}.values())
    teacher, generator = worked("teacher", seed).eval(), torch.Generator().manual_seed(seed)
    began = time.process_time()
    groups = answer(
        teacher, TASK.tokenizer, problems, REWARD, ATTEMPTS, max_new_tokens=MAX_NEW_TOKENS, generator=generator
    )
    attempts = [Attempt.of(sample) for group in groups for sample in group]
    verdicts = select(attempts, per_problem=ATTEMPTS)
    kept = [Example(a.prompt, a.answer) for a, verdict in zip(attempts, verdicts, strict=True) if verdict == "kept"]
    facts = {
        "attempts": len(attempts), "kept": len(kept), "cpu_seconds": time.process_time() - began,
        "correct": sum(a.parts["accuracy"] for a in attempts) / len(attempts),
    }  # fmt: skip
    unfiltered = [Example(a.prompt, a.answer) for a in attempts[::ATTEMPTS]]
    return {"samples": kept, "logits": kept, "unfiltered samples": unfiltered}, facts


def trainer(seed: int, way: str, rate: float, examples: dict[str, list[Example]]) -> Any:
    """The trainer of one way, for updates of `ANSWERS` answers."""
    model = student(seed)
    prompts = 8 if way == "RL" else 32
    live = RLRecipe(
        steps=UPDATES, prompts=prompts, group_size=ANSWERS // prompts, learning_rate=rate, seed=seed,
        evaluation_problems=2,
    )  # fmt: skip
    if way == "RL":
        return RLTrainer(model, TASK.tokenizer, TASK, REWARD, live)
    if way == "on-policy":
        return OnPolicyTrainer(model, worked("teacher", seed), TASK.tokenizer, TASK, REWARD, live)
    recipe: Recipe = replace(sft_recipe(1, epochs=1, learning_rate=rate, batch_size=ANSWERS, seed=seed), steps=UPDATES)
    if way == "logits":
        return LogitTrainer(model, worked("teacher", seed), examples[way], pretraining_text(TASK, seed), recipe)
    return SFTTrainer(model, examples[way], pretraining_text(TASK, seed), recipe)


def teach(seed: int, way: str, rate: float, examples: dict[str, list[Example]]) -> dict[str, Any]:
    """Teach the student in one way: its figures after the updates of `MARKS`, and the CPU seconds without these."""
    learner, spent = trainer(seed, way, rate, examples), 0.0
    curve: list[dict[str, Any]] = [{"updates": 0} | judge(learner.model)]
    for update in range(1, UPDATES + 1):
        began = time.process_time()
        metrics = learner.train_step()
        spent += time.process_time() - began
        if update in MARKS:
            loss = metrics.get("reverse_kl", metrics.get("loss"))
            curve.append({"updates": update, "loss": loss, "cpu_seconds": spent} | judge(learner.model))
    shown = (f"{p['pass@1']:.3f}" for p in curve)
    bits = forgetting(seed, learner.model)
    print(f"seed {seed}, {way}, {rate}: {spent:.0f} s, {bits:.2f} bits per byte,", *shown, flush=True)
    return {"curve": curve, "cpu_seconds": spent, "web": bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=RATES, default=list(RATES), help="replace these in the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = {
        "pretraining": asdict(PRETRAINING), "worked": WORKED, "updates": UPDATES, "answers": ANSWERS,
        "learning_rates": RATES, "parameters": student(0).num_parameters(),
    }  # fmt: skip
    save_file(student(0).state_dict(), RESULTS.with_name("distillation_student.safetensors"))
    found = json.loads(RESULTS.read_text())["seeds"] if RESULTS.exists() else []
    seeds = {of_seed["seed"]: of_seed for of_seed in found}
    for seed in arguments.seeds:
        examples, facts = lessons(seed)
        before = {name: judge(worked(name, seed)) for name in WORKED}
        print(f"seed {seed}:", facts, {name: round(row["pass@1"], 3) for name, row in before.items()}, flush=True)
        ways = seeds.get(seed, {}).get("ways", {})
        for way in arguments.ways:
            ways[way] = teach(seed, way, RATES[way], examples)
        web = {name: forgetting(seed, model) for name, model in
               (("student", student(seed)), ("teacher", worked("teacher", seed)))}  # fmt: skip
        seeds[seed] = {"seed": seed, **before, "web": web, "lessons": facts, "ways": ways}
        record(RESULTS, config=config, seeds=list(seeds.values()))


if __name__ == "__main__":
    main()
