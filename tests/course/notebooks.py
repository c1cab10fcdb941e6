"""The notebooks of the repository, by folder."""

from pathlib import Path

from minids.course.notebooks import ROOT

CHAPTERS, SOLUTIONS, EXERCISES = (
    sorted((ROOT / folder).glob("*.ipynb")) for folder in ("chapters", "solutions", "exercises")
)


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def chapter_number(path: Path) -> int:
    return int(path.name[:2])
