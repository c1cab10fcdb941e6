"""Training loop with metrics and checkpoints, which can be stopped, killed and resumed.

Notable choices: a step is a function of the contents of a checkpoint, so a resumed run is bitwise equal to an
uninterrupted one; every step appends one JSON object to metrics.jsonl.
"""

import dataclasses
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minids.config import ModelConfig
from minids.files import flush_to_disk
from minids.model.transformer import MiniDS
from minids.training.checkpoint import (
    checkpoints,
    content_of,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    random_states,
    read_state,
    save_checkpoint,
    set_random_states,
)
from minids.training.metrics import Metrics, metrics_file
from minids.training.run import locked


class Diverged(ArithmeticError):
    """The loss or the gradient is infinite or NaN, or the loss far exceeds that of a uniform prediction."""


class Loop(ABC):
    """State and loop of a training run; a subclass defines the step, the evaluation and the progress message.

    `recipe` has the fields `steps`, `evaluate_every`, `checkpoint_every` and `clip_norm`.
    """

    writes_files = True  # false on all ranks but one in distributed training
    evaluates_the_start = False  # whether to evaluate before the first step

    def __init__(self, model: MiniDS, recipe: Any, optimizers: list[torch.optim.Optimizer]):
        self.model, self.recipe, self.optimizers, self.step = model, recipe, optimizers, 0

    @abstractmethod
    def train_step(self) -> Metrics:
        """Take one optimizer step, increment `step`, and return the metrics of the step."""

    @abstractmethod
    def evaluation_metrics(self, directory: Path | None) -> Metrics:
        """Return the metrics of an evaluation, every `evaluate_every` steps; files may be written to `directory`."""

    @abstractmethod
    def progress_message(self, metrics: Metrics) -> str:
        """Return the text beside the progress bar after a step with these metrics."""

    def run(
        self,
        *,
        directory: Path | None = None,
        progress: bool = True,
        tensorboard: bool = False,
        on_step: Callable[[Metrics], None] | None = None,
    ) -> list[Metrics]:
        """Train to the last step of the recipe or the first Ctrl-C; return the metrics of the steps taken.

        With `directory`, resume from its newest checkpoint if there is one, and write checkpoints and metrics.jsonl to
        it, with `tensorboard` also a folder of that name. `on_step` is called with the metrics of each step.
        Raises `Diverged` if the loss diverges (the last checkpoint remains), `ValueError` if another process uses
        `directory`.
        """
        with locked(directory) if directory is not None and self.writes_files else nullcontext():
            return self._run(directory, progress, tensorboard, on_step)

    def _run(
        self,
        directory: Path | None,
        progress: bool,
        tensorboard: bool,
        on_step: Callable[[Metrics], None] | None,
    ) -> list[Metrics]:
        steps = self.recipe.steps
        if directory is not None and (newest := latest_checkpoint(directory / "checkpoints")):
            self.load(newest)
        written = directory if self.writes_files else None
        history, hidden = [], not (progress and self.writes_files)
        settings = {"initial": self.step, "unit": "step", "disable": hidden, "dynamic_ncols": True}
        file = metrics_file(written, self.step or -1, tensorboard)  # first: it refuses damaged metrics
        with file as write, tqdm(total=steps, **settings) as bar, stop_requests() as stop_requested:

            def report(metrics: Metrics) -> None:
                write(metrics)
                history.append(metrics)
                if on_step is not None:
                    on_step(metrics)

            if self.evaluates_the_start and not self.step:
                report({"step": 0} | self.evaluation_metrics(written))
            while self.step < steps and not self.should_stop(stop_requested.is_set()):
                metrics = self.train_step()
                if self.step == steps or self.step % self.recipe.evaluate_every == 0:
                    metrics |= self.evaluation_metrics(written)
                report(metrics)
                bar.set_postfix_str(self.progress_message(metrics), refresh=False)
                bar.update()
                if directory is not None and (self.step == steps or self.step % self.recipe.checkpoint_every == 0):
                    self._save_with_metrics(directory)
            if directory is not None and self.step < steps:
                self._save_with_metrics(directory)
        return history

    def _save_with_metrics(self, directory: Path) -> None:
        """Save a checkpoint whose metrics are on disk: after a power cut no checkpoint is newer than they are."""
        if self.writes_files:
            flush_to_disk(directory / "metrics.jsonl")
        self.save(directory / "checkpoints")

    def should_stop(self, requested: bool) -> bool:
        """Whether to stop before the next step; `requested` tells whether Ctrl-C, SIGTERM or SIGHUP was received."""
        return requested

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint, by file name and tensor name."""
        return {
            "model": {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta},
            "optimizer": optimizer_tensors(self.model, self.optimizers),
            "random": random_states(self.model),
        }

    def state(self) -> dict[str, Any]:
        """JSON part of a checkpoint: step, config and recipe."""
        config, recipe = self.model.config.to_dict(), dataclasses.asdict(self.recipe)
        return {"step": self.step, "config": config, "recipe": recipe}

    def save(self, directory: Path) -> None:
        """Write the checkpoint of this step, then delete all but the two newest."""
        destination = directory / f"step-{self.step:08d}"
        if not destination.exists():
            self.write_checkpoint(destination, self.tensors(), self.state())
        for old in checkpoints(directory)[:-2] if self.writes_files else ():
            remove_checkpoint(old)

    write_checkpoint = staticmethod(save_checkpoint)

    def load(self, folder: Path) -> None:
        """Restore the state of a checkpoint. Raises `ValueError` if it is damaged or of another config or recipe."""
        with content_of(folder):
            state = read_state(folder)
            if ModelConfig.from_dict(state["config"]) != self.model.config:  # fields that are newer have their defaults
                raise ValueError(f"{folder} is of a model with another config: resume with the config of the run")
            for name, value in dataclasses.asdict(self.recipe).items():
                was = state["recipe"].get(name, value)
                if was != value and not (name == "steps" and was < value):  # more steps are allowed
                    raise ValueError(f"{name}={value!r}: the run was started with {was!r}")
            self.load_state(state)
            self.load_tensors(folder)

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the JSON part of a checkpoint."""
        self.step = state["step"]

    def load_tensors(self, folder: Path) -> None:
        """Restore weights, optimizer states and random states of a checkpoint."""
        tensors, _ = load_checkpoint(folder)
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.model, self.optimizers, tensors["optimizer"])
        set_random_states(tensors["random"])

    def clip_gradients(self) -> float:
        """Clip the global gradient norm to `clip_norm`; return the norm before clipping."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm).item()

    def optimizer_step(self, learning_rate: float) -> None:
        """Set the learning rate, call `step()` and `zero_grad()` on every optimizer."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_factor", 1.0)
            optimizer.step()
            optimizer.zero_grad()


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, `state.json` first, so that a partly deleted folder is not taken for a checkpoint."""
    (checkpoint / "state.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C, SIGTERM or SIGHUP sets; the second one interrupts at once.

    SIGHUP (a closed terminal, a lost connection) is left alone where it is ignored (nohup). Main thread only.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def request(number, frame):
        requested.set()
        signal.signal(number, before[number])

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.signal(n, request) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
