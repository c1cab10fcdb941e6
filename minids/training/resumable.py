"""Training that can be stopped, killed and resumed, whatever a step is: the loop, its metrics and its checkpoints.

Notable choices: a step is a function of what a checkpoint holds, so a resumed run repeats the undisturbed one bit for
bit; every step leaves one JSON object in metrics.jsonl.
"""

import dataclasses
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

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
from minids.training.metrics import Metrics, metrics_file


class Diverged(ArithmeticError):
    """The loss became infinite, not a number, or far worse than a blind guess."""


class Loop:
    """A model in training: everything that a checkpoint holds.

    Who inherits says what a step does (`train_step`), how the model is judged from time to time (`judge`), and what the
    progress bar says (`summary`); `recipe` has `steps`, `evaluate_every` and `checkpoint_every`.
    """

    writes_files = True  # of several processes that train one model, one does
    judges_the_start = False

    def __init__(self, model: MiniDS, recipe: Any, optimizers: list[torch.optim.Optimizer]):
        self.model, self.recipe, self.optimizers, self.step = model, recipe, optimizers, 0

    def run(
        self,
        *,
        directory: Path | None = None,
        progress: bool = True,
        tensorboard: bool = False,
        on_step: Callable[[Metrics], None] | None = None,
    ) -> list[Metrics]:
        """Train to the end of the recipe, or to the first Ctrl-C; returns the metrics of the steps taken.

        With `directory`, it goes on from the newest checkpoint there, if there is one, and keeps checkpoints and
        metrics.jsonl there, with `tensorboard` also a folder of that name.
        Raises `Diverged` when the loss explodes (the last good checkpoint stays).
        """
        steps = self.recipe.steps
        if directory is not None and (newest := latest_checkpoint(directory / "checkpoints")):
            self.load(newest)
        written = directory if self.writes_files else None
        history, hidden = [], not (progress and self.writes_files)
        bar = tqdm(total=steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True)
        file = metrics_file(written, self.step or -1, tensorboard)
        with bar, stop_requests() as stop_requested, file as write:

            def report(metrics: Metrics) -> None:
                write(metrics)
                history.append(metrics)
                if on_step is not None:
                    on_step(metrics)

            if self.judges_the_start and not self.step:
                report({"step": 0} | self.judge(written))
            while self.step < steps and not self.should_stop(stop_requested.is_set()):
                metrics = self.train_step()
                if self.step == steps or self.step % self.recipe.evaluate_every == 0:
                    metrics |= self.judge(written)
                report(metrics)
                bar.set_postfix_str(self.summary(metrics), refresh=False)
                bar.update()
                if directory is not None and (self.step == steps or self.step % self.recipe.checkpoint_every == 0):
                    self.save(directory / "checkpoints")
            if directory is not None and self.step < steps:
                self.save(directory / "checkpoints")
        return history

    def should_stop(self, requested: bool) -> bool:
        """Asked before every step; `requested` says whether Ctrl-C or SIGTERM came."""
        return requested

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, a file each."""
        return {
            "model": {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta},
            "optimizer": optimizer_tensors(self.model, self.optimizers),
            "random": random_states(self.model),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of them, as JSON."""
        config, recipe = self.model.config.to_dict(), dataclasses.asdict(self.recipe)
        return {"step": self.step, "config": config, "recipe": recipe}

    def save(self, directory: Path) -> None:
        """Write the checkpoint of this step, then drop all but the two newest."""
        destination = directory / f"step-{self.step:08d}"
        if not destination.exists():
            self.write_checkpoint(destination, self.tensors(), self.state())
        for old in sorted(directory.glob("step-*"))[:-2] if self.writes_files else ():
            remove_checkpoint(old)

    write_checkpoint = staticmethod(save_checkpoint)

    def load(self, folder: Path) -> None:
        """Go on where the checkpoint was written. Raises `ValueError` where it is damaged or of another run."""
        state = read_state(folder)
        if state["config"] != self.model.config.to_dict():
            raise ValueError(f"{folder} is of a model with another config")
        for name, value in dataclasses.asdict(self.recipe).items():
            was = state["recipe"].get(name, value)
            if was != value:
                raise ValueError(f"{name}={value!r}: the run was started with {was!r}")
        self.load_state(state)
        self.load_tensors(folder)

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def load_tensors(self, folder: Path) -> None:
        """Weights, optimizer and random states of a checkpoint."""
        tensors, _ = load_checkpoint(folder)
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.model, self.optimizers, tensors["optimizer"])
        set_random_states(tensors["random"])

    def clip_gradients(self) -> float:
        """Scale the gradients down to the norm `clip_norm`; returns the norm they had."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm).item()

    def descend(self, learning_rate: float) -> None:
        """Let the optimizers take a step, and forget the gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete, with the file that makes it a checkpoint first, so that a half-deleted one is none."""
    (checkpoint / "state.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


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
