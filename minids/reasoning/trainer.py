"""The reinforcement learning loop: sample groups of answers, score them, and update the model by GRPO.

Notable choices: a step is a function of (model, optimizer state, step number) with random draws seeded by the number,
so a resumed run equals an uninterrupted one; every step compares the log-probabilities of training with those of
sampling; groups with zero advantages count in the averages but need no backward pass; old log-probabilities are those
of sampling, so from the second update on a batch (`mini_batches`, `inner_epochs`) the importance ratio is not 1.
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

from minids.config import ModelConfig, require
from minids.data.tokenizer import Tokenizer
from minids.files import atomic_write_text
from minids.model.transformer import MiniDS
from minids.reasoning.grpo import group_advantages, grpo_loss, is_flat, token_weights
from minids.reasoning.off_policy import log_ratio, ratio_statistics
from minids.reasoning.recipe import RLRecipe
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
from minids.training.loop import Diverged, Loop
from minids.training.metrics import Metrics
from minids.training.optimizer import make_optimizers

LOGP_TOLERANCE = 1e-4
DYNAMIC_ROUNDS = 4


@dataclass(frozen=True)
class ProblemSet:
    """Your own problems, as two lists for training and evaluation; usable in place of a `Task`."""

    train: Sequence[Problem]
    test: Sequence[Problem]

    def __post_init__(self):
        for name in ("train", "test"):
            problems = getattr(self, name)
            given = bool(problems) and all(isinstance(problem, Problem) for problem in problems)
            require(given, name, problems[:1], "must be a list of Problem, at least one")

    def draw(self, rng: random.Random, count: int) -> list[Problem]:
        return rng.choices(self.train, k=count)

    def held_out(self, count: int) -> list[Problem]:
        return list(self.test[:count])


def check(config: ModelConfig, tokenizer: Tokenizer, problems: Task | ProblemSet, recipe: RLRecipe) -> None:
    """Raise `ValueError` where a model, a tokenizer, problems and a recipe do not fit together."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens")
    require(not recipe.keep_routing or config.num_moe_layers > 0, "keep_routing", True, "the model has no router")
    held_out = problems.held_out(recipe.evaluation_problems)
    longest = max((1 + len(tokenizer.encode(problem.prompt)) for problem in held_out), default=0)
    context, wanted = config.max_position_embeddings, recipe.max_new_tokens
    rule = f"must be at most {context - longest}: the context holds {context} tokens, a prompt has up to {longest}"
    require(longest + wanted <= context, "max_new_tokens", wanted, rule)
    with torch.device("meta"):
        needed = MiniDS(config).new_cache(1, longest + wanted).num_bytes()
    rule = f"must be at least {needed}, the cache of one sequence of {longest + wanted} tokens"
    require(needed <= recipe.max_cache_bytes, "max_cache_bytes", recipe.max_cache_bytes, rule)


class LogpMismatch(RuntimeError):
    """Training and sampling compute different probabilities, which makes GRPO's importance ratio meaningless."""


