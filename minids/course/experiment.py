"""Controlled experiments, small enough for a chapter: the same text, the same budget, a few seeds."""

import functools
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minids.config import ModelConfig
from minids.files import atomic_write_text
from minids.model.transformer import MiniDS
from minids.training.pretrain import Metrics, Recipe, TextData, Trainer
from minids.training.pretraining_run import PretrainingRun, read_text


@dataclass
class Trial:
    """A trained model, and the metrics of every step."""

    model: MiniDS
    metrics: list[Metrics]

    @property
    def validation(self) -> float:
        """Bits per byte of the held-out text after the last step."""
        return self.metrics[-1]["validation_bits_per_byte"]


@functools.cache
def builtin_text(tokenizer: str = "bytes", max_bytes: int = 500_000) -> TextData:
    """Return real text that needs no download: prose and code of Python's library, at most `max_bytes` of each.

    `tokenizer` is "bytes" or "bpe:SIZE". The text comes from the Python that runs it, so results differ slightly
    between Python versions: a chapter asserts the band of a value instead of printing many digits.
    """
    nothing_trained_yet = PretrainingRun(ModelConfig.preset("nano"), Recipe(), ("pydocs", "stdlib"), max_bytes)
    return read_text(nothing_trained_yet, tokenizer)


def trial(config: ModelConfig, data: TextData, recipe: Recipe) -> Trial:
    """Train a new model; the recipe's seed determines its initial weights and the order of the text."""
    torch.manual_seed(recipe.seed)
    trainer = Trainer(MiniDS(config), data, recipe)
    return Trial(trainer.model, trainer.run(progress=False))


def trials(
    variants: Mapping[str, ModelConfig], data: TextData, recipe: Recipe, seeds: Sequence[int]
) -> dict[str, list[Trial]]:
    """Train every variant with every seed; print the variant in training. Return the trials by variant."""
    outcome: dict[str, list[Trial]] = {}
    for name, config in variants.items():
        print(f"training {name} with seeds {', '.join(map(str, seeds))} ...", flush=True)
        outcome[name] = [trial(config, data, replace(recipe, seed=seed)) for seed in seeds]
    return outcome


def record(path: Path, **figures: Any) -> None:
    """Write the figures of a long run to `path` as JSON, with its command line, the versions and the device.

    Floats keep five significant digits, so that the file stays readable.
    """
    found = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    rounded = json.loads(json.dumps(found | figures), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    atomic_write_text(path, json.dumps(rounded, indent=1) + "\n")
