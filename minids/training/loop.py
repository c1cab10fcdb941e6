"""Pre-training: what a step on text does, and how a model is judged in between.

Notable choices: a step is a function of (model, optimizer state, data position); the gradient, the loss and the expert
loads are those of the whole global batch, however it is cut into micro-batches.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from minids.config import ModelConfig, check_fields
from minids.data.batches import Batch, BatchStream, TokenizedCorpus, evaluation_batches
from minids.data.tokenizer import Tokenizer
from minids.model.fp8_linear import convert_to_fp8
from minids.model.moe import max_violation
from minids.model.transformer import MiniDS
from minids.training.loss import Losses, Share, bits_per_byte, losses
from minids.training.metrics import Metrics
from minids.training.optimizer import Schedule, make_optimizers
from minids.training.resumable import Diverged, Loop


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; sizes in sequences and tokens.

    The defaults train the preset `tiny` for two minutes on two CPU cores; larger models want smaller learning rates.
    Weights of the losses, decay and clipping are V3's (FACTS.md section 7.1).
    """

    steps: int = 800
    batch_size: int = 4
    """Sequences per optimizer step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; None takes the whole batch at once."""
    seq_len: int = 256
    learning_rate: float = 6e-3
    warmup_steps: int = 30
    optimizer: Literal["adamw", "muon"] = "adamw"
    moments: Literal["fp32", "bf16"] = "fp32"
    """In what AdamW's moments rest; V3's rest in bf16."""
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mtp_weight: float = 0.3
    """Weight of the multi-token prediction loss; a third of it once the learning rate falls."""
    balance_speed: float = 0.001
    """How far a step moves a router's bias; 0 in the last stretch."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    seed: int = 0
    evaluate_every: int = 100
    evaluation_batches: int = 16
    checkpoint_every: int = 100

    def __post_init__(self):
        check_fields(self, may_be_zero=("warmup_steps", "seed", "weight_decay", "mtp_weight", "balance_speed"))


@dataclass(frozen=True)
class TextData:
    """What a model is trained and judged on."""

    train: TokenizedCorpus
    validation: TokenizedCorpus
    tokenizer: Tokenizer


def training_batches(data: TextData, recipe: Recipe) -> BatchStream:
    """The global batches of a run, from the first."""
    return BatchStream(data.train, batch_size=recipe.batch_size, seq_len=recipe.seq_len, seed=recipe.seed)


def validation_batches(data: TextData, recipe: Recipe) -> Iterator[Batch]:
    """What a run is judged on."""
    rows = recipe.micro_batch_size or recipe.batch_size
    return evaluation_batches(
        data.validation, batch_size=rows, seq_len=recipe.seq_len, max_batches=recipe.evaluation_batches
    )


def check(config: ModelConfig, data: TextData, recipe: Recipe) -> None:
    """Raise `ValueError` where a model, a text and a recipe do not fit together."""
    if recipe.seq_len > config.max_position_embeddings:
        raise ValueError(f"seq_len={recipe.seq_len}: the context holds {config.max_position_embeddings}")
    if data.tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size}: the tokenizer has {data.tokenizer.vocab_size} tokens")
    training_batches(data, recipe)  # a text that is too short should be known now
    validation_batches(data, recipe)


class Trainer(Loop):
    """A model that learns from text; its checkpoints also hold the position in the text."""

    def __init__(self, model: MiniDS, data: TextData, recipe: Recipe):
        check(model.config, data, recipe)
        if recipe.precision == "fp8":
            convert_to_fp8(model)
        optimizers = make_optimizers(
            model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.moments
        )
        super().__init__(model, recipe, optimizers)
        self.data, self.schedule = data, Schedule(recipe.steps, recipe.warmup_steps)
        self.stream = training_batches(data, recipe)

    def judge(self, directory: Path | None) -> Metrics:
        return {"validation_bits_per_byte": self.evaluate()}

    def summary(self, metrics: Metrics) -> str:
        return f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s"

    def train_step(self) -> Metrics:
        """One optimizer step on the next global batch. Raises `Diverged`, leaving the weights as they were."""
        recipe, began = self.recipe, time.perf_counter()
        mtp_weight = recipe.mtp_weight / (3 if self.schedule.is_falling(self.step) else 1)
        learning_rate = recipe.learning_rate * self.schedule.learning_rate_factor(self.step)
        balance_speed = 0.0 if self.schedule.has_fallen(self.step) else recipe.balance_speed

        self.model.train()
        sums, loads = self.backward(next(self.stream), mtp_weight)
        norm = self.clip_gradients()
        main = sums.main.item()
        if not math.isfinite(norm) or not main < 3 * math.log(self.model.config.vocab_size):
            raise Diverged(
                f"training diverged in step {self.step + 1} (loss {main:.4g}, gradient norm {norm:.4g}): "
                f"learning_rate={recipe.learning_rate!r} may be too high"
            )

        self.descend(learning_rate)
        self.step += 1
        metrics = {
            "step": self.step,
            "loss": main,
            "mtp_loss": sums.mtp.item(),
            "balance_loss": sums.balance.item(),
            "learning_rate": learning_rate,
            "gradient_norm": norm,
        }
        if loads is not None:
            self.model.update_balance_bias(loads, balance_speed)
            metrics["max_violation"] = max_violation(loads).mean().item()
        tokens = recipe.batch_size * recipe.seq_len
        seconds = time.perf_counter() - began
        return metrics | {"tokens": self.step * tokens, "tokens_per_second": tokens / seconds}

    def backward(
        self, batch: Batch, mtp_weight: float, share: Share | None = None
    ) -> tuple[Losses, torch.Tensor | None]:
        """Gradients, losses and expert loads of a global batch, whatever the micro-batches it is cut into.

        With `share`, that of the global batch, `batch` is a part of one.
        """
        share = share or Share.of(batch)
        device = self.model.head.weight.device
        parts, loads = [], None
        for micro in micro_batches(batch, self.recipe.micro_batch_size or len(batch.tokens)):
            micro = Batch(micro.tokens.to(device), micro.documents.to(device), micro.domains)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                out = self.model(micro.tokens[:, :-1], mtp=bool(mtp_weight))
            part = losses(self.model, out, micro, share)
            part.total(mtp_weight).backward()
            parts.append(Losses(part.main.detach(), part.mtp.detach(), part.balance.detach()))
            if out.routings:
                loads = out.loads if loads is None else loads + out.loads
        return Losses(*(sum(getattr(p, f.name) for p in parts) for f in dataclasses.fields(Losses))), loads

    def evaluate(self) -> float:
        """Bits per byte of a fixed sample of the validation text."""
        self.model.eval()
        return bits_per_byte(self.model, validation_batches(self.data, self.recipe), self.data.tokenizer.token_bytes())

    def state(self) -> dict[str, Any]:
        return super().state() | {"data": self.stream.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.stream.load_state_dict(state["data"])


def train(model: MiniDS, data: TextData, recipe: Recipe, **options: Any) -> list[Metrics]:
    """Train `model` in place; options as in `Loop.run`: directory, progress, tensorboard, on_step."""
    return Trainer(model, data, recipe).run(**options)


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """The rows of `batch`, `size` at a time."""
    parts = (getattr(batch, f.name).split(size) for f in dataclasses.fields(Batch))
    return (Batch(*part) for part in zip(*parts, strict=True))
