"""Distillation: rejection sampling of a teacher's answers, and classical distillation from its logits.

Notable choices: answers are sampled in rounds, seeded by the round's number, so an interrupted sampling continues after
the last complete round with the same answers as without interruption. Dropped answers are stored too, because they show
a model's errors.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from minids.config import ModelConfig
from minids.data.batches import Batch
from minids.data.tokenizer import Tokenizer
from minids.files import atomic_write_text
from minids.model.layers import at_least_float32
from minids.model.transformer import MiniDS
from minids.reasoning.r1_zero import base_config
from minids.reasoning.rewards import Reward
from minids.reasoning.rollout import Sample, answer
from minids.reasoning.sft import Example, SFTTrainer, as_lines
from minids.reasoning.tasks import Problem
from minids.training.loss import IGNORED, LossDenominators, Losses, targets
from minids.training.pretrain import Recipe, TextData

REASONS = ("wrong", "form", "language", "duplicate", "enough", "kept")
"""Why an answer is dropped, in the order of the checks, or "kept"; "form" is the format."""


@dataclass(frozen=True)
class Attempt:
    """An answer of a teacher with its rule-based rewards, by name of the part."""

    prompt: str
    answer: str
    parts: dict[str, float]

    @classmethod
    def of(cls, sample: Sample) -> "Attempt":
        return cls(sample.problem.prompt, sample.response.text.removesuffix("<eos>"), dict(sample.score.parts))


def select(attempts: Sequence[Attempt], per_problem: int) -> list[str]:
    """Return one of `REASONS` per attempt (FACTS.md section 8.3): at most `per_problem` are kept of each problem.

    Kept answers are correct, in the required format, in one language, and not duplicates.
    """
    taken: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    reasons = []
    for attempt in attempts:
        if attempt.parts["accuracy"] < 1:
            reason = "wrong"
        elif attempt.parts["format"] < 1:
            reason = "form"
        elif attempt.parts["language"] < 1:
            reason = "language"
        elif (attempt.prompt, attempt.answer) in seen:
            reason = "duplicate"
        else:
            reason = "enough" if taken[attempt.prompt] == per_problem else "kept"
        if reason == "kept":
            taken[attempt.prompt] += 1
            seen.add((attempt.prompt, attempt.answer))
        reasons.append(reason)
    return reasons


def sample_attempts(
    model: MiniDS,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    path: Path,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_cache_bytes: int = 2**28,
    seed: int = 0,
    at_once: int = 64,
    progress: bool = True,
) -> list[Attempt]:
    """Sample `samples` answers to each problem and store them as lines of `path`; resume after its last full round.

    A round answers `at_once` problems. Length, temperature and size of the cache are those of `rollout.sample`.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = sum(line.endswith("\n") for line in lines)
    first = len(problems) if whole == len(problems) * samples else whole // (at_once * samples) * at_once
    atomic_write_text(path, "".join(lines[: first * samples]))
    attempts = [Attempt(**json.loads(line)) for line in lines[: first * samples]]
    model.eval()
    bar = tqdm(total=len(problems), initial=first, unit="problem", disable=not progress, dynamic_ncols=True)
    with bar, path.open("a") as file:
        for round_number in range(math.ceil(first / at_once), math.ceil(len(problems) / at_once)):
            draw = random.Random(f"{seed} {round_number}").getrandbits(63)
            some = problems[round_number * at_once : (round_number + 1) * at_once]
            groups = answer(
                model, tokenizer, some, reward, samples, max_new_tokens=max_new_tokens, temperature=temperature,
                generator=torch.Generator(model.head.weight.device).manual_seed(draw), max_cache_bytes=max_cache_bytes,
            )  # fmt: skip
            new = [Attempt.of(sample) for group in groups for sample in group]
            file.write(as_lines(new))
            file.flush()
            attempts += new
            bar.update(len(some))
    return attempts


def rejection_sample(
    model: MiniDS,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    directory: Path,
    *,
    kept_of_each: int,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_cache_bytes: int = 2**28,
    seed: int = 0,
    at_once: int = 64,
    progress: bool = True,
) -> list[Example]:
    """Return the attempts that `select` keeps. `directory` gets attempts.jsonl (all) and reasons.json (counts).

    The arguments after `kept_of_each` are those of `sample_attempts`. Raises `ValueError` where none is kept.
    """
    attempts = sample_attempts(
        model, tokenizer, problems, reward, directory / "attempts.jsonl", samples=samples,
        max_new_tokens=max_new_tokens, temperature=temperature, max_cache_bytes=max_cache_bytes, seed=seed,
        at_once=at_once, progress=progress,
    )  # fmt: skip
    reasons = select(attempts, kept_of_each)
    atomic_write_text(directory / "reasons.json", json.dumps(Counter(reasons)))
    kept = [Example(a.prompt, a.answer) for a, reason in zip(attempts, reasons, strict=True) if reason == "kept"]
    if not kept:
        raise ValueError(f"{directory}: the rules accept none of {len(attempts)} answers; train the model longer")
    return kept


def student_config(vocab_size: int) -> ModelConfig:
    """Return the config of a dense student of 60 thousand parameters: multi-head attention, two layers, no experts."""
    return base_config(vocab_size).replace(
        attention="gqa", hidden_size=48, intermediate_size=128, num_hidden_layers=2, first_k_dense_replace=2,
        v_head_dim=12,
    )  # fmt: skip


def distillation_loss(
    logits: Float[Tensor, "tokens vocab"], teacher_logits: Float[Tensor, "tokens vocab"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Return KL(teacher || student) in nats, summed over tokens, times temperature^2 to keep the gradient's magnitude.

    Both distributions are softened by the temperature (Hinton, Vinyals, Dean 2015, section 2).
    """
    student, teacher = ((at_least_float32(x) / temperature).log_softmax(-1) for x in (logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def check_teacher(student: MiniDS, teacher: MiniDS) -> None:
    """Raise `ValueError` where two models' vocabularies differ, so that one cannot learn from the other's logits."""
    if teacher.config.vocab_size != student.config.vocab_size:
        raise ValueError(
            f"vocab_size={student.config.vocab_size}: must be the teacher's {teacher.config.vocab_size}, "
            "to learn from its logits"
        )


class LogitTrainer(SFTTrainer):
    """Distillation from logits: the target of each answer token is the teacher's distribution instead of the token."""

    def __init__(self, model: MiniDS, teacher: MiniDS, examples: Sequence[Example], text: TextData, recipe: Recipe):
        super().__init__(model, examples, text, recipe)
        check_teacher(model, teacher)
        self.teacher = teacher.eval()

    def backward(
        self, batch: Batch, mtp_weight: float, denominators: LossDenominators | None = None
    ) -> tuple[Losses, Int[Tensor, "layers experts"] | None]:
        """Compute the gradients of the mean distillation loss over the answers' tokens; `Losses.main` is that mean."""
        denominators = denominators or LossDenominators.of(batch)
        answered = targets(batch) != IGNORED
        out = self.model(batch.tokens[:, :-1])
        with torch.no_grad():
            teacher_logits = self.teacher(batch.tokens[:, :-1]).logits[answered]
        loss = distillation_loss(out.logits[answered], teacher_logits) / denominators.targets
        loss.backward()
        none = loss.new_zeros(())
        return Losses(loss.detach(), none, none, none), out.tokens_per_expert if out.routings else None
