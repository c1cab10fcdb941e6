"""R1 in miniature: the stages from a base model to R1, and its distillation into a small dense student.

Notable choices: a stage is a function that returns a trainer, so all stages are run, stopped, resumed and skipped in
the same way; row.json is written last and marks a stage as finished; every stage is evaluated on the same held-out
problems, so the rows of the ledger are comparable (FACTS.md section 8.3).
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
from minids.files import atomic_write_text
from minids.model.transformer import MiniDS
from minids.reasoning.budget import consensus
from minids.reasoning.distill import Attempt, LogitTrainer, rejection_sample, student_config
from minids.reasoning.r1_zero import BASE_RECIPE, base_config, load_base, pretraining_text
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward
from minids.reasoning.rollout import Sample, answer, summary
from minids.reasoning.sft import Example, SFTTrainer, as_lines, careful_solutions, read_examples, sft_recipe
from minids.reasoning.tasks import Task, TraceTask
from minids.reasoning.trainer import RLRecipe, RLTrainer
from minids.training.loss import bits_per_byte
from minids.training.pretrain import TextData, Trainer, validation_batches
from minids.training.run import check_new, described_by, locked, read_run, write_run

R1_WEIGHTS = {**R1_ZERO_WEIGHTS, "language": 0.1}
MAX_NEW_TOKENS = RLRecipe().max_new_tokens


@dataclass(frozen=True)
class R1Recipe:
    """How large the stages are. The defaults take some twenty minutes of one core."""

    seed: int = 0
    """Seed of the initial weights, the problems and the sampled answers."""
    base_steps: int = BASE_RECIPE.steps
    """Optimizer steps of the base model's pre-training."""
    student_steps: int = 2000
    """Optimizer steps of the dense student's pre-training."""
    rl_steps: int = 100
    """Steps of each RL stage but the last: R1-Zero, R1-Zero with language reward, reasoning RL, RL of the student."""
    final_rl_steps: int = 50
    """Steps of the last RL stage, which gives R1."""
    worked_solutions: int = 200
    """Long worked solutions in the cold-start SFT data."""
    cold_start_epochs: int = 4
    """Epochs of the cold-start SFT."""
    rejection_problems: int = 1600
    """Problems for rejection sampling."""
    attempts: int = 4
    """Answers that the teacher samples per problem, in rejection sampling and distillation."""
    kept_of_each: int = 2
    """Maximum number of accepted answers that are kept per problem."""
    general_documents: int = 800
    """General examples (solutions of short problems) that are added to the rejection-sampled answers."""
    sft_epochs: int = 2
    """Epochs of the SFT on rejection-sampled and general examples."""
    distillation_problems: int = 2500
    """Problems that R1 answers for the student."""
    distillation_epochs: int = 6
    """Epochs of the student's SFT and of its distillation from logits."""
    evaluation_problems: int = 240
    """Held-out problems in the evaluation of every stage, at least 2."""
    evaluation_samples: int = 8
    """Answers per held-out problem: the k of pass@k and cons@k."""

    def __post_init__(self):
        check_fields(self, may_be_zero=("seed",))
        require(self.evaluation_problems >= 2, "evaluation_problems", self.evaluation_problems, "must be at least 2")


SHORT = R1Recipe(
    base_steps=1000, student_steps=700, rl_steps=16, final_rl_steps=8, rejection_problems=300, general_documents=150,
    distillation_problems=500, distillation_epochs=4, evaluation_problems=80, evaluation_samples=4,
)  # fmt: skip
"""A quick demonstration: its stages after the reasoning RL see too few answers to improve on the cold start."""


class StageStopped(Exception):
    """A stage was stopped before its end; the run can be resumed."""


