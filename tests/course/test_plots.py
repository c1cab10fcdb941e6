"""The figures show the data they are given, with labels, and in grey too."""

import pytest

from minids.course import plots


def test_lines_hold_their_data_and_differ_in_more_than_colour():
    series = {"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 6])}
    figure = plots.lines(series, "x (m)", "y (s)", log="xy", level=(4.5, "bound"))
    (axes,) = figure.axes
    first, second, level = axes.get_lines()
    assert list(first.get_xdata()) == [1, 2] and list(second.get_ydata()) == [5, 6]
    assert list(level.get_ydata()) == [4.5, 4.5]
    assert first.get_linestyle() != second.get_linestyle()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x (m)", "y (s)")
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "bound"]


def test_bars_stand_side_by_side_by_name():
    figure = plots.bars({"V2": {"MLA": 1, "MHA": 7}, "V3": {"MLA": 2}}, "model", "cache (bytes)", log="y")
    (axes,) = figure.axes
    heights = {container.get_label(): [bar.get_height() for bar in container] for container in axes.containers}
    assert heights == {"MLA": [1, 2], "MHA": [7]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["V2", "V3"]
    hatches = [container[0].get_hatch() for container in axes.containers]
    assert len(set(hatches)) == 2


def test_points_carry_their_spread():
    figure = plots.points({"MHA": (10, 2.0, 0.5), "MLA": (3, 1.9, 0.25)}, "x", "y")
    spreads = [container.lines[2][0].get_segments()[0] for container in figure.axes[0].containers]
    assert [(s[0][1], s[1][1]) for s in spreads] == [(1.5, 2.5), (1.65, 2.15)]


def test_a_heatmap_says_what_its_colours_mean():
    figure = plots.heatmap([[1, 2], [3, 4]], "step", "expert", "load (tokens)")
    axes, bar = figure.axes
    assert axes.get_images()[0].get_array().tolist() == [[1, 2], [3, 4]]
    assert bar.get_ylabel() == "load (tokens)"


def test_nothing_is_drawn_through_global_state():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    plots.lines({"a": ([1], [1])}, "x", "y")
    assert pyplot.get_fignums() == []
