"""Every notebook is stored as it ran, in normal form, with few exemptions; and a changed number does not pass."""

import re
import subprocess
import sys

import nbformat
import pytest
from notebooks import CHAPTERS, EXERCISES, SOLUTIONS, name

from minids.course import between, notebooks
from minids.course.notebooks import ROOT, normal, read, without_solutions

ALL = CHAPTERS + SOLUTIONS + EXERCISES
EXEMPT = "nbval-ignore-output"
TIMING = "timing"
TAGS = {EXEMPT, "raises-exception", notebooks.HIDDEN, TIMING}
each_notebook = pytest.mark.parametrize("path", ALL, ids=name)
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=name)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exempt(cell):
    return EXEMPT in cell.metadata.get("tags", [])


@each_notebook
def test_it_was_run_from_top_to_bottom_and_stored_in_normal_form(path):
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook == normal(notebook), "store it with: python -m minids.course.notebooks FILE"
    assert path.stat().st_size <= 750_000  # with figures of two pixels per dot


@each_notebook
def test_its_cells_can_be_compared(path):
    for cell in code_cells(read(path)):
        assert not cell.source.rstrip().endswith(";"), "the tests see the output that ';' hides: end with `_ = ...`"
        assert "NBVAL" not in cell.source, "exemptions are tags, not comments"
        assert set(cell.metadata.get("tags", [])) <= TAGS
        stored = "".join(str(output) for output in cell.outputs)
        assert not re.search(r"/(home|root|tmp|Users|work)/", cell.source + stored), "a path of one machine"


@each_notebook
def test_it_starts_with_a_title_and_what_it_needs(path):
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert re.search(r"^start\(minutes=[\d.]+", code_cells(notebook)[0].source, re.MULTILINE)


@each_chapter
def test_few_cells_are_exempt_and_none_that_states_a_result(path):
    """An exempt cell holds its measured values in bands, or the next cell of code, which is compared, asserts them.

    A cell that measures time has a tag of its own, and no band: timings never decide a test.
    """
    cells = code_cells(read(path))
    assert sum(map(exempt, cells)) <= len(cells) / 3
    for cell, following in zip(cells, cells[1:] + [None], strict=True):
        timed = TIMING in cell.metadata.get("tags", [])
        assert not (timed and "between(" in cell.source)
        if exempt(cell) and not timed and "between(" not in cell.source:
            assert following is not None
            assert any(word in following.source for word in ("assert", "check(", "between("))  # runs, exempt or not


@each_chapter
def test_it_is_made_as_a_chapter_is(path):
    notebook = read(path)
    cells = code_cells(notebook)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    figures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    widgets = [o for o in figures if o.data["text/plain"].startswith("Explorer(")]
    assert 40 <= len(notebook.cells) <= 100
    assert 1800 <= len(prose.split()) <= 4500
    assert len(figures) - len(widgets) >= 4 and widgets
    assert all(len(cell.source.splitlines()) <= 25 for cell in cells)
    assert f"../exercises/{path.name}" in prose


def test_the_exercises_are_made_from_the_solutions():
    assert [path.name for path in EXERCISES] == [path.name for path in SOLUTIONS]
    for solution, exercise in zip(SOLUTIONS, EXERCISES, strict=True):
        made, stored = without_solutions(read(solution)), read(exercise)
        assert [c.source for c in stored.cells] == [c.source for c in made.cells], "run it on the solution again"


@pytest.mark.parametrize("solution, exercise", list(zip(SOLUTIONS, EXERCISES, strict=True)), ids=lambda path: path.name)
def test_stored_verdicts_are_passed_and_not_started(solution, exercise):
    for path, words in ((solution, "passed"), (exercise, "not started yet")):
        checks = [cell for cell in code_cells(read(path)) if re.search(r"^check\(", cell.source, re.MULTILINE)]
        assert len(checks) >= 4
        for cell in checks:
            (output,) = cell.outputs
            verdict = output.data["text/plain"].splitlines()[0]
            assert verdict.endswith((f": {words}", ": an open task, without points"))


def printed_digits(cell):
    return [o for o in cell.get("outputs", []) if o.output_type == "stream" and re.search(r"\d", o.text)]


