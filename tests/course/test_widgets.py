"""An Explorer draws anew when a control moves, and shows a picture without a kernel."""

import base64

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from minids.course.widgets import Explorer


def draw(height, flip, shape):
    if height == 4:
        raise ValueError("<4> is too high")
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, -height if flip else height], marker=shape)
    return figure


@pytest.fixture
def explorer():
    return Explorer(draw, height=(1, 5, 2), flip=False, shape=["o", "s"])


@pytest.mark.parametrize("name, value", [("height", 3), ("flip", True), ("shape", "s")])
def test_every_kind_of_control_redraws(explorer, name, value):
    before = explorer.png
    explorer.controls[name].value = value
    assert explorer.values[name] == value
    assert explorer.png != before


def test_fractions_make_a_slider_of_fractions():
    explorer = Explorer(lambda x: Figure(figsize=(1, x)), x=(0.5, 2.0, 1.0))
    explorer.controls["x"].value = 1.5
    assert explorer.values == {"x": 1.5}


def test_without_a_kernel_there_is_a_picture_and_a_line_of_text(explorer, tmp_path):
    bundle, metadata = explorer._repr_mimebundle_()
    assert bundle["text/plain"] == "Explorer(draw: height=2, flip=False, shape=o)"
    assert "application/vnd.jupyter.widget-view+json" in bundle
    picture = tmp_path / "picture.png"
    picture.write_bytes(base64.b64decode(bundle["image/png"]))
    assert matplotlib.image.imread(picture).shape[:2] == (180, 360), "two pixels per dot of the page"
    assert metadata["image/png"] == {"width": 180, "height": 90}


def test_a_figure_that_fails_says_so_and_recovers(explorer):
    before = explorer.png
    explorer.controls["height"].value = 4
    assert explorer.png == before
    assert explorer._complaint.value == "<b>ValueError: &lt;4&gt; is too high</b>"
    explorer.controls["height"].value = 5
    assert explorer._complaint.value == "" and explorer.png != before


def test_a_figure_that_fails_at_once_is_the_authors_mistake():
    with pytest.raises(ValueError, match="too high"):
        Explorer(draw, height=(1, 5, 4), flip=False, shape=["o"])
