"""Training metrics: one JSON object per step in metrics.jsonl, and scalars for TensorBoard."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from minids.files import atomic_write_text

Metrics = dict[str, Any]


def cut_metrics(path: Path, step: int) -> None:
    """Delete the metrics of steps after `step`, which a resumed run computes again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        # A line without a line break is incomplete: the run was killed while writing it.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
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
