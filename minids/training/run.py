"""Run folders: run.json describes how the model was made; beside it are tokenizer, checkpoints and metrics.

Notable choices: every command that makes a model writes a run folder, and every command reads any of them; run.json is
written last, so a folder with it can be resumed; a lock admits one process at a time.
"""

import itertools
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from minids.data.tokenizer import Tokenizer, load_tokenizer
from minids.files import atomic_write_text
from minids.model.transformer import MiniDS
from minids.training.checkpoint import latest_checkpoint, load_model, save_checkpoint
from minids.training.metrics import Metrics, read_lines
from minids.validation import require

RUNS = Path("runs")
Kind = Literal["train", "import", "rl", "r1"]
OLD_FILES = {"run.json": "train", "rl.json": "rl", "r1.json": "r1"}  # files of version 0.1, which have no kind


def write_run(directory: Path, kind: Kind, fields: dict[str, Any]) -> None:
    """Write run.json into `directory` atomically; create the folder if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_text(directory / "run.json", json.dumps({"kind": kind} | fields, indent=1))


def read_run(directory: Path) -> dict[str, Any]:
    """Read the fields of run.json, with "kind"; folders of version 0.1 can be read too.

    Raises `ValueError` if it is missing or damaged.
    """
    for name, kind in OLD_FILES.items():
        path = directory / name
        if path.is_file():
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):  # not UTF-8, not JSON
                fields = None
            if not isinstance(fields, dict):
                raise ValueError(f"{path} is damaged: not the description of a run")
            return {"kind": kind} | fields
    raise ValueError(f"{directory} is not a run: it has no run.json")


@contextmanager
def described_by(directory: Path) -> Iterator[None]:
    """Raise `ValueError` naming run.json (or the file of version 0.1) where the block finds that it is no run."""
    path = next((directory / name for name in OLD_FILES if (directory / name).is_file()), directory / "run.json")
    try:
        yield
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: not the description of a run") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def new_run(name: str) -> Path:
    """Return the folder of a new run. Raises `ValueError` if it exists or `name` is not the name of one folder."""
    plain = name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..")
    require(plain and len(name.encode()) <= 200, "name", name, "must name one folder, without / and \\, in 200 bytes")
    check_new(RUNS / name)
    return RUNS / name


def check_new(directory: Path) -> None:
    """Raise `ValueError` if the folder exists."""
    if directory.exists():
        resume = f"--resume {shlex.quote(str(directory))}"
        raise ValueError(f"{directory} exists: choose another --name, or continue it with {resume}")


def model_folder(directory: Path) -> Path:
    """Find the folder with a run's checkpoints: its own, or for R1 that of the last finished stage."""
    finished = [directory / stage for stage in read_run(directory).get("stages", [])] if _is_run(directory) else []
    return next((stage for stage in reversed(finished) if latest_checkpoint(stage / "checkpoints")), directory)


def load_run(directory: Path, device: str = "cpu") -> tuple[MiniDS, Tokenizer]:
    """Load the tokenizer and the newest checkpoint's model, in evaluation mode.

    Raises `ValueError` if one of them is damaged, if they do not belong together, and for weights that are not finite.
    """
    model, tokenizer = load_model(model_folder(directory)), load_tokenizer(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        rule = f"is larger than the model's {model.config.vocab_size}: tokenizer.json is that of another run"
        raise ValueError(f"{directory}: the tokenizer's vocabulary of {tokenizer.vocab_size} {rule}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{directory}: {name} holds NaN or infinite weights: train or import the model again")
    return model.to(device).eval(), tokenizer


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in OLD_FILES)


def newest_run() -> Path:
    """Find the run with the latest change, of any kind. Raises `ValueError` if there is none."""
    runs = [path for path in RUNS.glob("*") if _is_run(path)]
    if not runs:
        raise ValueError(f"there is no run under {RUNS}/: train one first")
    return max(runs, key=lambda run: max(path.lstat().st_mtime for path in run.iterdir()))  # a link may lead nowhere


def free_name(name: str) -> str:
    """Return `name`, or `name`-2, -3, ... if it is taken under runs/."""
    candidates = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(name for name in candidates if not (RUNS / name).exists())


@contextmanager
def removed_unless_begun(directory: Path) -> Iterator[None]:
    """Delete a new run's folder where the block raises before the metrics of a first step or a checkpoint are there."""
    try:
        yield
    except BaseException:
        metrics = directory / "metrics.jsonl"
        begun = metrics.exists() and metrics.stat().st_size > 0
        if not begun and latest_checkpoint(directory / "checkpoints") is None:
            shutil.rmtree(directory, ignore_errors=True)
            with suppress(OSError):  # runs/ itself, where this was its first run
                directory.parent.rmdir()
        raise


def read_metrics(directory: Path) -> list[Metrics]:
    """Read metrics.jsonl: one object per step; none if there is no such file. Raises `ValueError` if it is damaged."""
    return [metrics for _, metrics in read_lines(directory / "metrics.jsonl")]


def save_imported(model: MiniDS, tokenizer: Tokenizer, source: Path, directory: Path) -> None:
    """Save an imported model as a run with one checkpoint, of step 0."""
    checkpoint = directory / "checkpoints" / "step-00000000"
    save_checkpoint(checkpoint, {"model": model.state_dict()}, {"step": 0, "config": model.config.to_dict()})
    tokenizer.save(directory)
    write_run(directory, "import", {"config": model.config.to_dict(), "source": str(source)})


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a run's folder during the block; the operating system releases the lock of a process that died.

    Raises `ValueError` if another process holds the lock. Does nothing if folders cannot be locked (Windows, some
    network drives).
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is in use by another process: wait for it, or stop it first") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
