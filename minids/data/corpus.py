"""Documents from named sources and paths, each with a domain label, and the training-validation split.

Usage:
    documents = read_documents("stdlib")  # or "pydocs", "book.txt", "folder", "hf:roneneldan/TinyStories"
    training, validation = split_documents(documents)
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import mimetypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minids.data import standard_library

LOG = logging.getLogger(__name__)


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
    - a path: a UTF-8 text file (one document), .jsonl or .ndjson (an object with "text" per line), .json (a list of
      such objects or of texts; any other content is text), .parquet (a column "text"), or a folder of these, searched
      recursively. A record's optional "domain" is its label, else "text";
    - "hf:name" or "hf:name:config": the train split of a Hugging Face dataset, streamed, with records as above.

    Blank documents, blank lines and byte order marks are skipped. So are records whose text is null, and in a folder
    files that are not text (pictures); one line each is logged with their number or names. At most `max_bytes` of UTF-8
    are read; the last document is cut there. Iteration raises a one-line ValueError if the source is missing or
    damaged, or holds no text.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: must be at least 1")
    skipped = _Skipped()
    try:
        yield from _read(source, max_bytes, skipped)
    except ValueError as error:
        raise ValueError("; ".join([str(error), *skipped.lines()])) from None
    for line in skipped.lines():
        LOG.warning("%s: %s", source, line)


@dataclass
class _Skipped:
    """What a source holds that is no document: records whose text is null, and files that are not text."""

    records: int = 0
    files: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        names = ", ".join(self.files[:5]) + (f" and {len(self.files) - 5:,} more" if len(self.files) > 5 else "")
        records = [f"records whose text is null, skipped: {self.records:,}"] if self.records else []
        files = [f"files that are not text, skipped: {len(self.files):,} ({names})"] if self.files else []
        return records + files


def _read(source: str, max_bytes: int | None, skipped: _Skipped) -> Iterator[Document]:
    documents = (document for document in _open(source, skipped) if document.text and not document.text.isspace())
    first = next(documents, None)
    if first is None:
        raise ValueError(f"corpus {source} holds no text")
    whole = itertools.chain([first], documents)
    yield from whole if max_bytes is None else _limit(whole, max_bytes)


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
    by_score = sorted(score, key=score.__getitem__)
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
    training, validation = (dataclasses.replace(document, text=part) for part in (text[:cut], text[cut:]))
    return [training], [validation]


def _open(source: str, skipped: _Skipped) -> Iterator[Document]:
    if source == "pydocs":
        texts = itertools.chain(standard_library.topics(), standard_library.modules("docstrings"))
        return (Document(text, "prose", group) for group, text in texts)
    if source == "stdlib":
        return (Document(text, "code", group) for group, text in standard_library.modules("code"))
    if source.startswith("hf:"):
        return _read_dataset(source.removeprefix("hf:"), skipped)
    path = Path(source)
    if path.is_dir():
        return itertools.chain.from_iterable(_read_file(file, path, skipped) for file in _files(path))
    if path.is_file():
        return _read_file(path, None, skipped)
    state = "is neither a file nor a folder" if path.exists() else "does not exist"  # a pipe or a device is neither
    raise ValueError(f"corpus {source} {state}: expected pydocs, stdlib, hf:DATASET, a file or a folder")


def _files(folder: Path) -> list[Path]:
    """List the files below `folder`, sorted by name, without hidden files and Python's caches."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (name for name in names if not any(part.startswith(".") or part == "__pycache__" for part in name.parts))
    return [folder / name for name in sorted(visible, key=Path.as_posix)]


