"""`minids grade`: run and grade the exercise notebooks of a class."""

from pathlib import Path

from tyro.conf import Positional

from minids.cli.options import call
from minids.course import grade


def run(command: str, arguments: list[str]) -> None:
    call(grade_command, command, arguments)


def grade_command(
    submissions: Positional[Path],
    csv: Path | None = None,
    junit: Path | None = None,
    seconds: float = grade.SECONDS,
) -> None:
    """Run and grade the exercise notebooks of a class, and print a table of points.

    Args:
        submissions: Folder with one folder per student, which contains notebooks such as 02_mla.ipynb.
        csv: File to which the table is also written, as CSV.
        junit: File to which the table is also written, as JUnit XML.
        seconds: Time limit of one notebook, in seconds, and again of the check of each exercise; raise it on a slow
            machine.
    """
    for path in filter(None, (csv, junit)):
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
    if grade.isolation_available():
        warning = "notebooks run in isolation: each sees its own folder, Python and this package, and no network"
    else:
        warning = (
            "no isolation: the students' code runs with your rights, with limits on time and memory only; "
            "grade notebooks that you do not trust in a container or a separate account"
        )
    print(f"minids: {warning}", flush=True)
    grades = grade.grade(submissions, seconds)
    print("\n".join(grade.as_text(grades)))
    if csv is not None:
        grade.write_csv(grades, csv)
    if junit is not None:
        grade.write_junit(grades, junit)
