"""metrics.jsonl: what every step leaves behind, a JSON object a line; and the same as TensorBoard's scalars."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from minids.files import write_text_whole

Metrics = dict[str, Any]


def cut_metrics(path: Path, step: int) -> None:
    """Forget the steps after the checkpoint, which are about to be taken again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        # A line without an end was being written when the run was killed.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text_whole(path, "".join(kept))


@contextmanager
def metrics_file(directory: Path | None, step: int, tensorboard: bool = False) -> Iterator[Callable[[Metrics], None]]:
    """A function that appends a line to `directory`/metrics.jsonl at once; without a directory it does nothing.

    With `tensorboard`, it adds the numbers to `directory`/tensorboard too. What a killed run wrote of steps after
    `step` is dropped in both. Raises `ValueError` where TensorBoard's package is missing.
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
    """TensorBoard's, of a package that is not required. Raises `ValueError` where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard=True: needs `pip install tensorboard` ({error})") from None
    return SummaryWriter
