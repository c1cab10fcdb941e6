"""Pre-training runs: description in run.json, tokenized text, and creation of the folder."""

import dataclasses
import itertools
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minids.config import ModelConfig
from minids.data.batches import tokenize
from minids.data.corpus import read_documents, split_documents
from minids.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from minids.training.pretrain import Recipe, TextData, check
from minids.training.run import described_by, new_run, read_run, write_run
from minids.validation import check_value, require


@dataclass(frozen=True)
class PretrainingRun:
    """Description of a pre-training run: all that is needed to start or resume it."""

    config: ModelConfig
    recipe: Recipe
    data: tuple[str, ...]
    max_bytes: int | None = None
    start_from: str | None = None
    """Folder of the run whose weights this run starts from; None for random initial weights."""

    def __post_init__(self):
        named = bool(self.data) and all(isinstance(source, str) and source for source in self.data)
        require(named, "data", self.data, "must name at least one source of text")
        check_value("max_bytes", self.max_bytes, int | None)
        check_value("start_from", self.start_from, str | None)

    def save(self, directory: Path) -> None:
        """Write run.json, atomically."""
        write_run(directory, "train", dataclasses.asdict(self))

    @classmethod
    def load(cls, directory: Path) -> "PretrainingRun":
        """Read run.json. Raises `ValueError` if it is missing, damaged, or of another kind of run."""
        fields = read_run(directory)
        if fields["kind"] != "train":
            remedy = f"to train its model, use --from {shlex.quote(str(directory))}"
            raise ValueError(f"{directory} was made by {fields['kind']}: {remedy}")
        with described_by(directory):
            config, recipe = ModelConfig.from_dict(fields["config"]), Recipe(**fields["recipe"])
            require(isinstance(fields["data"], list), "data", fields["data"], "must be a list")
            return cls(config, recipe, tuple(fields["data"]), fields["max_bytes"], fields.get("start_from"))


def read_text(run: PretrainingRun, tokenizer: Tokenizer | str) -> TextData:
    """Read the documents of a run, split and tokenize them.

    `tokenizer` is a tokenizer, "bytes", "bpe:SIZE" (trained on the training split), or the path of a saved tokenizer.
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
        if not (size.isascii() and size.isdecimal()) or len(size) > 7:
            raise ValueError(f"tokenizer={kind!r}: the size after bpe: must be a whole number below 10,000,000")
        return BPETokenizer.train(texts, int(size))
    return load_tokenizer(kind)


def create_run(run: PretrainingRun, tokenizer: Tokenizer | str, name: str) -> tuple[Path, TextData]:
    """Read the text and create the folder of a new run; return both.

    A new model gets the vocabulary size of the tokenizer; one from `start_from` keeps its own. Raises `ValueError`,
    without creating anything, if the run could not be trained.
    """
    directory = new_run(name)
    print(f"reading {', '.join(run.data)} ...", flush=True)
    text = read_text(run, tokenizer)
    if run.start_from is None:
        run = dataclasses.replace(run, config=run.config.replace(vocab_size=text.tokenizer.vocab_size))
    check(run.config, text, run.recipe)
    directory.mkdir(parents=True)
    text.tokenizer.save(directory)
    run.save(directory)
    return directory, text
