"""Training metrics: one JSON object per step in metrics.jsonl, and scalars for TensorBoard."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from minids.files import atomic_write_text

Metrics = dict[str, Any]


def read_lines(path: Path) -> list[tuple[str, Metrics]]:
    """Read metrics.jsonl: the text of each line, and its object. A file that does not exist has no lines.

    Blank lines are skipped, and a last line without a line break, which a run was killed while writing.
    Raises `ValueError` naming a line that is no JSON object with a step.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    complete = [(i, line) for i, line in enumerate(lines, 1) if line.endswith(b"\n") and not line.isspace()]
    return [_parse(path, number, line) for number, line in complete]


def _parse(path: Path, number: int, line: bytes) -> tuple[str, Metrics]:
    try:
        metrics = json.loads(line.decode())
        if isinstance(metrics["step"], int):
            return line.decode(), metrics
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged: line {number} is no JSON object with a step; delete that line to go on")


def cut_metrics(path: Path, step: int) -> None:
    """Delete the metrics of steps after `step`, which a resumed run computes again. Raises as `read_lines`."""
    if path.exists():
        kept = [line for line, metrics in read_lines(path) if metrics["step"] <= step]
        atomic_write_text(path, "".join(kept))


@contextmanager
def metrics_file(directory: Path | None, step: int, tensorboard: bool = False) -> Iterator[Callable[[Metrics], None]]:
    """Yield a function that appends metrics to `directory`/metrics.jsonl; without a directory it does nothing.

    With `tensorboard`, it also writes to `directory`/tensorboard. In both, metrics of steps after `step` are deleted
    first. Raises `ValueError` if TensorBoard's package is missing.
    """
    if directory is None:
        yield lambda metrics: None
        return
    cut_metrics(directory / "metrics.jsonl", step)
    directory.mkdir(parents=True, exist_ok=True)
    charts = summary_writer()(directory / "tensorboard", purge_step=step + 1) if tensorboard else nullcontext()
    with (directory / "metrics.jsonl").open("a") as file, charts as chart:

        def write(metrics: Metrics) -> None:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            if chart is not None:
                for name in metrics.keys() - {"step"}:
                    chart.add_scalar(name, metrics[name], metrics["step"])
                chart.flush()

        yield write


def summary_writer() -> type:
    """Import TensorBoard's SummaryWriter. Raises `ValueError` if the optional package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard=True: needs `pip install tensorboard` ({error})") from None
    return SummaryWriter