class RLTrainer(Loop):
    """Trainer by GRPO; `groups` are the answers of the last step. The base model is evaluated as step 0."""

    evaluates_the_start = True

    def __init__(
        self, model: MiniDS, tokenizer: Tokenizer, problems: Task | ProblemSet, reward: Reward, recipe: RLRecipe
    ):
        check(model.config, tokenizer, problems, recipe)
        super().__init__(model, recipe, make_optimizers(model, "adamw", recipe.learning_rate, weight_decay=0.0))
        self.tokenizer, self.problems, self.reward = tokenizer, problems, reward
        self.reference = copy.deepcopy(model).requires_grad_(False).eval() if recipe.kl_weight else None
        self.groups: list[list[Sample]] = []

    def evaluation_metrics(self, directory: Path | None) -> Metrics:
        """Evaluate the model, and write the answers of the last step to samples/."""
        if directory is not None and self.groups:
            (directory / "samples").mkdir(exist_ok=True)
            atomic_write_text(directory / "samples" / f"step-{self.step:08d}.txt", samples_as_text(self.groups))
        return self.evaluate()

    def progress_message(self, metrics: Metrics) -> str:
        return f"reward {metrics['reward']:.2f}, {metrics['length']:.0f} tokens"

    def evaluate(self) -> Metrics:
        """Return the metrics of `rollout.evaluate` (pass@1, pass@k, ...) on held-out problems, as held_out/... ."""
        recipe, problems = self.recipe, self.problems.held_out(self.recipe.evaluation_problems)
        metrics = evaluate(
            self.model.eval(), self.tokenizer, problems, self.reward, samples=recipe.evaluation_samples,
            max_new_tokens=recipe.max_new_tokens, max_cache_bytes=recipe.max_cache_bytes,
        )  # fmt: skip
        return {f"held_out/{name}": value for name, value in metrics.items()}

    def train_step(self) -> Metrics:
        """Sample and score a batch of answers, update the model once per mini-batch and epoch; return the metrics.

        Metrics of the updates are means over the batch's updates, "largest_ratio" their maximum. Raises `LogpMismatch`
        where training and sampling disagree before the first update.
        """
        recipe, began = self.recipe, time.perf_counter()
        if self.reference is not None and self.step and self.step % recipe.refresh_reference_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.groups, zero_advantage = self.collect()
        sampled = time.perf_counter()
        size, updates = recipe.prompts // recipe.mini_batches, list[Metrics]()
        for first in [*range(0, recipe.prompts, size)] * recipe.inner_epochs:
            updates.append(self.update(self.groups[first : first + size], check=not any(updates)))
        names = dict.fromkeys(name for update in updates for name in update)  # an update of flat groups has none
        means = {name: statistics.fmean(u[name] for u in updates if name in u) for name in names}
        if "largest_ratio" in means:
            means["largest_ratio"] = max(u.get("largest_ratio", 0.0) for u in updates)
        self.step += 1
        return {
            "step": self.step,
            **averages([sample for group in self.groups for sample in group]),
            "zero_advantage_groups": zero_advantage,
            **means,
            "sampling_seconds": sampled - began,
            "seconds": time.perf_counter() - began,
        }

    def collect(self) -> tuple[list[list[Sample]], float]:
        """Sample a step's groups of answers; return them and the fraction of groups with zero advantages."""
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed} {self.step}")
        generator = torch.Generator(self.model.head.weight.device).manual_seed(rng.getrandbits(63))
        self.model.eval()
        groups: list[list[Sample]] = []
        sampled = flat = 0
        for _ in range(DYNAMIC_ROUNDS if recipe.dynamic_sampling else 1):
            groups = [group for group in groups if not is_flat(_rewards([group]))]
            missing = recipe.prompts - len(groups)
            if not missing:
                break
            problems = self.problems.draw(rng, missing)
            groups += answer(
                self.model, self.tokenizer, problems, self.reward, recipe.group_size, generator=generator,
                max_new_tokens=recipe.max_new_tokens, temperature=recipe.temperature,
                max_cache_bytes=recipe.max_cache_bytes, top_p=recipe.top_p, keep_routing=recipe.keep_routing,
            )  # fmt: skip
            sampled += missing
            flat += int(is_flat(_rewards(groups)).sum())
        return groups, flat / sampled

    def update(self, groups: list[list[Sample]], check: bool) -> Metrics:
        """Take one optimizer step on the answers, unless no advantage differs from 0; return its metrics.

        `check` compares the log-probabilities with those of sampling.
        """
        recipe, model = self.recipe, self.model
        batch = pad([sample for group in groups for sample in group], model.head.weight.device)
        advantages = group_advantages(_rewards(groups), scale_by_std=recipe.scale_by_std).flatten()
        advantages = advantages.to(batch.mask.device)
        weights = token_weights(batch.mask, recipe.averaging, recipe.max_new_tokens)
        # A row with advantage 0 has only the gradient of the KL penalty. Sorting rows by length reduces the padding.
        contributing = torch.ones_like(advantages) if self.reference is not None else advantages
        rows = contributing.nonzero()[:, 0]
        if not len(rows):
            return {}
        rows = rows[batch.mask[rows].sum(1).argsort(stable=True)]
        sums: defaultdict[str, float] = defaultdict(float)
        tokens_per_expert = torch.zeros((), dtype=torch.int64, device=rows.device)
        gaps, largest = list[Tensor](), 0.0
        model.train()
        for some in rows.split(recipe.micro_batch_size):
            part = batch.rows(some)
            logp, entropy, routings = token_logps(
                model, part.tokens, recipe.temperature, part.experts, part.allowed
            )  # fmt: skip
            with torch.no_grad():
                ref_logp = None
                if self.reference is not None:
                    ref_logp, _, _ = token_logps(
                        self.reference, part.tokens, recipe.temperature, allowed=part.allowed
                    )  # fmt: skip
            loss, stats = grpo_loss(
                logp, part.old_logp, ref_logp, advantages[some], part.mask,
                clip_low=recipe.clip_low, clip_high=recipe.clip_high, kl_weight=recipe.kl_weight, ratio=recipe.ratio,
                weights=weights[some, : part.mask.shape[1]], unbiased_kl=recipe.unbiased_kl,
                off_policy_threshold=recipe.off_policy_threshold,
            )  # fmt: skip
            loss.backward()
            moved = ratio_statistics(
                log_ratio(logp.detach(), part.old_logp).masked_fill(~part.mask, 0.0), part.mask,
                ratio=recipe.ratio, clip_low=recipe.clip_low, clip_high=recipe.clip_high,
            )  # fmt: skip
            largest = max(largest, moved.pop("largest_ratio").item())
            gaps.append(((logp.detach() - part.old_logp).abs() * part.mask).amax(1))
            for name, value in (stats | moved | {"entropy": entropy[part.mask].sum()}).items():
                sums[name] += value.item()
            sums["tokens"] += part.mask.sum().item()
            if recipe.balance_speed:
                tokens_per_expert = tokens_per_expert + torch.stack(
                    [part.tokens_per_expert(routing) for routing in routings]
                )
        gap = _check_logps(torch.cat(gaps)) if check else 0.0
        norm = self.clip_gradients()
        if not math.isfinite(norm):
            raise Diverged(f"the gradient of step {self.step + 1} is {norm}: learning_rate may be too high")
        self.optimizer_step(recipe.learning_rate * min(1.0, (self.step + 1) / max(recipe.warmup_steps, 1)))
        if recipe.balance_speed:
            model.update_balance_bias(tokens_per_expert, recipe.balance_speed)
        tokens = sums.pop("tokens")
        means = {name: value / tokens for name, value in sums.items()}
        return {"gradient_norm": norm, "largest_ratio": largest} | means | ({"logp_gap": gap} if check else {})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return super().tensors() | ({"reference": self.reference.state_dict()} if self.reference is not None else {})

    def load_tensors(self, folder: Path) -> None:
        super().load_tensors(folder)
        if self.reference is not None:
            self.reference.load_state_dict(load_checkpoint(folder)[0]["reference"])


def _rewards(groups: Sequence[Sequence[Sample]]) -> Float[Tensor, "groups size"]:
    return torch.tensor([[sample.score.total for sample in group] for group in groups], dtype=torch.float32)


def _check_logps(gaps: Float[Tensor, "answers"]) -> float:
    """Return the largest gap of log-probabilities between training and sampling; `gaps` has the largest per answer.

    A token for which two experts' scores differ by less than the rounding error may be routed differently in the two
    passes, which also changes the tokens after it. Therefore 1 % of the answers, and always one answer, may exceed
    `LOGP_TOLERANCE`. Raises `LogpMismatch` for more.
    """
    far = int((gaps > LOGP_TOLERANCE).sum())
    if far > max(1, len(gaps) / 100):
        raise LogpMismatch(
            f"log-probabilities of training and sampling differ by up to {gaps.max().item():.2g}, "
            f"by more than {LOGP_TOLERANCE} in {far} of {len(gaps)} answers"
        )
    return gaps.max().item()
