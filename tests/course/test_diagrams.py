"""Every drawing of the course is legible: words fit into their boxes, nothing lies outside, roles differ in grey."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from minids.config import ModelConfig
from minids.course.diagrams import LOOK, WIDEST, Diagram, shape
from minids.course.drawings import DRAWINGS
from minids.course.drawings.v3_map import v3_map


def extents(diagram):
    """The rectangle of every text, in units of the drawing."""
    canvas = FigureCanvasAgg(diagram.figure)
    canvas.draw()
    inverse = diagram.axes.transData.inverted()
    for text in diagram.axes.texts:
        if text.get_text():
            yield text.get_text(), inverse.transform_bbox(text.get_window_extent(canvas.get_renderer()))


@pytest.mark.parametrize("name", DRAWINGS)
def test_words_fit_into_their_boxes_and_the_drawing(name):
    diagram = DRAWINGS[name]()
    (left, right), (bottom, top) = diagram.axes.get_xlim(), diagram.axes.get_ylim()
    places = dict(extents(diagram))
    for words, place in places.items():
        assert left <= place.x0 and place.x1 <= right and bottom <= place.y0 and place.y1 <= top, words
    for box in diagram.boxes.values():
        for words in filter(None, (box.label, box.shape)):
            assert places[words].width <= box.width, f"{words!r} is wider than its box"


@pytest.mark.parametrize("name", DRAWINGS)
def test_words_do_not_cover_each_other(name):
    texts = list(extents(DRAWINGS[name]()))
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 0.02 or up <= 0.05, f"{one!r} covers {other!r}"


@pytest.mark.parametrize("name", DRAWINGS)
def test_boxes_do_not_cover_each_other(name):
    for a, b in itertools.combinations(DRAWINGS[name]().boxes.values(), 2):
        across = (a.width + b.width) / 2 - abs(a.x - b.x)
        up = (a.height + b.height) / 2 - abs(a.y - b.y)
        assert across <= 1e-6 or up <= 1e-6, f"{a.label!r} covers {b.label!r}"


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_the_same_svg_each_time_and_small(name):
    first, second = DRAWINGS[name]().svg(), DRAWINGS[name]().svg()
    assert first == second and len(first) < 60_000
    assert float(ElementTree.fromstring(first).get("width").removesuffix("pt")) <= WIDEST
    assert DRAWINGS[name]().title


def grey(color):
    red, green, blue = to_rgb(color)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_roles_differ_in_grey_by_face_edge_or_line():
    looks = {role: (grey(look[0]), grey(look[1]), *look[2:]) for role, look in LOOK.items()}
    for (one, a), (other, b) in itertools.combinations(looks.items(), 2):
        differs = abs(a[0] - b[0]) > 0.04 or abs(a[1] - b[1]) > 0.15 or a[2] != b[2] or a[3] != b[3]
        assert differs or "operation" in (one, other), f"{one} looks like {other} in grey"  # that one has round ends


def test_labels_come_from_the_config():
    config = ModelConfig.preset("tiny")
    boxes = v3_map("moe", config=config).boxes
    assert boxes["cache"].shape == f"{config.kv_lora_rank + config.qk_rope_head_dim} values a token"
    assert boxes["moe"].role == "here" and boxes["attention"].role == "operation"
    assert v3_map(config=ModelConfig.preset("v3")).boxes["cache"].shape == "576 values a token"


def test_a_part_that_is_not_on_the_map_is_named():
    with pytest.raises(ValueError, match="'engine' is not on the map: choose from attention"):
        v3_map("engine")


def test_numbers_in_words_are_kept():
    diagram = Diagram(6, 1, "A title")
    diagram.box("a", 3, 0.5, "2.788M", shape(128, 7168), width=4)
    assert "2.788M" in diagram.svg() and "128 × 7,168" in diagram.svg()
