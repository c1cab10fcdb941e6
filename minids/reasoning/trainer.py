"""The reinforcement learning loop: sample groups of answers, score them, and update the model by GRPO.

Notable choices: a step is a function of (model, optimizer state, step number) with random draws seeded by the number,
so a resumed run equals an uninterrupted one; every step compares the log-probabilities of training with those of
sampling; groups with zero advantages count in the averages but need no backward pass.
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

from minids.config import ModelConfig, check_fields, require
from minids.data.tokenizer import Tokenizer
from minids.files import atomic_write_text
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
from minids.training.loop import Diverged, Loop
from minids.training.metrics import Metrics
from minids.training.optimizer import make_optimizers


@dataclass(frozen=True)
class RLRecipe:
    """Settings of a GRPO run. The defaults train the base model of `r1_zero.py` in one or two minutes.

    `averaging`, `ratio`, `scale_by_std`, the clips and `kl_weight` are parameters of `grpo_loss`; `grpo.VARIANTS` has
    their values in each published variant.
    """

    steps: int = 60
    """Steps of the run; each samples answers and updates the model `inner_epochs` times."""
    prompts: int = 16
    """Problems per step; more reduce the noise of the gradient."""
    group_size: int = 16
    """Answers sampled per problem, which are compared with each other; at least 2."""
    learning_rate: float = 3e-4
    """Learning rate after warm-up; lower it if training becomes unstable."""
    warmup_steps: int = 5
    """Steps of linear warm-up to the learning rate."""
    clip_norm: float = 1.0
    """Maximum of the global gradient norm; larger gradients are scaled down to it."""
    temperature: float = 1.0
    """Sampling temperature; higher values explore more."""
    max_new_tokens: int = 72
    """Maximum length of an answer, in tokens; raise it if answers are cut off."""
    inner_epochs: int = 1
    """Optimizer steps per batch of answers; the importance ratio is 1 in the first."""
    averaging: Averaging = "token"
    """Weights of the tokens in the loss: mean per sequence (GRPO), mean over all tokens (DAPO), constant (Dr. GRPO)."""
    ratio: Ratio = "token"
    """Importance ratio of each token (GRPO) or of the whole sequence (GSPO)."""
    scale_by_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards; off in Dr. GRPO."""
    clip_low: float = 0.2
    """The importance ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The importance ratio is clipped above 1 + clip_high; a higher value permits more exploration (DAPO: 0.28)."""
    kl_weight: float = 0.0
    """Weight of the KL penalty to the reference policy; 0 trains without a reference model."""
    refresh_reference_every: int = 400
    """Steps after which the reference policy is replaced by the current one (FACTS.md section 8.1)."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by new groups, up to three times (DAPO)."""
    balance_speed: float = 0.0
    """Change of a router bias per step toward balanced load; 0 freezes the biases."""
    micro_batch_size: int = 64
    """Answers per forward and backward pass; lower it if memory runs out."""
    max_cache_bytes: int = 2**28
    """Maximum size of the KV cache in sampling, in bytes; larger batches are split."""
    seed: int = 0
    """Seed of the problems and of the sampled answers."""
    evaluate_every: int = 20
    """Steps between evaluations on held-out problems."""
    evaluation_problems: int = 240
    """Held-out problems per evaluation, at least 2; more give a less noisy value."""
    evaluation_samples: int = 4
    """Answers per held-out problem: the k of pass@k."""
    checkpoint_every: int = 20
    """Steps between checkpoints, of which the newest two are kept."""

    def __post_init__(self):
        check_fields(self, may_be_zero=("warmup_steps", "clip_low", "clip_high", "kl_weight", "balance_speed", "seed"))
        require(self.group_size >= 2, "group_size", self.group_size, "must be at least 2")
        require(self.evaluation_problems >= 2, "evaluation_problems", self.evaluation_problems, "must be at least 2")


LOGP_TOLERANCE = 1e-4
DYNAMIC_ROUNDS = 4


@dataclass(frozen=True)
class ProblemSet:
    """Your own problems, as two lists for training and evaluation; usable in place of a `Task`."""

    train: Sequence[Problem]
    test: Sequence[Problem]

    def draw(self, rng: random.Random, count: int) -> list[Problem]:
        return rng.choices(self.train, k=count)

    def held_out(self, count: int) -> list[Problem]:
        return list(self.test[:count])


def check(config: ModelConfig, tokenizer: Tokenizer, problems: Task | ProblemSet, recipe: RLRecipe) -> None:
    """Raise `ValueError` where a model, a tokenizer, problems and a recipe do not fit together."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens")
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
        """Sample and score a batch of answers, update the model `inner_epochs` times, and return the metrics.

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
                max_cache_bytes=recipe.max_cache_bytes,
            )  # fmt: skip
            sampled += missing
            flat += int(is_flat(_rewards(groups)).sum())
        return groups, flat / sampled

    def update(self, groups: list[list[Sample]], check: bool) -> Metrics:
        """Take one optimizer step on the answers. `check` compares the log-probabilities with those of sampling."""
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
        gaps: list[Tensor] = []
        model.train()
        for some in rows.split(recipe.micro_batch_size):
            part = batch.rows(some)
            logp, entropy, routings = token_logps(model, part.tokens, recipe.temperature)
            with torch.no_grad():
                ref_logp = None
                if self.reference is not None:
                    ref_logp, _, _ = token_logps(self.reference, part.tokens, recipe.temperature)
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