class R1Run:
    """A run of the R1 recipe: a folder with one folder per stage, and the ledger."""

    def __init__(self, directory: Path, recipe: R1Recipe, progress: bool = True, device: str = "cpu"):
        self.directory, self.recipe, self.progress, self.device = directory, recipe, progress, device
        self.task: Task = TraceTask()

    @classmethod
    def begin(cls, directory: Path, recipe: R1Recipe, device: str = "cpu") -> "R1Run":
        """Create the folder of a new run, with its recipe in run.json. Raises `ValueError` if it exists already."""
        check_new(directory)
        made = cls(directory, recipe, device=device)
        made.task.tokenizer.save(directory)
        write_run(directory, "r1", {"recipe": asdict(recipe), "stages": CHAIN})
        return made

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> "R1Run":
        """Load a run that `begin` created. Raises `ValueError` if run.json is missing, damaged, or of another kind."""
        fields = read_run(directory)
        if fields["kind"] != "r1":
            raise ValueError(f"{directory} was made by {fields['kind']}, not by r1")
        recipe = fields.get("recipe", {name: value for name, value in fields.items() if name != "kind"})
        with described_by(directory):
            return cls(directory, R1Recipe(**recipe), device=device)

    @functools.cached_property
    def text(self) -> TextData:
        """The pre-training documents."""
        return pretraining_text(self.task, self.recipe.seed)

    def model(self, stage: str) -> MiniDS:
        """Load the model of a finished stage."""
        return load_base(self.directory / stage, self.task).to(self.device)

    def run(self, stages: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Run these stages (by default all) and those that they need; return the ledger, a row per finished stage.

        Raises `StageStopped` where a stage was stopped.
        """
        with locked(self.directory):
            for stage in stages or STAGES:
                self._finish(stage)
        return self.ledger()

    def ledger(self) -> list[dict[str, Any]]:
        """Return the rows of the finished stages."""
        paths = (self.directory / stage / "row.json" for stage in STAGES)
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def _finish(self, name: str) -> None:
        here, stage = self.directory / name, STAGES[name]
        if (here / "row.json").exists():
            return
        for needed in stage.needs:
            self._finish(needed)
        if self.progress:
            print(f"{here}: {stage.purpose}", flush=True)
        resumed, began = here.exists(), time.process_time()
        here.mkdir(parents=True, exist_ok=True)
        trainer = stage.make(self)
        trainer.run(directory=here, progress=self.progress)
        if trainer.step < trainer.recipe.steps:
            raise StageStopped(name)
        spent = None if resumed else time.process_time() - began  # unknown for a resumed stage
        figures, groups = self.measure(trainer.model)
        attempts = [Attempt.of(sample) for group in groups for sample in group]
        atomic_write_text(here / "held_out.jsonl", as_lines(attempts))
        row = {"stage": name, **figures, "cpu_seconds": spent}
        atomic_write_text(here / "row.json", json.dumps(row, indent=1))
        atomic_write_text(self.directory / "ledger.json", json.dumps(self.ledger(), indent=1))

    def measure(self, model: MiniDS) -> tuple[dict[str, float], list[list[Sample]]]:
        """Return the figures of a row of the ledger, and the answers to the held-out problems.

        The figures are those of `rollout.summary` and: "cons@k", the accuracy of the majority vote of all k samples;
        "mixed", the fraction of answers whose thought uses both languages; "web", bits per byte of held-out
        pre-training documents.
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
        recipe = replace(BASE_RECIPE, steps=steps, seed=self.recipe.seed)
        return Trainer(MiniDS(config).to(self.device), self.text, recipe)

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
        """Return the examples of a stage; the first call makes them, later calls read examples.jsonl."""
        path = self.directory / stage / "examples.jsonl"
        if not path.exists():
            atomic_write_text(path, as_lines(make()))
        return read_examples(path)

    def verified_answers(self, teacher: str, stage: str, problems: int) -> list[Example]:
        """Sample a teacher's answers to training problems, and return those that the rules accept."""
        drawn = self.task.draw(self.rng(f"problems of {stage}"), problems)
        return rejection_sample(
            self.model(teacher), self.task.tokenizer, list({problem.prompt: problem for problem in drawn}.values()),
            RuleReward(R1_WEIGHTS), self.directory / stage, samples=self.recipe.attempts,
            kept_of_each=self.recipe.kept_of_each, seed=self.recipe.seed, max_new_tokens=MAX_NEW_TOKENS,
            progress=self.progress,
        )  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage: its trainer, the stages that it needs, and the text printed when it begins."""

    make: Callable[[R1Run], Trainer | RLTrainer]
    needs: tuple[str, ...]
    purpose: str


STAGES: dict[str, Stage] = {}
CHAIN = ("base", "cold_start", "reasoning_rl", "rejection_sft", "r1")
"""The stages that lead to R1; the last finished one has the run's model."""


def stage(purpose: str, *, after: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Register a function as the stage of its name."""

    def register(function: Callable[[R1Run], Trainer | RLTrainer]) -> Callable:
        STAGES[function.__name__] = Stage(function, tuple(after), purpose)
        return function

    return register


@stage("pre-train a base model")
def base(run: R1Run) -> Trainer:
    return run.pretraining(base_config(run.task.tokenizer.vocab_size), run.recipe.base_steps)


@stage("R1-Zero, for comparison: rewards for accuracy and format only", after=("base",))
def zero(run: R1Run) -> RLTrainer:
    return run.rl("base", R1_ZERO_WEIGHTS, run.recipe.rl_steps)


@stage("R1-Zero with a language reward for English, to measure its cost", after=("base",))
def zero_english(run: R1Run) -> RLTrainer:
    return run.rl("base", R1_WEIGHTS, run.recipe.rl_steps)


@stage("cold start: SFT of the base on long worked solutions (the paper's Dev1)", after=("base",))
def cold_start(run: R1Run) -> SFTTrainer:
    def make() -> list[Example]:
        long = run.task.difficulties
        return careful_solutions(run.task, run.rng("cold start"), run.recipe.worked_solutions, long, widths=(1,))

    examples = run.examples("cold_start", make)
    return run.sft("base", examples, run.recipe.cold_start_epochs, 1e-3)


@stage("RL with rewards for accuracy, format and language (Dev2)", after=("cold_start",))
def reasoning_rl(run: R1Run) -> RLTrainer:
    return run.rl("cold_start", R1_WEIGHTS, run.recipe.rl_steps)


@stage("SFT of the base on that model's verified answers and on documents (Dev3)", after=("base", "reasoning_rl"))
def rejection_sft(run: R1Run) -> SFTTrainer:
    def make() -> list[Example]:
        short = [n for n in run.task.document_difficulties if n not in run.task.difficulties]
        general = careful_solutions(run.task, run.rng("general"), run.recipe.general_documents, short, widths=(0, 1, 2))
        return run.verified_answers("reasoning_rl", "rejection_sft", run.recipe.rejection_problems) + general

    return run.sft("base", run.examples("rejection_sft", make), run.recipe.sft_epochs, 1e-3)


@stage("R1: RL on problems of every length", after=("rejection_sft",))
def r1(run: R1Run) -> RLTrainer:
    every_length = copy.copy(run.task)
    every_length.difficulties = run.task.document_difficulties
    return run.rl("rejection_sft", R1_WEIGHTS, run.recipe.final_rl_steps, every_length)


@stage("pre-train a small dense student")
def student(run: R1Run) -> Trainer:
    return run.pretraining(student_config(run.task.tokenizer.vocab_size), run.recipe.student_steps)


@stage("RL of the student", after=("student",))
def student_rl(run: R1Run) -> RLTrainer:
    return run.rl("student", R1_ZERO_WEIGHTS, run.recipe.rl_steps)


@stage("SFT of the student on R1's verified answers", after=("student", "r1"))
def student_sft(run: R1Run) -> SFTTrainer:
    def make() -> list[Example]:
        return run.verified_answers("r1", "student_sft", run.recipe.distillation_problems)

    examples = run.examples("student_sft", make)
    return run.sft("student", examples, run.recipe.distillation_epochs, 2e-3)


@stage("distillation of R1's logits on those answers into the student", after=("student", "r1", "student_sft"))
def student_logits(run: R1Run) -> SFTTrainer:
    examples = read_examples(run.directory / "student_sft" / "examples.jsonl")
    return run.sft("student", examples, run.recipe.distillation_epochs, 2e-3, teacher="r1")


def ledger_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the ledger as a table, one line per stage."""
    columns = [name for name in rows[0] if name.startswith(("pass@", "cons@")) and not name.endswith("interval")]
    columns += ["length", "reward/format", "reward/language", "mixed", "web", "cpu_seconds"]
    lines = [f"{'stage':16}" + "".join(f"{name.removeprefix('reward/'):>12}" for name in columns)]
    for row in rows:
        cells = ("-" if row[name] is None else f"{row[name]:.3g}" for name in columns)
        lines.append(f"{row['stage']:16}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