def nbval(path):
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_number_changed_by_hand_does_not_pass():
    """On a copy of a real chapter, cut after its first printed number; beside it, as it uses the same settings."""
    notebook = read(CHAPTERS[0])
    printing = [i for i, cell in enumerate(notebook.cells) if printed_digits(cell) and "start(" not in cell.source]
    notebook.cells = notebook.cells[: printing[0] + 1]
    (printed,) = printed_digits(notebook.cells[-1])
    copy = CHAPTERS[0].with_name("copy_of_a_chapter.ipynb")
    try:
        nbformat.write(notebook, copy)
        untouched = nbval(copy)
        printed.text = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), printed.text, count=1)
        nbformat.write(notebook, copy)
        changed = nbval(copy)
    finally:
        copy.unlink()
    assert untouched.returncode == 0, untouched.stdout
    assert changed.returncode == 1 and "mismatch" in changed.stdout, changed.stdout


def test_a_notebook_that_is_none_is_refused(tmp_path):
    for text in ("not json", "[]", '{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', ""):
        (tmp_path / "x.ipynb").write_text(text)
        with pytest.raises(ValueError, match="^x.ipynb is not a notebook: "):
            read(tmp_path / "x.ipynb")


def cell_of(source, outputs=()):
    return nbformat.v4.new_code_cell(source, outputs=[nbformat.from_dict(output) for output in outputs])


def test_holes_keep_what_stands_around_them():
    source = "def f(x):\n    '''Say.'''\n    ### BEGIN SOLUTION\n    y = x\n    return y\n    ### END SOLUTION\n\n\nf"
    (cell,) = without_solutions(nbformat.v4.new_notebook(cells=[cell_of(source)])).cells
    assert cell.source == "def f(x):\n    '''Say.'''\n    raise NotImplementedError(\"your turn\")\n\n\nf"


SIZE = {"width": 630, "height": 324}


def test_the_normal_form_drops_what_changes_from_run_to_run():
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "one\n"},
        {"output_type": "stream", "name": "stderr", "text": "!"},
        {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["\x1b[31m/tmp/x.py", "..."]},
        {"output_type": "display_data", "metadata": {}, "data": {notebooks.LIVE_WIDGET: {}, "text/plain": "W"}},
        {
            "output_type": "display_data",
            "metadata": {"image/png": SIZE | {"unconfined": True}},
            "data": {"image/png": ""},
        },
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell_of("1", outputs)], metadata={"widgets": {"state": {}}})
    kept = normal(notebook)
    assert [o.get("text") for o in kept.cells[0].outputs] == ["one\n", "!", None, None, None]
    assert kept.cells[0].outputs[2].traceback == ["ValueError: no"]
    assert kept.cells[0].outputs[3].data == {"text/plain": "W"}
    assert kept.cells[0].outputs[4].metadata == {"image/png": SIZE}
    assert "widgets" not in kept.metadata
    assert normal(kept) == kept


def test_the_normal_form_keeps_ids_and_folds_cells_of_plumbing():
    cells = [cell_of("1"), cell_of("2")]
    cells[1].metadata = {"tags": ["hide-input"], "collapsed": True}
    kept = normal(nbformat.v4.new_notebook(cells=cells)).cells
    assert [cell.id for cell in kept] == [cell.id for cell in cells]
    assert kept[0].metadata == {}
    assert kept[1].metadata == {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}


def test_a_measured_value_outside_its_band_stops_the_cell():
    assert between(0.5, 0.4, 0.6) == 0.5
    for value in (0.3, 0.7, float("nan")):
        with pytest.raises(AssertionError, match="where 0.4 to 0.6 is expected"):
            between(value, 0.4, 0.6)


def test_a_notebook_is_run_in_a_fresh_kernel_that_finds_minids(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[cell_of("import minids, os\nprint(os.environ['OMP_NUM_THREADS'])")])
    assert notebooks.execute(notebook, tmp_path).cells[0].outputs[0].text == "1\n"
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        notebooks.execute(nbformat.v4.new_notebook(cells=[cell_of("1 / 0")]), tmp_path)
