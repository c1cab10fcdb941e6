"""The reinforcement learning loop: sample groups of answers, score them, take a step of GRPO; stop, resume, repeat.

Notable choices: a step is a function of (model, optimizer state, step number), its random draws being seeded by the
number, so a resumed run repeats the undisturbed one; what was sampled is checked against what is trained, every step;
groups that teach nothing count in the averages but cost no backward pass.
"""

import copy
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from minids.config import check_fields, require
from minids.data.tokenizer import Tokenizer
from minids.files import write_text_whole
from minids.model.transformer import MiniDS
from minids.reasoning.grpo import Averaging, Ratio, group_advantages, grpo_loss, is_flat, token_weights
from minids.reasoning.rewards import Reward
from minids.reasoning.rollout import (
    Sample,
    answer,
    averages,
    evaluate,
    pad,
    samples_as_text,
    token_logps,
)
from minids.reasoning.tasks import Problem, Task
from minids.training.checkpoint import load_checkpoint
from minids.training.metrics import Metrics
from minids.training.optimizer import make_optimizers
from minids.training.resumable import Diverged, Loop


@dataclass(frozen=True)
class RLRecipe:
    """How a model is taught by rewards. The defaults teach the base of `zero.py` in a minute or two.

    `averaging`, `ratio`, `scale_by_std`, the clips and `kl_weight` are those of `grpo_loss`; `grpo.VARIANTS` has them
    for each published variant.
    """

    steps: int = 60
    prompts: int = 16
    """Problems a step."""
    group_size: int = 16
    """Answers to each problem."""
    learning_rate: float = 3e-4
    warmup_steps: int = 5
    clip_norm: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 72
    inner_epochs: int = 1
    """Optimizer steps on each batch of answers; the ratio is 1 in the first."""
    averaging: Averaging = "token"
    ratio: Ratio = "token"
    scale_by_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    refresh_reference_every: int = 400
    """Steps after which the reference becomes the present model (FACTS.md section 8.1)."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by new ones, up to three times (DAPO)."""
    balance_speed: float = 0.0
    """How far a step moves a router's bias; 0 freezes the biases."""
    micro_batch_size: int = 64
    max_cache_bytes: int = 2**28
    """Memory that the cache may take while sampling."""
    seed: int = 0
    evaluate_every: int = 20
    evaluation_problems: int = 240
    evaluation_samples: int = 4
    """Samples of each held-out problem: k of pass@k."""
    checkpoint_every: int = 20

    def __post_init__(self):
        check_fields(self, may_be_zero=("warmup_steps", "clip_low", "clip_high", "kl_weight", "balance_speed", "seed"))
        require(self.group_size >= 2, "group_size", self.group_size, "must be at least 2")
        require(self.evaluation_problems >= 2, "evaluation_problems", self.evaluation_problems, "must be at least 2")


LOGP_TOLERANCE = 1e-4
DYNAMIC_ROUNDS = 4


@dataclass(frozen=True)
class ProblemSet:
    """Problems from two lists, to train on and to judge by: what a `Task` is, of one's own problems."""

    train: Sequence[Problem]
    test: Sequence[Problem]

    def draw(self, rng: random.Random, count: int) -> list[Problem]:
        return rng.choices(self.train, k=count)

    def held_out(self, count: int) -> list[Problem]:
        return list(self.test[:count])


class LogpMismatch(RuntimeError):
    """Training computes other probabilities than sampling did: the ratio of GRPO would mean nothing."""


