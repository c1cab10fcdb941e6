"""What one model wrote becomes what another learns: rejection sampling, and the classical way, learning from logits.

Notable choices: answers are sampled in rounds, whose draws are seeded by the round's number; a killed sampling goes on
after the last whole round with the answers it would have drawn. What is dropped is on file too, since it says as much
about a model as what is kept.
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
from minids.files import write_text_whole
from minids.model.transformer import MiniDS
from minids.reasoning.rewards import Reward
from minids.reasoning.rollout import Sample, answer
from minids.reasoning.sft import Example, SFTTrainer, as_lines
from minids.reasoning.tasks import Problem
from minids.reasoning.zero import base_config
from minids.training.loop import Recipe, TextData
from minids.training.loss import IGNORED, Losses, Share, targets

REASONS = ("wrong", "form", "language", "duplicate", "enough", "kept")
"""Why an answer is dropped, in the order in which it is asked, or kept."""


@dataclass(frozen=True)
class Attempt:
    """An answer of a teacher, and what rules say of it: parts of the reward by name."""

    prompt: str
    answer: str
    parts: dict[str, float]

    @classmethod
    def of(cls, sample: Sample) -> "Attempt":
        return cls(sample.problem.prompt, sample.response.text.removesuffix("<eos>"), dict(sample.score.parts))


def select(attempts: Sequence[Attempt], per_problem: int) -> list[str]:
    """The reason for each attempt (FACTS.md section 8.3): right, well formed, in one language, new, at most so many."""
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
    seed: int = 0,
    at_once: int = 64,
    progress: bool = True,
    **options,
) -> list[Attempt]:
    """`samples` answers to each problem, kept as the lines of `path`; goes on where that file ends.

    A round answers `at_once` problems. Options as in `rollout.sample`.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = sum(line.endswith("\n") for line in lines)
    first = len(problems) if whole == len(problems) * samples else whole // (at_once * samples) * at_once
    write_text_whole(path, "".join(lines[: first * samples]))
    attempts = [Attempt(**json.loads(line)) for line in lines[: first * samples]]
    model.eval()
    bar = tqdm(total=len(problems), initial=first, unit="problem", disable=not progress, dynamic_ncols=True)
    with bar, path.open("a") as file:
        for round_number in range(math.ceil(first / at_once), math.ceil(len(problems) / at_once)):
            draw = random.Random(f"{seed} {round_number}").getrandbits(63)
            some = problems[round_number * at_once : (round_number + 1) * at_once]
            generator = torch.Generator(model.head.weight.device).manual_seed(draw)
            groups = answer(model, tokenizer, some, reward, samples, generator=generator, **options)
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
    **options,
) -> list[Example]:
    """The attempts that `select` keeps. In `directory`: attempts.jsonl, all of them; reasons.json, how many for what.

    Options as in `sample_attempts`. Raises `ValueError` where none is kept.
    """
    attempts = sample_attempts(model, tokenizer, problems, reward, directory / "attempts.jsonl", **options)
    reasons = select(attempts, kept_of_each)
    write_text_whole(directory / "reasons.json", json.dumps(Counter(reasons)))
    kept = [Example(a.prompt, a.answer) for a, reason in zip(attempts, reasons, strict=True) if reason == "kept"]
    if not kept:
        raise ValueError(f"{directory}: rules accept none of {len(attempts)} answers; the model needs more training")
    return kept


def student_config(vocab_size: int) -> ModelConfig:
    """A dense student of 60 thousand parameters: plain multi-head attention, two layers, no experts."""
    return base_config(vocab_size).replace(
        attention="gqa", hidden_size=48, intermediate_size=128, num_hidden_layers=2, first_k_dense_replace=2,
        v_head_dim=12,
    )  # fmt: skip


def distillation_loss(
    logits: Float[Tensor, "tokens vocab"], teacher_logits: Float[Tensor, "tokens vocab"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats, summed over tokens, times temperature^2, which keeps the gradient's size.

    Both distributions are softened by the temperature (Hinton, Vinyals, Dean 2015, section 2).
    """
    student, teacher = ((x.float() / temperature).log_softmax(-1) for x in (logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


class LogitTrainer(SFTTrainer):
    """Teaches examples, with a teacher's whole distribution of each answer token in place of the token itself."""

    def __init__(self, model: MiniDS, teacher: MiniDS, examples: Sequence[Example], text: TextData, recipe: Recipe):
        super().__init__(model, examples, text, recipe)
        if teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"vocab_size={model.config.vocab_size}: to learn from its logits, a student needs the teacher's "
                f"{teacher.config.vocab_size} tokens"
            )
        self.teacher = teacher.eval()

    def backward(
        self, batch: Batch, mtp_weight: float, share: Share | None = None
    ) -> tuple[Losses, Int[Tensor, "layers experts"] | None]:
        """Gradients of the mean over the answers' tokens; `Losses.main` is that mean."""
        share = share or Share.of(batch)
        answered = targets(batch) != IGNORED
        out = self.model(batch.tokens[:, :-1])
        with torch.no_grad():
            teacher_logits = self.teacher(batch.tokens[:, :-1]).logits[answered]
        loss = distillation_loss(out.logits[answered], teacher_logits) / share.targets
        loss.backward()
        none = loss.new_zeros(())
        return Losses(loss.detach(), none, none), out.loads if out.routings else None
