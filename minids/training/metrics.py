"""metrics.jsonl: what every step leaves behind, a JSON object a line; and the same as TensorBoard's scalars."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minids.files import write_text_whole

Metrics = dict[str, Any]


def cut_metrics(path: Path, step: int) -> None:
    """Forget the steps after the checkpoint, which are about to be taken again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break  # a line that was being written when the run was killed
    write_text_whole(path, "".join(kept))


@contextmanager
def metrics_file(directory: Path | None) -> Iterator[Callable[[Metrics], None]]:
    """A function that appends a line to `directory`/metrics.jsonl at once; without a directory it does nothing."""
    if directory is None:
        yield lambda metrics: None
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "metrics.jsonl").open("a") as file:

        def write(metrics: Metrics) -> None:
            file.write(json.dumps(metrics) + "\n")
            file.flush()

        yield write


@contextmanager
def tensorboard_scalars(directory: Path | None, step: int) -> Iterator[Callable[[Metrics], None]]:
    """A function that adds the numbers of a step to `directory`/tensorboard at once; without one it does nothing.

    `step` is the last one taken: TensorBoard is told to drop what a killed run wrote of later ones.
    Raises `ValueError` where the package is missing.
    """
    if directory is None:
        yield lambda metrics: None
        return
    with summary_writer()(directory / "tensorboard", purge_step=step + 1) as writer:

        def write(metrics: Metrics) -> None:
            for name in metrics.keys() - {"step"}:
                writer.add_scalar(name, metrics[name], metrics["step"])
            writer.flush()

        yield write


def summary_writer() -> type:
    """TensorBoard's, of a package that is not required. Raises `ValueError` where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard=True: needs `pip install tensorboard` ({error})") from None
    return SummaryWriter
