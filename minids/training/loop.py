"""The training loop: one function that trains a model on a corpus and can be stopped, killed and resumed.

Notable choices: a step is a function of (model, optimizer state, data position), so a resumed run repeats the
undisturbed one bit for bit; the gradient, the loss and the expert loads are those of the whole global batch, however it
is cut into micro-batches; every step leaves one JSON object in metrics.jsonl.
"""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from minids.config import ModelConfig
from minids.data.batches import Batch, BatchStream, TokenizedCorpus, evaluation_batches
from minids.data.tokenizer import Tokenizer
from minids.model.fp8_linear import convert_to_fp8
from minids.model.moe import max_violation
from minids.model.transformer import MiniDS
from minids.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    random_states,
    read_state,
    save_checkpoint,
    set_random_states,
)
from minids.training.loss import Losses, Share, bits_per_byte, losses
from minids.training.metrics import Metrics, cut_metrics, metrics_file, tensorboard_scalars
from minids.training.optimizer import Schedule, make_optimizers, set_learning_rate


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
        for name in ("steps", "batch_size", "seq_len", "evaluate_every", "evaluation_batches", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")
        for name in ("warmup_steps", "seed", "weight_decay", "mtp_weight", "balance_speed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a finite number, at least 0")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a finite number above 0")
        if self.moments not in ("fp32", "bf16"):
            raise ValueError(f"moments={self.moments!r}: must be fp32 or bf16")
        if self.precision not in ("fp32", "bf16", "fp8"):
            raise ValueError(f"precision={self.precision!r}: must be fp32, bf16 or fp8")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size!r}: must be at least 1")


@dataclass(frozen=True)
class TextData:
    """What a model is trained and judged on."""

    train: TokenizedCorpus
    validation: TokenizedCorpus
    tokenizer: Tokenizer


class Diverged(RuntimeError):
    """The loss became infinite, not a number, or far worse than a blind guess."""


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


class Trainer:
    """A model in training: everything that a checkpoint holds."""

    writes_files = True  # of several processes that train one model, one does

    def __init__(self, model: MiniDS, data: TextData, recipe: Recipe):
        check(model.config, data, recipe)
        if recipe.precision == "fp8":
            convert_to_fp8(model)
        self.model, self.data, self.recipe = model, data, recipe
        self.schedule = Schedule(recipe.steps, recipe.warmup_steps)
        self.optimizers = make_optimizers(
            model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.moments
        )
        self.stream = training_batches(data, recipe)
        self.step = 0

    def run(
        self,
        *,
        directory: Path | None = None,
        resume: bool = False,
        progress: bool = True,
        tensorboard: bool = False,
        on_step: Callable[[Metrics], None] | None = None,
    ) -> list[Metrics]:
        """Train to the end of the recipe, or to the first Ctrl-C; returns the metrics of the steps taken.

        With `directory`, checkpoints and metrics.jsonl are kept there, with `tensorboard` also a folder of that name;
        `resume` goes on from the newest checkpoint.
        Raises `Diverged` when the loss explodes (the last good checkpoint stays), `ValueError` when there is nothing to
        resume.
        """
        steps = self.recipe.steps
        if resume:
            newest = latest_checkpoint(directory / "checkpoints")
            if newest is None:
                raise ValueError(f"{directory} holds no checkpoint to resume from")
            self.load(newest)
        written = directory if self.writes_files else None
        if written is not None:
            cut_metrics(written / "metrics.jsonl", self.step)
        history, hidden = [], not (progress and self.writes_files)
        bar = tqdm(total=steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True)
        scalars = tensorboard_scalars(written if tensorboard else None, self.step)
        with bar, stop_requests() as stop_requested, scalars as chart, metrics_file(written) as write:
            while self.step < steps and not self.should_stop(stop_requested.is_set()):
                metrics = self.train_step()
                if self.step == steps or self.step % self.recipe.evaluate_every == 0:
                    metrics["validation_bits_per_byte"] = self.evaluate()
                write(metrics)
                chart(metrics)
                history.append(metrics)
                if on_step is not None:
                    on_step(metrics)
                speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed}", refresh=False)
                bar.update()
                if directory is not None and (self.step == steps or self.step % self.recipe.checkpoint_every == 0):
                    self.save(directory / "checkpoints")
            if directory is not None and self.step < steps:
                self.save(directory / "checkpoints")
        return history

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

        set_learning_rate(self.optimizers, learning_rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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

    def clip_gradients(self) -> float:
        """Scale the gradients down to the norm `clip_norm`; returns the norm they had."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm).item()

    def should_stop(self, requested: bool) -> bool:
        """Asked before every step; `requested` says whether Ctrl-C or SIGTERM came."""
        return requested

    def evaluate(self) -> float:
        """Bits per byte of a fixed sample of the validation text."""
        self.model.eval()
        return bits_per_byte(self.model, self.validation_batches(), self.data.tokenizer.token_bytes())

    def validation_batches(self) -> Iterator[Batch]:
        """The same `evaluation_batches` batches each time."""
        return validation_batches(self.data, self.recipe)

    def save(self, directory: Path) -> None:
        """Write the checkpoint of this step, then drop all but the two newest."""
        tensors = {
            "model": {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta},
            "optimizer": optimizer_tensors(self.model, self.optimizers),
            "random": random_states(self.model),
        }
        state = {
            "step": self.step,
            "config": self.model.config.to_dict(),
            "recipe": dataclasses.asdict(self.recipe),
            "data": self.stream.state_dict(),
        }
        destination = directory / f"step-{self.step:08d}"
        if not destination.exists():
            self.write_checkpoint(destination, tensors, state)
        for old in sorted(directory.glob("step-*"))[:-2] if self.writes_files else ():
            remove_checkpoint(old)

    write_checkpoint = staticmethod(save_checkpoint)

    def load(self, folder: Path) -> None:
        """Go on where the checkpoint was written. Raises `ValueError` where it is damaged or of another run."""
        state = read_state(folder)
        if state["config"] != self.model.config.to_dict():
            raise ValueError(f"{folder} is of a model with another config")
        changed = [k for k, v in dataclasses.asdict(self.recipe).items() if state["recipe"].get(k, v) != v]
        if changed:
            name = changed[0]
            was = state["recipe"][name]
            raise ValueError(f"{name}={getattr(self.recipe, name)!r}: the run was started with {was!r}")
        self.stream.load_state_dict(state["data"])
        self.load_tensors(folder)
        self.step = state["step"]

    def load_tensors(self, folder: Path) -> None:
        """Weights, optimizer and random states of a checkpoint."""
        tensors, _ = load_checkpoint(folder)
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.model, self.optimizers, tensors["optimizer"])
        set_random_states(tensors["random"])


def train(model: MiniDS, data: TextData, recipe: Recipe, **options: Any) -> list[Metrics]:
    """Train `model` in place; options as in `Trainer.run`: directory, resume, progress, tensorboard, on_step."""
    return Trainer(model, data, recipe).run(**options)


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """The rows of `batch`, `size` at a time."""
    parts = (getattr(batch, f.name).split(size) for f in dataclasses.fields(Batch))
    return (Batch(*part) for part in zip(*parts, strict=True))


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete, with the file that makes it a checkpoint first, so that a half-deleted one is none."""
    (checkpoint / "state.json").unlink(missing_ok=True)
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second interrupts at once. Only the main thread listens."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def request(number, frame):
        requested.set()
        signal.signal(number, before[number])

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
