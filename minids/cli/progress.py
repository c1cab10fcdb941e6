"""`minids progress`: which exercises are done in this checkout."""

from minids.cli.options import call
from minids.course import progress
from minids.course.checks import graded
from minids.course.exercises import NAMES


def run(command: str, arguments: list[str]) -> None:
    call(progress_command, command, arguments)


def progress_command() -> None:
    """Print which exercises have passed their check in this checkout, by chapter, and which comes next."""
    print("\n".join(progress.as_text((name, graded(chapter)) for chapter, name in NAMES.items())))
