"""A figure without labels fails the cell that shows it, when the tests run a notebook."""

import subprocess
import sys

import nbformat
import pytest
from labelled_figures import silent_axes
from matplotlib.figure import Figure

from minids.course import plots
from minids.course.notebooks import METADATA, ROOT


def drawn(figure):
    figure.canvas.draw()
    return silent_axes(figure)


def test_numbers_need_a_label_and_names_do_not():
    figure, axes = plots.canvas("", "")
    axes.plot([1, 2])
    assert [text.split()[1] for text in drawn(figure)] == ["x", "y"]
    axes.set_xticks([0, 1], ["MHA", "MLA"])
    assert [text.split()[1] for text in drawn(figure)] == ["y"]
    axes.set_ylabel("cache (bytes)")
    assert drawn(figure) == []
    axes.set_xscale("log")
    axes.set_xticks([1, 10])
    assert drawn(figure), "10 to some power is a number"


def test_one_label_may_serve_several_plots():
    figure = Figure()
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_ylabel("share of the load (%)")
    assert len(drawn(figure)) == 2
    figure.supxlabel("step")
    assert drawn(figure) == []


def test_a_colour_scale_is_an_axis():
    figure, axes = plots.canvas("step", "expert")
    figure.colorbar(axes.imshow([[1, 2]]))
    assert len(drawn(figure)) == 1
    axes.set_axis_off()
    figure.axes[1].set_ylabel("load (tokens)")
    assert drawn(figure) == []


@pytest.mark.parametrize("ylabel, code", [("loss (nats)", 0), ("", 1)])
def test_a_notebook_is_held_to_it(tmp_path, ylabel, code):
    source = f"from minids.course import plots, start\nstart(1)\nplots.canvas('step', {ylabel!r})[0]"
    path = tmp_path / "one.ipynb"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["nbval-ignore-output"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=METADATA), path)
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, path]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == code, finished.stdout
    assert ("Unlabelled" in finished.stdout) == bool(code)
