"""R1 in miniature: the stages from a base model to R1, and what a small dense student can be taught.

Notable choices: a stage is a function that returns a trainer, so all share one way to be run, stopped, resumed and
skipped; row.json is written last and makes a stage finished; every stage is asked the same held-out problems, and its
row of the ledger can be read beside the others (FACTS.md section 8.3).
"""

import copy
import functools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minids.config import ModelConfig, check_fields, require
from minids.files import write_text_whole
from minids.model.transformer import MiniDS
from minids.reasoning.budget import consensus
from minids.reasoning.distill import Attempt, LogitTrainer, rejection_sample, student_config
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward
from minids.reasoning.rl import RLRecipe, RLTrainer
from minids.reasoning.rollout import Sample, answer, summary
from minids.reasoning.sft import Example, SFTTrainer, as_lines, careful_solutions, read_examples, sft_recipe
from minids.reasoning.tasks import Task, TraceTask
from minids.reasoning.zero import BASE_RECIPE, base_config, load_base, web_text
from minids.training.loop import TextData, Trainer, validation_batches
from minids.training.loss import bits_per_byte

R1_WEIGHTS = {**R1_ZERO_WEIGHTS, "language": 0.1}
MAX_NEW_TOKENS = RLRecipe().max_new_tokens


@dataclass(frozen=True)
class R1Recipe:
    """How large the stages are. The defaults take some twenty minutes of one core."""

    seed: int = 0
    base_steps: int = BASE_RECIPE.steps
    student_steps: int = 2000
    rl_steps: int = 100
    """Of R1-Zero, of the same with a reward for English, of the reasoning RL, and of RL on the student."""
    final_rl_steps: int = 50
    worked_solutions: int = 200
    cold_start_epochs: int = 4
    rejection_problems: int = 1600
    attempts: int = 4
    """Answers that a teacher gives to each problem, of which `kept_of_each` are kept at most."""
    kept_of_each: int = 2
    general_documents: int = 800
    sft_epochs: int = 2
    distillation_problems: int = 2500
    distillation_epochs: int = 6
    evaluation_problems: int = 240
    evaluation_samples: int = 8

    def __post_init__(self):
        check_fields(self, may_be_zero=("seed",))
        require(self.evaluation_problems >= 2, "evaluation_problems", self.evaluation_problems, "must be at least 2")


SHORT = R1Recipe(
    base_steps=1000, student_steps=700, rl_steps=16, final_rl_steps=8, rejection_problems=300, general_documents=150,
    distillation_problems=500, distillation_epochs=4, evaluation_problems=80, evaluation_samples=4,
)  # fmt: skip