def _read_file(path: Path, folder: Path | None, skipped: _Skipped) -> Iterator[Document]:
    """Read the documents of one file; `folder` is None for a file that the user named.

    Group names are relative to the folder, so a moved folder has the same split.
    """
    group, suffix = path.relative_to(folder or path.parent).as_posix(), path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path, group, skipped)
    if suffix == ".parquet":
        return _read_parquet(path, group, skipped)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if folder is not None and _is_binary(path, content):
        skipped.files.append(group)
        return iter([])
    text = _decode(content, f"{path}")
    if suffix == ".json" and (kind := _kind_of_json(text)):
        return _read_jsonl(path, group, skipped) if kind == "lines" else _read_json(path, text, group, skipped)
    return iter([Document(text, "text", group)])


def _is_binary(path: Path, content: bytes) -> bool:
    """Whether a file is no text: not UTF-8, and with a zero byte (UTF-16 excepted) or the suffix of media."""
    try:
        content.decode()
    except UnicodeDecodeError:
        kind = (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]
        media = kind in ("image", "audio", "video", "font")
        return media or b"\0" in content and not content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return False


def _kind_of_json(text: str) -> Literal["list", "lines"] | None:
    """Return how a .json file holds records: in a list, one per line, or not at all (settings, for example)."""
    if re.match(r'\s*\[\s*(null\s*,\s*)*\{[^{}]*"text"\s*:', text):
        return "list"
    is_list = text.lstrip().startswith("[")
    try:
        content = json.loads(text if is_list else text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return None
    if is_list:
        return "list" if content and all(isinstance(item, str | None) for item in content) else None
    return "lines" if isinstance(content, dict) and "text" in content else None


def _read_json(path: Path, text: str, group: str, skipped: _Skipped) -> Iterator[Document]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for number, record in enumerate(records, 1):
        record = {"text": record} if isinstance(record, str) else record
        yield from _documents(record, f"{path} item {number}", f"{group}:{number}", skipped)


def _read_jsonl(path: Path, group: str, skipped: _Skipped) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            yield from _documents(record, where, f"{group}:{number}", skipped)


def _read_parquet(path: Path, group: str, skipped: _Skipped) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    rows_read = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in ("text", "domain")]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    rows_read += 1
                    yield from _documents(record, f"{path} row {rows_read}", f"{group}:{rows_read}", skipped)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged after row {rows_read}: {' '.join(str(error).split())}") from None


def _read_dataset(name: str, skipped: _Skipped) -> Iterator[Document]:
    for number, record in enumerate(_stream_dataset(name), 1):
        yield from _documents(record, f"dataset {name} row {number}", f"{name}:{number}", skipped)


def _stream_dataset(name: str) -> Iterator[dict]:
    if not name.partition(":")[0].strip():
        raise ValueError(f"corpus 'hf:{name}' names no dataset: expected hf:DATASET, such as hf:roneneldan/TinyStories")
    try:
        import datasets
        from huggingface_hub.utils import logging as hub_logging
    except ImportError:
        raise ValueError(f"corpus hf:{name} needs the datasets library: pip install datasets") from None

    # A local folder may hold a colon (C:\data); elsewhere it starts the config.
    dataset, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # without network it warns of every retry; the error at the end says it once
    try:
        yield from datasets.load_dataset(dataset, config or None, split="train", streaming=True)
    except Exception as error:  # datasets and its dependencies raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read dataset {name}: {reason}; check its name and the network") from None
    finally:
        hub_logging.set_verbosity(verbosity)


def _documents(record: object, where: str, group: str, skipped: _Skipped) -> Iterator[Document]:
    """Validate one record of a JSON, Parquet or Hugging Face source; `where` names it in errors.

    Yields its document, or nothing for a record that is null or whose text is.
    """
    if record is None or isinstance(record, dict) and "text" in record and record["text"] is None:
        skipped.records += 1
        return
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where} has no "text" that is a string')
    domain = record.get("domain") or "text"
    if not isinstance(domain, str):
        raise ValueError(f'{where} has a "domain" that is not a string: {domain!r}')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:  # JSON can encode half of a surrogate pair
        raise ValueError(f"{where} has no UTF-8 form: {error}") from None
    yield Document(record["text"], domain, group)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode().removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}") from None
