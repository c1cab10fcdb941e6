"""The training loop: one function that trains a model on a corpus and can be stopped, killed and resumed.

Notable choices: a step is a function of (model, optimizer state, data position), so a resumed run repeats the
undisturbed one bit for bit; the gradient, the loss and the expert loads are those of the whole global batch, however it
is cut into micro-batches; every step leaves one JSON object in metrics.jsonl.
"""

import dataclasses
import json
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

from minids.data.batches import Batch, BatchStream, TokenizedCorpus, evaluation_batches
from minids.data.tokenizer import Tokenizer
from minids.files import write_text_whole
from minids.model.fp8_linear import convert_to_fp8
from minids.model.moe import max_violation
from minids.model.transformer import MiniDS
from minids.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from minids.training.loss import Losses, Share, bits_per_byte, losses
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


Metrics = dict[str, Any]


class Trainer:
    """A model in training: everything that a checkpoint holds."""

    def __init__(self, model: MiniDS, data: TextData, recipe: Recipe):
        if recipe.seq_len > model.config.max_position_embeddings:
            raise ValueError(f"seq_len={recipe.seq_len}: the context holds {model.config.max_position_embeddings}")
        if data.tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"vocab_size={model.config.vocab_size}: the tokenizer has {data.tokenizer.vocab_size} tokens"
            )
        if recipe.precision == "fp8":
            convert_to_fp8(model)
        self.model, self.data, self.recipe = model, data, recipe
        self.schedule = Schedule(recipe.steps, recipe.warmup_steps)
        self.optimizers = make_optimizers(
            model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.moments
        )
        self.stream = BatchStream(
            data.train, batch_size=recipe.batch_size, seq_len=recipe.seq_len, seed=recipe.seed
        )
        self.step = 0
        self.validation_batches()  # a validation text that is too short should be known now

    def run(
        self,
        *,
        directory: Path | None = None,
        resume: bool = False,
        progress: bool = True,
        on_step: Callable[[Metrics], None] | None = None,
    ) -> list[Metrics]:
        """Train to the end of the recipe, or to the first Ctrl-C; returns the metrics of the steps taken.

        With `directory`, checkpoints and metrics.jsonl are kept there; `resume` goes on from the newest checkpoint.
        Raises `Diverged` when the loss explodes (the last good checkpoint stays), `ValueError` when there is nothing to
        resume.
        """
        steps = self.recipe.steps
        if resume:
            newest = latest_checkpoint(directory / "checkpoints")
            if newest is None:
                raise ValueError(f"{directory} holds no checkpoint to resume from")
            self.load(newest)
            _cut_metrics(directory / "metrics.jsonl", self.step)
        history = []
        bar = tqdm(total=steps, initial=self.step, unit="step", disable=not progress, dynamic_ncols=True)
        with bar, _stop_requests() as stop_requested, _metrics_file(directory) as write:
            while self.step < steps and not stop_requested.is_set():
                metrics = self.train_step()
                if self.step == steps or self.step % self.recipe.evaluate_every == 0:
                    metrics["validation_bits_per_byte"] = self.evaluate()
                write(metrics)
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
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm).item()
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

    def backward(self, batch: Batch, mtp_weight: float) -> tuple[Losses, torch.Tensor | None]:
        """Gradients, losses and expert loads of a global batch, whatever the micro-batches it is cut into."""
        share = Share.of(batch)
        device = self.model.head.weight.device
        parts, loads = [], None
        for micro in _micro_batches(batch, self.recipe.micro_batch_size or len(batch.tokens)):
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
        return bits_per_byte(self.model, self.validation_batches(), self.data.tokenizer.token_bytes())

    def validation_batches(self) -> Iterator[Batch]:
        """The same `evaluation_batches` batches each time."""
        return evaluation_batches(
            self.data.validation,
            batch_size=self.recipe.micro_batch_size or self.recipe.batch_size,
            seq_len=self.recipe.seq_len,
            max_batches=self.recipe.evaluation_batches,
        )

    def save(self, directory: Path) -> None:
        """Write the checkpoint of this step, then drop all but the two newest."""
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizers),
            "random": _random_states(self.model),
        }
        state = {
            "step": self.step,
            "config": self.model.config.to_dict(),
            "recipe": dataclasses.asdict(self.recipe),
            "data": self.stream.state_dict(),
        }
        destination = directory / f"step-{self.step:08d}"
        if not destination.exists():
            save_checkpoint(destination, tensors, state)
        for old in sorted(directory.glob("step-*"))[:-2]:
            _remove(old)

    def load(self, folder: Path) -> None:
        """Go on where the checkpoint was written. Raises `ValueError` where it is damaged or of another run."""
        tensors, state = load_checkpoint(folder)
        if state["config"] != self.model.config.to_dict():
            raise ValueError(f"{folder} is of a model with another config")
        changed = [k for k, v in dataclasses.asdict(self.recipe).items() if state["recipe"].get(k, v) != v]
        if changed:
            name = changed[0]
            was = state["recipe"][name]
            raise ValueError(f"{name}={getattr(self.recipe, name)!r}: the run was started with {was!r}")
        self.stream.load_state_dict(state["data"])
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.model, self.optimizers, tensors["optimizer"])
        _set_random_states(tensors["random"])
        self.step = state["step"]


def train(model: MiniDS, data: TextData, recipe: Recipe, **options: Any) -> list[Metrics]:
    """Train `model` in place; options as in `Trainer.run`: directory, resume, progress, on_step."""
    return Trainer(model, data, recipe).run(**options)


def _micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    parts = (getattr(batch, f.name).split(size) for f in dataclasses.fields(Batch))
    return (Batch(*part) for part in zip(*parts, strict=True))


def _random_states(model: MiniDS) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if model.head.weight.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _remove(checkpoint: Path) -> None:
    """Delete, with the file that makes it a checkpoint first, so that a half-deleted one is none."""
    (checkpoint / "state.json").unlink(missing_ok=True)
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()


def _cut_metrics(path: Path, step: int) -> None:
    """Forget the steps after the checkpoint, which are about to be taken again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break  # a line that was being written when the run was killed
    write_text_whole(path, "".join(kept))


@contextmanager
def _metrics_file(directory: Path | None) -> Iterator[Callable[[Metrics], None]]:
    if directory is None:
        yield lambda metrics: None
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "metrics.jsonl").open("a") as file:

        def write(metrics: Metrics) -> None:
            file.write(json.dumps(metrics) + "\n")
            file.flush()

        yield write


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
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