class R1Run:
    """A folder with a folder for each stage, and the ledger."""

    def __init__(self, directory: Path, recipe: R1Recipe, progress: bool = True):
        self.directory, self.recipe, self.progress = directory, recipe, progress
        self.task = TraceTask()

    @classmethod
    def begin(cls, directory: Path, recipe: R1Recipe) -> "R1Run":
        """A new folder, which says in r1.json what is to be made. Raises `ValueError` where it exists already."""
        if directory.exists():
            raise ValueError(f"{directory} exists: choose another --name, or go on with --resume {directory}")
        directory.mkdir(parents=True)
        write_text_whole(directory / "r1.json", json.dumps(asdict(recipe), indent=1))
        return cls(directory, recipe)

    @classmethod
    def load(cls, directory: Path) -> "R1Run":
        """The run that `begin` began. Raises `ValueError` where r1.json is missing or damaged."""
        path = directory / "r1.json"
        try:
            return cls(directory, R1Recipe(**json.loads(path.read_text())))
        except FileNotFoundError:
            raise ValueError(f"{directory} is no run of r1: it has no r1.json") from None
        except (TypeError, json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{path} is damaged: not the description of a run") from None

    @functools.cached_property
    def text(self) -> TextData:
        """The pre-training documents."""
        return web_text(self.task, self.recipe.seed)

    def model(self, stage: str) -> MiniDS:
        """What a finished stage made."""
        return load_base(self.directory / stage, self.task)

    def run(self, stages: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Finish these stages (by default all) and what they need; returns the ledger, a row for each stage there is.

        Raises `KeyboardInterrupt` where a stage was stopped.
        """
        for stage in stages or STAGES:
            self._finish(stage)
        return self.ledger()

    def ledger(self) -> list[dict[str, Any]]:
        """The rows of the finished stages."""
        paths = (self.directory / stage / "row.json" for stage in STAGES)
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def _finish(self, name: str) -> None:
        here, stage = self.directory / name, STAGES[name]
        if (here / "row.json").exists():
            return
        for needed in stage.needs:
            self._finish(needed)
        if self.progress:
            print(f"{here}: {stage.__doc__}", flush=True)
        resumed, began = here.exists(), time.process_time()
        here.mkdir(parents=True, exist_ok=True)
        trainer = stage(self)
        trainer.run(directory=here, progress=self.progress)
        if trainer.step < trainer.recipe.steps:
            raise KeyboardInterrupt
        spent = None if resumed else time.process_time() - began  # a resumed stage knows only of its last part
        figures, groups = self.measure(trainer.model)
        asked = [Attempt.of(sample) for group in groups for sample in group]
        write_text_whole(here / "held_out.jsonl", as_lines(asked))
        row = {"stage": name, **figures, "cpu_seconds": spent}
        write_text_whole(here / "row.json", json.dumps(row, indent=1))
        write_text_whole(self.directory / "ledger.json", json.dumps(self.ledger(), indent=1))

    def measure(self, model: MiniDS) -> tuple[dict[str, float], list[list[Sample]]]:
        """A row's figures, and the answers to the held-out problems that they come from.

        Beside those of `rollout.summary`: "cons@k", the vote of all k samples; "mixed", the share of answers whose
        thought uses both languages; "web", bits per byte of held-out pre-training documents.
        """
        recipe, samples = self.recipe, self.recipe.evaluation_samples
        groups = answer(
            model.eval(), self.task.tokenizer, self.task.held_out(recipe.evaluation_problems), RuleReward(R1_WEIGHTS),
            samples, max_new_tokens=MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        votes = consensus(groups, samples)
        languages = [sample.score.parts["language"] for group in groups for sample in group]
        batches = validation_batches(self.text, BASE_RECIPE)
        return summary(groups) | {
            f"cons@{samples}": sum(votes) / len(votes),
            "mixed": sum(0 < share < 1 for share in languages) / len(languages),
            "web": bits_per_byte(model, batches, self.task.tokenizer.token_bytes()),
        }, groups

    def pretraining(self, config: ModelConfig, steps: int) -> Trainer:
        torch.manual_seed(self.recipe.seed)
        return Trainer(MiniDS(config), self.text, replace(BASE_RECIPE, steps=steps, seed=self.recipe.seed))

    def rl(self, start: str, weights: Mapping[str, float], steps: int, task: Task | None = None) -> RLTrainer:
        recipe = RLRecipe(steps=steps, seed=self.recipe.seed, evaluation_problems=80)
        return RLTrainer(self.model(start), self.task.tokenizer, task or self.task, RuleReward(weights), recipe)

    def sft(
        self, start: str, examples: Sequence[Example], epochs: int, learning_rate: float, teacher: str | None = None
    ) -> SFTTrainer:
        recipe = sft_recipe(len(examples), epochs=epochs, learning_rate=learning_rate, seed=self.recipe.seed)
        if teacher is None:
            return SFTTrainer(self.model(start), examples, self.text, recipe)
        return LogitTrainer(self.model(start), self.model(teacher), examples, self.text, recipe)

    def rng(self, purpose: str) -> random.Random:
        return random.Random(f"{purpose} {self.recipe.seed}")

    def examples(self, stage: str, make: Callable[[], list[Example]]) -> list[Example]:
        """The examples of a stage, made once and then read from its examples.jsonl."""
        path = self.directory / stage / "examples.jsonl"
        if not path.exists():
            write_text_whole(path, as_lines(make()))
        return read_examples(path)

    def verified_answers(self, teacher: str, stage: str, problems: int) -> list[Example]:
        """A teacher's answers to training problems that rules accept."""
        drawn = self.task.draw(self.rng(f"problems of {stage}"), problems)
        return rejection_sample(
            self.model(teacher), self.task.tokenizer, list({problem.prompt: problem for problem in drawn}.values()),
            RuleReward(R1_WEIGHTS), self.directory / stage, samples=self.recipe.attempts,
            kept_of_each=self.recipe.kept_of_each, seed=self.recipe.seed, max_new_tokens=MAX_NEW_TOKENS,
            progress=self.progress,
        )  # fmt: skip


STAGES: dict[str, Callable[[R1Run], Trainer | RLTrainer]] = {}


def stage(*needs: str) -> Callable[[Callable], Callable]:
    """Make a function the stage of its name, which comes after those that it `needs`."""

    def register(function: Callable[[R1Run], Trainer | RLTrainer]) -> Callable:
        STAGES[function.__name__], function.needs = function, needs
        return function

    return register


@stage()
def base(run: R1Run) -> Trainer:
    """a base model reads the web"""
    return run.pretraining(base_config(run.task.tokenizer.vocab_size), run.recipe.base_steps)


@stage("base")
def zero(run: R1Run) -> RLTrainer:
    """R1-Zero, to compare with: rewards for accuracy and format alone"""
    return run.rl("base", R1_ZERO_WEIGHTS, run.recipe.rl_steps)


@stage("base")
def zero_english(run: R1Run) -> RLTrainer:
    """the same with a reward for English, to know what that costs"""
    return run.rl("base", R1_WEIGHTS, run.recipe.rl_steps)


@stage("base")
def cold_start(run: R1Run) -> SFTTrainer:
    """the base learns from a few long worked solutions (the paper's Dev1)"""

    def make() -> list[Example]:
        long = run.task.difficulties
        return careful_solutions(run.task, run.rng("cold start"), run.recipe.worked_solutions, long, widths=(1,))

    examples = run.examples("cold_start", make)
    return run.sft("base", examples, run.recipe.cold_start_epochs, 1e-3)


@stage("cold_start")
def reasoning_rl(run: R1Run) -> RLTrainer:
    """rewards for accuracy, format and language (Dev2)"""
    return run.rl("cold_start", R1_WEIGHTS, run.recipe.rl_steps)


@stage("base", "reasoning_rl")
def rejection_sft(run: R1Run) -> SFTTrainer:
    """the base learns verified answers of that model, and general documents (Dev3)"""

    def make() -> list[Example]:
        short = [n for n in run.task.document_difficulties if n not in run.task.difficulties]
        general = careful_solutions(run.task, run.rng("general"), run.recipe.general_documents, short, widths=(0, 1, 2))
        return run.verified_answers("reasoning_rl", "rejection_sft", run.recipe.rejection_problems) + general

    return run.sft("base", run.examples("rejection_sft", make), run.recipe.sft_epochs, 1e-3)


@stage("rejection_sft")
def r1(run: R1Run) -> RLTrainer:
    """R1: rewards on problems of every length"""
    every_length = copy.copy(run.task)
    every_length.difficulties = run.task.document_difficulties
    return run.rl("rejection_sft", R1_WEIGHTS, run.recipe.final_rl_steps, every_length)


@stage()
def student(run: R1Run) -> Trainer:
    """a small dense student reads the web"""
    return run.pretraining(student_config(run.task.tokenizer.vocab_size), run.recipe.student_steps)


@stage("student")
def student_rl(run: R1Run) -> RLTrainer:
    """the student learns from rewards alone"""
    return run.rl("student", R1_ZERO_WEIGHTS, run.recipe.rl_steps)


@stage("student", "r1")
def student_sft(run: R1Run) -> SFTTrainer:
    """the student learns R1's verified answers"""

    def make() -> list[Example]:
        return run.verified_answers("r1", "student_sft", run.recipe.distillation_problems)

    examples = run.examples("student_sft", make)
    return run.sft("student", examples, run.recipe.distillation_epochs, 2e-3)


@stage("student", "r1", "student_sft")
def student_logits(run: R1Run) -> SFTTrainer:
    """the student learns R1's probabilities of the tokens of those answers"""
    examples = read_examples(run.directory / "student_sft" / "examples.jsonl")
    return run.sft("student", examples, run.recipe.distillation_epochs, 2e-3, teacher="r1")


def ledger_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The ledger to read: a line for each stage."""
    columns = [name for name in rows[0] if name.startswith(("pass@", "cons@")) and not name.endswith("interval")]
    columns += ["length", "reward/format", "reward/language", "mixed", "web", "cpu_seconds"]
    lines = [f"{'stage':16}" + "".join(f"{name.removeprefix('reward/'):>12}" for name in columns)]
    for row in rows:
        cells = ("-" if row[name] is None else f"{row[name]:.3g}" for name in columns)
        lines.append(f"{row['stage']:16}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
