"""Run notebooks from top to bottom, and store them without outputs that change from run to run.

    python -m minids.course.notebooks chapters/02_mla.ipynb      run it and store it
    python -m minids.course.notebooks solutions/02_mla.ipynb     the same, and make exercises/02_mla.ipynb from it

`solutions/` is the source: each region between `### BEGIN SOLUTION` and `### END SOLUTION` becomes `raise
NotImplementedError` in the exercise.

The convention for outputs that differ between machines: the tests run each notebook again and compare the printed text
character by character. Figures and live widgets are not compared. A cell whose text has to differ (times, values that
depend on the processor) has the tag `nbval-ignore-output` and holds them with `minids.course.between`, or the next code
cell asserts what it showed; one that measures time has the tag `timing` too, and no band, since no time may decide a
test. A cell that is meant to fail has the tag `raises-exception`. There are no other exemptions.
A cell of plumbing (data for a plot, a table's layout) has the tag `hide-input`: it is folded, and can be opened.
"""

import copy
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from minids.threads import openmp_settings

ROOT = Path(__file__).resolve().parents[2]
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?### END SOLUTION[ \t]*$", re.DOTALL | re.MULTILINE)
LIVE_WIDGET = "application/vnd.jupyter.widget-view+json"
HIDDEN = "hide-input"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def environment() -> dict[str, str]:
    """Return the environment of every kernel that stores or compares outputs: minids importable, one thread."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return (
        openmp_settings(os.environ)
        | os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    )


def read(path: Path) -> NotebookNode:
    """Read a notebook. Raises `ValueError` if the file is not a notebook."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many types for what is not JSON, or JSON of another kind
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(f"{path.name} is not a notebook: {reason}") from None
    return notebook


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run all cells in a fresh kernel with working directory `folder`; return the result in normal form.

    Raises `ValueError` with the message of the first cell that fails without the tag `raises-exception`.
    """
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, resources=place, timeout=600, record_timing=False, coalesce_streams=True)
    try:
        client.execute(env=environment())
    except CellExecutionError as error:
        raise ValueError(f"a cell failed with {error.ename}: {error.evalue}\n{error}") from None
    return normal(notebook)


def normal(notebook: NotebookNode) -> NotebookNode:
    """Return a copy without times, colours and paths in tracebacks, and widgets without a kernel.

    The ids of the cells are kept, so that links and translations survive an inserted cell.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        folded = {"jupyter": {"source_hidden": True}} if HIDDEN in tags else {}
        cell.metadata = nbformat.from_dict(folded | ({"tags": tags} if tags else {}))
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "error":
                    output.traceback = [f"{output.ename}: {output.evalue}"]
                elif output.output_type != "stream":
                    output.data.pop(LIVE_WIDGET, None)
                    output.metadata = nbformat.from_dict(_shown_size(output))
    return notebook


def _shown_size(output: NotebookNode) -> dict[str, dict[str, int]]:
    size = output.metadata.get("image/png", {})
    return {"image/png": {name: size[name] for name in ("width", "height")}} if size else {}


def without_solutions(solution: NotebookNode) -> NotebookNode:
    """Return the exercise notebook of a solution, not run: each marked region raises `NotImplementedError`."""
    notebook = copy.deepcopy(solution)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = SOLUTION.sub(r'\1raise NotImplementedError("your turn")', cell.source)
            cell.outputs, cell.execution_count = [], None
    return notebook


def main(*paths: str) -> int:
    for path in map(Path, paths):
        print(f"running {path} ...", flush=True)
        notebook = read(path)
        nbformat.write(execute(notebook, path.parent), path)
        if path.resolve().parent == ROOT / "solutions":
            exercise = ROOT / "exercises" / path.name
            exercise.parent.mkdir(exist_ok=True)
            nbformat.write(execute(without_solutions(notebook), exercise.parent), exercise)
            print(f"made {exercise.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
