"""Charts of chapter 08: the numbers that are drawn are those that were counted."""

import torch

from minids.course.placement_chart import draw_placement, draw_sizes, draw_traffic
from minids.course.traffic import Traffic
from minids.parallel.eplb import Placement


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_sizes_show_every_number_and_the_sum_of_each_receiver():
    axes = draw_sizes(torch.tensor([[1, 0], [4, 2]]), "a title").axes[0]
    assert words(axes) == ["1", "0", "4", "2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0\n(5)", "1\n(2)"]


def test_traffic_has_a_map_for_each_kind_without_rows_that_stay():
    traffic = Traffic(torch.tensor([[9, 1], [2, 9]]), gpus_per_node=1)
    axes = draw_traffic({"one": traffic, "other": traffic}, "a title").axes
    assert [each.get_title() for each in axes[:2]] == ["one", "other"]
    assert axes[0].images[0].get_array().tolist() == [[0, 1], [2, 0]]


def test_placement_divides_the_load_of_an_expert_among_its_copies():
    placement = Placement(torch.tensor([[0, 1, 0, 2]]), gpus=2)
    axes = draw_placement(torch.tensor([8, 1, 3]), placement, "a title").axes[0]
    assert [bar.get_height() for bar in axes.patches] == [4, 1, 4, 3]
    assert words(axes)[:4] == ["E0", "E1", "E0", "E2"] and axes.lines[0].get_ydata()[0] == 6
    assert axes.patches[0].get_facecolor() == axes.patches[2].get_facecolor() != axes.patches[1].get_facecolor()
