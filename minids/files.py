"""Atomic writing of files and folders."""

import glob
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
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a new folder beside `directory` that replaces it after the block, or is deleted if the block raises.

    The old folder is deleted only when the new one is on disk. A crash between the two renames leaves the old one,
    complete, as a hidden folder ending in `.old`. Unfinished folders of killed processes are removed.
    """
    directory = directory.resolve()
    for abandoned in directory.parent.glob(f".{glob.escape(directory.name)}.*.new"):
        shutil.rmtree(abandoned)
    aside = directory.with_name(f".{directory.name}.{uuid4().hex}.new")
    retired = aside.with_suffix(".old")
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.mkdir()
        yield aside
        for path in (*aside.iterdir(), aside):
            flush_to_disk(path)
        if directory.exists():
            directory.rename(retired)
        try:
            aside.rename(directory)
        except OSError:
            if retired.exists():
                retired.rename(directory)
            raise
        flush_to_disk(directory.parent)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `OSError` if writing fails."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name} was not written: {error}") from None


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file; a crash leaves either the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        flush_to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, from the operating system's cache to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
