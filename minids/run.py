"""A run is a folder: what was asked for (run.json), the tokenizer, the checkpoints, the metrics and their figure."""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minids.config import ModelConfig
from minids.data.batches import tokenize
from minids.data.corpus import read_documents, split_documents
from minids.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from minids.files import write_text_whole
from minids.model.transformer import MiniDS
from minids.training.checkpoint import load_model, save_checkpoint
from minids.training.loop import Recipe, TextData, check

RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """Everything that `train` needs to begin, or to go on."""

    config: ModelConfig
    recipe: Recipe
    data: tuple[str, ...]
    max_bytes: int | None = None

    def save(self, directory: Path) -> None:
        """Write run.json, whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        write_text_whole(directory / "run.json", json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, directory: Path) -> "Run":
        """Read run.json. Raises `ValueError` where it is missing or damaged."""
        path = directory / "run.json"
        try:
            fields = json.loads(path.read_text())
            config, recipe = ModelConfig.from_dict(fields["config"]), Recipe(**fields["recipe"])
            return cls(config, recipe, tuple(fields["data"]), fields["max_bytes"])
        except FileNotFoundError:
            raise ValueError(f"{directory} is no run: it has no run.json") from None
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{path} is damaged: not the description of a run") from None


def read_text(run: Run, tokenizer: Tokenizer | str) -> TextData:
    """The documents of the run, split and tokenized.

    `tokenizer` is one, or "bytes", "bpe:SIZE" (then trained on the training split) or the path of a saved one.
    """
    documents = itertools.chain(*(read_documents(source, max_bytes=run.max_bytes) for source in run.data))
    training, validation = split_documents(documents)
    if isinstance(tokenizer, str):
        tokenizer = _make_tokenizer(tokenizer, (document.text for document in training))
    return TextData(tokenize(training, tokenizer), tokenize(validation, tokenizer), tokenizer)


def _make_tokenizer(kind: str, texts: Iterable[str]) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind.startswith("bpe:"):
        size = kind.removeprefix("bpe:")
        if not size.isdecimal():
            raise ValueError(f"tokenizer={kind!r}: the size after bpe: must be a whole number")
        return BPETokenizer.train(texts, int(size))
    return load_tokenizer(kind)


def begin_run(run: Run, tokenizer: str, name: str) -> tuple[Path, TextData]:
    """Read the text and make a folder for the run, whose model gets the vocabulary of the tokenizer.

    Raises `ValueError`, leaving nothing, where it could not train.
    """
    directory = RUNS / name
    if directory.exists():
        raise ValueError(f"{directory} exists: choose another --name, or go on with --resume {directory}")
    print(f"reading {', '.join(run.data)} ...", flush=True)
    text = read_text(run, tokenizer)
    run = dataclasses.replace(run, config=run.config.replace(vocab_size=text.tokenizer.vocab_size))
    check(run.config, text, run.recipe)
    run.save(directory)
    text.tokenizer.save(directory)
    return directory, text


def load_run(directory: Path, device: str = "cpu") -> tuple[MiniDS, Tokenizer]:
    """The model of the newest checkpoint, in evaluation mode, and its tokenizer. Raises `ValueError` if damaged."""
    return load_model(directory).to(device).eval(), load_tokenizer(directory)


def newest_run() -> Path:
    """The run that was worked on last."""
    runs = [path.parent for path in RUNS.glob("*/run.json")]
    if not runs:
        raise ValueError(f"there is no run under {RUNS}/: train one first")
    return max(runs, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()))


def free_name(name: str) -> str:
    """NAME, or NAME-2 and so on where that is taken under runs/."""
    candidates = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(name for name in candidates if not (RUNS / name).exists())


def read_metrics(directory: Path) -> list[dict]:
    """The objects of metrics.jsonl, a step each."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def save_imported(model: MiniDS, tokenizer: Tokenizer, directory: Path) -> None:
    """Keep a model that was not trained here as a run with one checkpoint, of step 0."""
    checkpoint = directory / "checkpoints" / "step-00000000"
    save_checkpoint(checkpoint, {"model": model.state_dict()}, {"step": 0, "config": model.config.to_dict()})
    tokenizer.save(directory)
