"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import safetensors
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A new folder beside `directory`: takes its place once the block has succeeded, and is gone if the block failed.

    What stood in that place goes only when the new folder is on disk. A crash in the instant between the two renames
    leaves it, complete, as a hidden folder ending in `.old`. What a killed process had begun is removed.
    """
    directory = directory.resolve()
    for abandoned in directory.parent.glob(f".{directory.name}.*.new"):
        shutil.rmtree(abandoned)
    aside = directory.with_name(f".{directory.name}.{uuid4().hex}.new")
    retired = aside.with_suffix(".old")
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.mkdir()
        yield aside
        for path in (*aside.iterdir(), aside):
            _flush(path)
        if directory.exists():
            directory.rename(retired)
        try:
            aside.rename(directory)
        except OSError:
            if retired.exists():
                retired.rename(directory)
            raise
        _flush(directory.parent)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `OSError` where the disk refuses."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name} was not written: {error}") from None


def write_text_whole(path: Path, text: str) -> None:
    """Replace a text file; a crash leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on disk and not only in the system's memory."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