class RLTrainer(Loop):
    """A model that learns from rewards; `groups` are the answers of the last step. The base is judged as step 0."""

    judges_the_start = True

    def __init__(
        self, model: MiniDS, tokenizer: Tokenizer, problems: Task | ProblemSet, reward: Reward, recipe: RLRecipe
    ):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"vocab_size={model.config.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens")
        super().__init__(model, recipe, make_optimizers(model, "adamw", recipe.learning_rate, weight_decay=0.0))
        self.tokenizer, self.problems, self.reward = tokenizer, problems, reward
        self.reference = copy.deepcopy(model).requires_grad_(False).eval() if recipe.kl_weight else None
        self.groups: list[list[Sample]] = []

    def judge(self, directory: Path | None) -> Metrics:
        """How well the model does, and in samples/ the answers of the last step."""
        if directory is not None and self.groups:
            (directory / "samples").mkdir(exist_ok=True)
            write_text_whole(directory / "samples" / f"step-{self.step:08d}.txt", samples_as_text(self.groups))
        return self.evaluate()

    def summary(self, metrics: Metrics) -> str:
        return f"reward {metrics['reward']:.2f}, {metrics['length']:.0f} tokens"

    def evaluate(self) -> Metrics:
        """pass@1, pass@k and the rest of `rollout.evaluate` on held-out problems, as held_out/... ."""
        recipe, problems = self.recipe, self.problems.held_out(self.recipe.evaluation_problems)
        metrics = evaluate(
            self.model.eval(), self.tokenizer, problems, self.reward, samples=recipe.evaluation_samples,
            max_new_tokens=recipe.max_new_tokens, max_cache_bytes=recipe.max_cache_bytes,
        )  # fmt: skip
        return {f"held_out/{name}": value for name, value in metrics.items()}

    def train_step(self) -> Metrics:
        """Sample, score, and update `inner_epochs` times.

        Raises `LogpMismatch` where training and sampling disagree.
        """
        recipe, began = self.recipe, time.perf_counter()
        if self.reference is not None and self.step and self.step % recipe.refresh_reference_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.groups, zero_advantage = self.collect()
        sampled = time.perf_counter()
        updates = [self.update(self.groups, check=epoch == 0) for epoch in range(recipe.inner_epochs)]
        self.step += 1
        return {
            "step": self.step,
            **averages([sample for group in self.groups for sample in group]),
            "zero_advantage_groups": zero_advantage,
            **{name: statistics.fmean(u[name] for u in updates if name in u) for name in updates[0]},
            "sampling_seconds": sampled - began,
            "seconds": time.perf_counter() - began,
        }

    def collect(self) -> tuple[list[list[Sample]], float]:
        """A step's groups of answers, and the share of all groups sampled that had nothing to teach."""
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed} {self.step}")
        options = dict(
            max_new_tokens=recipe.max_new_tokens, temperature=recipe.temperature,
            generator=torch.Generator(self.model.head.weight.device).manual_seed(rng.getrandbits(63)),
            max_cache_bytes=recipe.max_cache_bytes,
        )  # fmt: skip
        self.model.eval()
        groups: list[list[Sample]] = []
        asked = flat = 0
        for _ in range(DYNAMIC_ROUNDS if recipe.dynamic_sampling else 1):
            groups = [group for group in groups if not is_flat(_rewards([group]))]
            missing = recipe.prompts - len(groups)
            if not missing:
                break
            problems = self.problems.draw(rng, missing)
            groups += answer(self.model, self.tokenizer, problems, self.reward, recipe.group_size, **options)
            asked += missing
            flat += int(is_flat(_rewards(groups)).sum())
        return groups, flat / asked

    def update(self, groups: list[list[Sample]], check: bool) -> Metrics:
        """One optimizer step on the answers. With `check`, compare log-probabilities with those of sampling."""
        recipe, model = self.recipe, self.model
        batch = pad([sample for group in groups for sample in group], model.head.weight.device)
        advantages = group_advantages(_rewards(groups), scale_by_std=recipe.scale_by_std).flatten()
        advantages = advantages.to(batch.mask.device)
        weights = token_weights(batch.mask, recipe.averaging, recipe.max_new_tokens)
        # A row without advantage has no gradient but the penalty's. Rows of similar length together need less padding.
        taught = torch.ones_like(advantages) if self.reference is not None else advantages
        rows = taught.nonzero()[:, 0]
        if not len(rows):
            return {}
        rows = rows[batch.mask[rows].sum(1).argsort(stable=True)]
        sums: defaultdict[str, float] = defaultdict(float)
        loads = torch.zeros((), dtype=torch.int64, device=rows.device)
        gaps: list[Tensor] = []
        model.train()
        for some in rows.split(recipe.micro_batch_size):
            part = batch.rows(some)
            logp, entropy, routings = token_logps(model, part.tokens, recipe.temperature)
            with torch.no_grad():
                ref_logp = self.reference and token_logps(self.reference, part.tokens, recipe.temperature)[0]
            loss, stats = grpo_loss(
                logp, part.old_logp, ref_logp, advantages[some], part.mask,
                clip_low=recipe.clip_low, clip_high=recipe.clip_high, kl_weight=recipe.kl_weight, ratio=recipe.ratio,
                weights=weights[some, : part.mask.shape[1]],
            )  # fmt: skip
            loss.backward()
            gaps.append(((logp.detach() - part.old_logp).abs() * part.mask).amax(1))
            for name, value in (stats | {"entropy": entropy[part.mask].sum()}).items():
                sums[name] += value.item()
            sums["tokens"] += part.mask.sum().item()
            if recipe.balance_speed:
                loads = loads + torch.stack([part.load(routing) for routing in routings])
        gap = _check_logps(torch.cat(gaps)) if check else 0.0
        norm = self.clip_gradients()
        if not math.isfinite(norm):
            raise Diverged(f"the gradient of step {self.step + 1} is {norm}: learning_rate may be too high")
        self.descend(recipe.learning_rate * min(1.0, (self.step + 1) / max(recipe.warmup_steps, 1)))
        if recipe.balance_speed:
            model.update_balance_bias(loads, recipe.balance_speed)
        tokens = sums.pop("tokens")
        means = {name: value / tokens for name, value in sums.items()}
        return {"gradient_norm": norm} | means | ({"logp_gap": gap} if check else {})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return super().tensors() | ({"reference": self.reference.state_dict()} if self.reference is not None else {})

    def load_tensors(self, folder: Path) -> None:
        super().load_tensors(folder)
        if self.reference is not None:
            self.reference.load_state_dict(load_checkpoint(folder)[0]["reference"])


def _rewards(groups: Sequence[Sequence[Sample]]) -> Float[Tensor, "groups size"]:
    return torch.tensor([[sample.score.total for sample in group] for group in groups], dtype=torch.float32)


def _check_logps(gaps: Float[Tensor, "answers"]) -> float:
    """The largest gap between training and sampling, of the largest of each answer.

    A token whose two best experts score within rounding of each other may be routed differently in the two passes,
    which also moves what follows it: one answer in a hundred may lie further apart, and a single one in any case.
    """
    far = int((gaps > LOGP_TOLERANCE).sum())
    if far > max(1, len(gaps) / 100):
        raise LogpMismatch(
            f"log-probabilities of training and sampling differ by up to {gaps.max().item():.2g}, "
            f"by more than {LOGP_TOLERANCE} in {far} of {len(gaps)} answers"
        )
    return gaps.max().item()
