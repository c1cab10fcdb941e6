"""`minids handout`: copy the exercise notebooks of some chapters for a class."""

import shutil
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from minids.cli.options import call, check_chapters
from minids.course.exercises import NAMES
from minids.course.notebooks import ROOT


def run(command: str, arguments: list[str]) -> None:
    call(handout_command, command, arguments)


def handout_command(
    folder: Positional[Path], chapters: tuple[int, ...] = tuple(NAMES), style: Literal["plain", "nbgrader"] = "plain"
) -> None:
    """Copy exercise notebooks for a class into a new folder.

    Args:
        folder: Folder to make.
        chapters: Numbers of the chapters, such as 1 2 3; by default all.
        style: plain puts all notebooks into the folder; nbgrader makes release/02_mla/02_mla.ipynb, and `minids grade`
            reads nbgrader's submitted/ as it is.
    """
    if not chapters:
        raise ValueError("--chapters: name at least one")
    check_chapters(chapters)
    notebooks = [ROOT / "exercises" / f"{NAMES[chapter]}.ipynb" for chapter in chapters]
    missing = [path for path in notebooks if not path.exists()]
    if missing:
        raise ValueError(f"there is no {missing[0]}: run this in a checkout of the course, not in an installed package")
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another folder")
    for path in notebooks:
        place = folder / "release" / path.stem if style == "nbgrader" else folder
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    count = "1 notebook" if len(notebooks) == 1 else f"{len(notebooks)} notebooks"
    print(f"Made {folder} with {count}. Grade what comes back with:")
    print(f"    python -m minids grade {'submitted' if style == 'nbgrader' else 'SUBMISSIONS'} --csv points.csv")
