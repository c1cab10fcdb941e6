"""`minids grade`: judge the exercise notebooks of a class."""

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm
from tyro.conf import Positional

from minids.cli.options import call, check_chapters
from minids.course import grade
from minids.course.judge import find_layers


def run(command: str, arguments: list[str]) -> None:
    call(grade_command, command, arguments)


def grade_command(
    submissions: Positional[Path],
    csv: Path | None = None,
    junit: Path | None = None,
    seconds: float = grade.SECONDS,
    workers: int | None = None,
    chapters: tuple[int, ...] = (),
) -> None:
    """Judge the exercise notebooks of a class, and print a table of points.

    Args:
        submissions: Folder (or zip file) with a folder or zip file per student, which contains notebooks such as
            02_mla.ipynb.
        csv: File to which the table is also written, as CSV, row by row.
        junit: File to which the table is also written, as JUnit XML.
        seconds: Limit of a cell, in seconds of processor time; the exercises of a notebook share as much. On the clock,
            all cells of a notebook may take three times as long, and again its exercises.
        workers: Notebooks judged at the same time; by default one per CPU core. Each may use 4 GiB of memory.
        chapters: Numbers of the chapters that are expected from all; by default those that any student submitted.
    """
    for path in filter(None, (csv, junit)):
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file for the table")
    if csv is not None and csv == junit:
        raise ValueError(f"--csv and --junit are the same file, {csv}")
    check_chapters(chapters)
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1")
    if sys.platform == "win32":
        raise ValueError("grading needs Linux or macOS; on Windows, use WSL")
    layers = find_layers()
    if layers:
        said = (
            f"notebooks run in isolation ({', '.join(layers)}): no network, and no file but Python and what they import"
        )
    else:
        said = (
            "no isolation: the students' code runs with your rights, with limits on time and memory only; "
            "grade notebooks that you do not trust in a container or a separate account"
        )
    print(f"minids: {said}", flush=True)
    made: list[grade.Grade] = []
    try:
        with contextlib.ExitStack() as stack:
            table = stack.enter_context(grade.CsvFile(csv)) if csv is not None else None

            def kept():
                for each in grade.grade(submissions, seconds, workers, chapters):
                    made.append(each)
                    if table is not None:
                        table.write(each)
                    yield each

            for line in grade.as_text(tqdm(kept(), unit="exercise", disable=None)):
                tqdm.write(line)
    finally:
        if junit is not None and made:
            grade.write_junit(made, junit)
