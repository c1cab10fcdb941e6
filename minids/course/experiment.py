"""Experiments with a control, small enough for a chapter: the same text, the same budget, a few seeds."""

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
from minids.files import write_text_whole
from minids.model.transformer import MiniDS
from minids.run import Run, read_text
from minids.training.loop import Metrics, Recipe, TextData, Trainer


@dataclass
class Trial:
    """A model after its training, and the metrics of every step."""

    model: MiniDS
    metrics: list[Metrics]

    @property
    def validation(self) -> float:
        """Bits per byte of the held-out text after the last step."""
        return self.metrics[-1]["validation_bits_per_byte"]


@functools.cache
def builtin_text(tokenizer: str = "bytes", max_bytes: int = 500_000) -> TextData:
    """Real text that needs no download: prose and code of Python's library, at most `max_bytes` of each.

    `tokenizer` is "bytes" or "bpe:SIZE". The text is that of the Python that runs it, so results differ a little from
    one Python version to another: a chapter asserts what it claims instead of printing many digits.
    """
    nothing_trained_yet = Run(ModelConfig.preset("nano"), Recipe(), ("pydocs", "stdlib"), max_bytes)
    return read_text(nothing_trained_yet, tokenizer)


def trial(config: ModelConfig, data: TextData, recipe: Recipe) -> Trial:
    """Train a new model; the recipe's seed decides its first weights and the order of the text."""
    torch.manual_seed(recipe.seed)
    trainer = Trainer(MiniDS(config), data, recipe)
    return Trial(trainer.model, trainer.run(progress=False))


def trials(
    variants: Mapping[str, ModelConfig], data: TextData, recipe: Recipe, seeds: Sequence[int]
) -> dict[str, list[Trial]]:
    """Every variant with every seed; says which one is being trained."""
    outcome: dict[str, list[Trial]] = {}
    for name, config in variants.items():
        print(f"training {name} with seeds {', '.join(map(str, seeds))} ...", flush=True)
        outcome[name] = [trial(config, data, replace(recipe, seed=seed)) for seed in seeds]
    return outcome


def record(path: Path, **figures: Any) -> None:
    """Write the figures of a long run as JSON, with the command line that made them and the versions that it ran on.

    Floats keep five significant digits: people read the file too.
    """
    found = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    rounded = json.loads(json.dumps(found | figures), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    write_text_whole(path, json.dumps(rounded, indent=1) + "\n")
