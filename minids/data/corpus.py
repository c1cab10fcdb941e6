"""Documents from named sources and paths, each with a domain label, and the training-validation split.

Usage:
    documents = read_documents("stdlib")  # or "pydocs", "book.txt", "folder", "hf:roneneldan/TinyStories"
    training, validation = split_documents(documents)
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minids.data import standard_library


@dataclass(frozen=True)
class Document:
    """One text. `domain` is its label: "prose", "code", "text" or any other word.

    Documents with the same `group` are in the same split.
    """

    text: str
    domain: str
    group: str


def read_documents(source: str, *, max_bytes: int | None = None) -> Iterator[Document]:
    """Read the documents of `source` lazily, in the same order every time.

    - "pydocs": prose, CPython's language reference and the docstrings of the standard library;
    - "stdlib": code, the sources of the standard library without docstrings;
    - a path: a UTF-8 text file (one document), .jsonl (an object with "text" per line), .parquet (a column "text"), or
      a folder of these, searched recursively. A record's optional "domain" is its label, else "text";
    - "hf:name" or "hf:name:config": the train split of a Hugging Face dataset, streamed, with records as above.

    Blank documents are skipped. At most `max_bytes` of UTF-8 are read; the last document is cut there. Iteration raises
    a one-line ValueError if the source is missing or damaged, or holds no text.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: must be at least 1")
    documents = (document for document in _open(source) if document.text and not document.text.isspace())
    first = next(documents, None)
    if first is None:
        raise ValueError(f"corpus {source} holds no text")
    documents = itertools.chain([first], documents)
    yield from documents if max_bytes is None else _limit(documents, max_bytes)


def split_documents(
    documents: Iterable[Document], *, held_out: float = 0.05, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Split into (training, validation) documents, in their order; about `held_out` of the groups are for validation.

    The split of a group depends only on a hash of its name and `seed`, so it is the same in every run and every corpus.
    Exception: if one split would be empty, the group with the nearest hash is moved to it. A single group is split by
    document, a single document at a line break. Raises ValueError if there is nothing to split.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: must be between 0 and 1")
    documents = list(documents)
    if not documents:
        raise ValueError("corpus holds no text: there is no document to split")
    if len(documents) == 1:
        return _split_text(documents[0], held_out)
    groups = [document.group for document in documents]
    if len(set(groups)) == 1:
        groups = [f"{group} {i}" for i, group in enumerate(groups)]
    score = {group: _uniform_hash(f"{seed} {group}") for group in groups}
    by_score = sorted(score, key=score.get)
    count = sum(score[group] < held_out for group in by_score)
    validation_groups = set(by_score[: min(max(count, 1), len(by_score) - 1)])
    training = [document for document, group in zip(documents, groups, strict=True) if group not in validation_groups]
    validation = [document for document, group in zip(documents, groups, strict=True) if group in validation_groups]
    return training, validation


def _limit(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    left = max_bytes
    for document in documents:
        content = document.text.encode()
        if text := content[:left].decode(errors="ignore"):  # drops an incomplete character
            yield dataclasses.replace(document, text=text)
        left -= len(content)
        if left <= 0:
            return


def _uniform_hash(key: str) -> float:
    """Hash to [0, 1), the same in every process, unlike Python's hash()."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def _split_text(document: Document, held_out: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    if len(text) < 2:
        raise ValueError(f"corpus is too short to be split: {len(text)} characters")
    cut = min(max(int(len(text) * (1 - held_out)), 1), len(text) - 1)
    line_break = text.rfind("\n", 0, cut) + 1
    cut = line_break if line_break > cut // 2 else cut  # text without a suitable line break is cut anywhere
    return tuple([dataclasses.replace(document, text=part)] for part in (text[:cut], text[cut:]))


def _open(source: str) -> Iterator[Document]:
    if source == "pydocs":
        texts = itertools.chain(standard_library.topics(), standard_library.modules("docstrings"))
        return (Document(text, "prose", group) for group, text in texts)
    if source == "stdlib":
        return (Document(text, "code", group) for group, text in standard_library.modules("code"))
    if source.startswith("hf:"):
        return _read_dataset(source.removeprefix("hf:"))
    path = Path(source)
    if path.is_dir():
        return itertools.chain.from_iterable(_read_file(file, path) for file in _files(path))
    if path.is_file():
        return _read_file(path, path.parent)
    raise ValueError(f"corpus {source} does not exist: expected pydocs, stdlib, hf:DATASET, a file or a folder")


def _files(folder: Path) -> list[Path]:
    """List the files below `folder`, sorted by name, without hidden files and Python's caches."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (name for name in names if not any(part.startswith(".") or part == "__pycache__" for part in name.parts))
    return [folder / name for name in sorted(visible, key=Path.as_posix)]


def _read_file(path: Path, root: Path) -> Iterator[Document]:
    """Read the documents of one file. Group names are relative to `root`, so a moved folder has the same split."""
    group = path.relative_to(root).as_posix()
    if path.suffix == ".jsonl":
        return _read_jsonl(path, group)
    if path.suffix == ".parquet":
        return _read_parquet(path, group)
    return iter([Document(_decode(path.read_bytes(), f"{path}"), "text", group)])


def _read_jsonl(path: Path, group: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            text = _decode(line, where)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            yield _document(record, where, f"{group}:{number}")


def _read_parquet(path: Path, group: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    rows_read = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in ("text", "domain")]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    rows_read += 1
                    yield _document(record, f"{path} row {rows_read}", f"{group}:{rows_read}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged after row {rows_read}: {' '.join(str(error).split())}") from None


def _read_dataset(name: str) -> Iterator[Document]:
    for number, record in enumerate(_stream_dataset(name), 1):
        yield _document(record, f"dataset {name} row {number}", f"{name}:{number}")


def _stream_dataset(name: str) -> Iterator[dict]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"corpus hf:{name} needs the datasets library: pip install datasets") from None

    # A local folder may hold a colon (C:\data); elsewhere it starts the config.
    dataset, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    try:
        yield from datasets.load_dataset(dataset, config or None, split="train", streaming=True)
    except Exception as error:  # datasets and its dependencies raise many types
        raise ValueError(f"cannot read dataset {name}: {' '.join(str(error).split())}") from None


def _document(record: object, where: str, group: str) -> Document:
    """Validate one record of a JSONL, Parquet or Hugging Face source; `where` names it in errors."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where} has no "text" that is a string')
    domain = record.get("domain") or "text"
    if not isinstance(domain, str):
        raise ValueError(f'{where} has a "domain" that is not a string: {domain!r}')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:  # JSON can encode half of a surrogate pair
        raise ValueError(f"{where} has no UTF-8 form: {error}") from None
    return Document(record["text"], domain, group)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}") from None
