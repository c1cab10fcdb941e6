"""The chart of a schedule draws every action where it runs."""

import pytest

from minids.course.overlap import overlap
from minids.course.pipeline_chart import draw, draw_shares, draw_steps, draw_streams
from minids.parallel.dualpipe import dualpipe
from minids.parallel.one_f_one_b import gpipe, one_f_one_b
from minids.parallel.schedules import SCHEDULES


def bars(figure):
    """(rank, start, end, height) of every bar, left to right and top to bottom."""
    boxes = [bar.get_bbox() for bar in figure.axes[0].patches]
    return sorted((round((b.y0 + b.y1) / 2), b.x0, b.x1, round(b.height, 9)) for b in boxes)


@pytest.mark.parametrize("make", SCHEDULES.values())
def test_a_picture_has_a_bar_for_every_action_where_it_runs(make):
    timeline = make(4, 8).simulate(F=1, B=3, W=1.5, FB=3.5, transfer=0.25)
    expected = [
        (rank, start, end, round(0.86 / len(action.parts), 9))
        for rank, spans in enumerate(timeline.spans)
        for action, start, end in spans
        for _ in action.parts
    ]
    for (rank, start, end, height), wanted in zip(bars(draw(timeline)), sorted(expected), strict=True):
        assert (rank, height) == (wanted[0], wanted[3]) and (start, end) == pytest.approx(wanted[1:3])


def test_a_picture_tells_kinds_by_hatch_and_directions_by_darkness():
    schedule = dualpipe(2, 4)
    figure = draw(schedule.simulate())
    written = [text.get_text() for text in figure.axes[0].texts]
    parts = [part for actions in schedule.actions for action in actions for part in action.parts]
    assert written == [f"{part.kind}{part.micro_batch}" for part in parts]
    looks = {}
    for part, bar in zip(parts, figure.axes[0].patches, strict=True):
        looks.setdefault((part.kind, part.direction), set()).add((bar.get_hatch(), sum(bar.get_facecolor()[:3])))
    assert {len(ways) for ways in looks.values()} == {1}
    look = {key: next(iter(ways)) for key, ways in looks.items()}
    assert len({look[kind, 0][0] for kind in "FBIW"}) == 4
    assert all(look[kind, 0][0] == look[kind, 1][0] and look[kind, 0][1] > look[kind, 1][1] + 0.8 for kind in "FBIW")
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["F forward", "B backward", "I input half", "W weight half", "dark: direction 1"]
    plain = draw(one_f_one_b(2, 4).simulate(), labels=False)
    assert [text.get_text() for text in plain.legends[0].get_texts()] == words[:2] and not plain.axes[0].texts
    assert not draw(gpipe(2, 40).simulate(), size=(3, 2)).axes[0].texts  # no room


def test_steps_have_a_bracket_each_over_their_actions():
    timeline = gpipe(2, 3).simulate()
    figure = draw_steps(timeline, [[3, 0, 3], [2, 4]])
    assert len(figure.axes[0].patches) == 12
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "3", "1", "2"]
    ends = [(min(line.get_xdata()), max(line.get_xdata())) for line in figure.axes[0].lines]
    spans = [(timeline.spans[rank][first].start, timeline.spans[rank][last].end)
             for rank, first, last in ((0, 0, 2), (0, 3, 5), (1, 0, 1), (1, 2, 5))]  # fmt: skip
    assert ends == [pytest.approx((start + 0.12, end - 0.12)) for start, end in spans]


def test_streams_label_every_block_with_its_component_and_kind():
    layouts = {"alone": overlap("F", layers=2), "pair": overlap("FB", layers=1)}
    figure = draw_streams(layouts, "a title")
    alone, pair = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert alone == ["A F", "M F"] * 2 + ["D F", "C F"] * 2
    assert pair == ["A F", "M I", "M W", "M F", "A I", "A W", "D B", "D F", "C B", "C F"]
    assert figure.axes[1].get_title() == "pair: takes 6.5, computes for 6"


def test_shares_are_stacked_in_order_and_the_bubble_is_white():
    figure = draw_shares({"one": {"busy": 0.75, "bubble": 0.25}, "two": {"busy": 0.5, "bubble": 0.5}})
    bars = [(bar.get_x(), bar.get_width(), bar.get_facecolor()[:3] == (1, 1, 1)) for bar in figure.axes[0].patches]
    assert bars == [(0, 75, False), (0, 50, False), (75, 25, True), (50, 50, True)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["75.0", "50.0", "25.0", "50.0"]
