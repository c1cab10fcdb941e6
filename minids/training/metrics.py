"""metrics.jsonl: what every step leaves behind, a JSON object a line."""

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
