"""Bubbles, activations and parameters equal the published figures and formulas."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_sizes import takes

from minids.parallel.dualpipe import dualpipe, dualpipev
from minids.parallel.one_f_one_b import gpipe, interleaved_one_f_one_b, one_f_one_b
from minids.parallel.schedules import SCHEDULES, bubble_formula, compare
from minids.parallel.zero_bubble import zb1p, zbv

# FACTS.md section 6.1: ranks, micro-batches, costs; bubble per rank from the end to the middle; formula; 1F1B; ZB1P;
# makespan. The last three rows, where B is not 2W, have a formula that the order does not meet.
CHECKS = [
    (4, 8, (1, 2, 1, 3), [2, 2], 2, 9, 3, 26),
    (8, 20, (1, 2, 1, 3), [6, 6, 6, 6], 6, 21, 7, 66),
    (8, 16, (1, 2, 1, 3), [6, 6, 6, 6], 6, 21, 7, 54),
    (16, 32, (1, 2, 1, 3), [14] * 8, 14, 45, 15, 110),
    (8, 20, (1, 2, 1, 2.5), [3.5, 4, 4.5, 4.5], 4.5, 21, 7, 59),
    (8, 20, (1, 2, 1, 2), [1, 2, 3, 3], 3, 21, 7, 52),
    (8, 20, (1, 2, 0.5, 3), [9.5] * 4, 10.5, 21, 14, 69.5),
    (8, 20, (1, 2.5, 1, 3.5), [8] * 4, 9, 24.5, 10.5, 78),
    (8, 20, (1, 1.5, 1, 2.5), [6] * 4, 3, 17.5, 3.5, 56),
]


@pytest.mark.parametrize("ranks, micro_batches, costs, bubble, formula, bubble_1f1b, bubble_zb1p, makespan", CHECKS)
def test_checks_of_the_facts_sheet(ranks, micro_batches, costs, bubble, formula, bubble_1f1b, bubble_zb1p, makespan):
    schedule = dualpipe(ranks, micro_batches)
    timeline = schedule.simulate(*costs)
    assert timeline.bubble == bubble + bubble[::-1] and timeline.makespan == makespan
    assert timeline.peak_activations == [ranks + 1] * ranks
    assert bubble_formula(schedule, *costs) == formula
    _, B, W, _ = costs
    assert (max(timeline.bubble) == formula) == (B == 2 * W)

    plain, halved = one_f_one_b(ranks, micro_batches), zb1p(ranks, micro_batches)
    assert plain.simulate(*costs).bubble == [bubble_formula(plain, *costs)] * ranks == [bubble_1f1b] * ranks
    assert bubble_formula(halved, *costs) == bubble_zb1p
    below_2w = {1.5: 7}  # where ZB1P's order, too, falls short of its formula
    assert halved.simulate(*costs).bubble == [below_2w.get(B, bubble_zb1p)] * ranks


@pytest.mark.parametrize("FB", [2, 2.25, 3])
@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (4, 8), (4, 18), (6, 12), (8, 20)])
def test_the_formulas_hold_for_every_size_where_forward_and_both_halves_take_equal_time(ranks, micro_batches, FB):
    for make in SCHEDULES.values():
        if make is zbv or not takes(make, ranks, micro_batches):
            continue
        schedule = make(ranks, micro_batches)
        assert max(schedule.simulate(FB=FB).bubble) == bubble_formula(schedule, FB=FB)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 9), *[st.integers(1, 4)] * 3)
def test_zb1p_keeps_to_its_formula_where_the_weight_half_is_shortest(ranks, more, W, F_more, I_more):
    costs = dict(F=W + F_more - 1, B=2 * W + I_more - 1, W=W)
    schedule = zb1p(ranks, ranks + more)
    assert schedule.simulate(**costs).bubble == [bubble_formula(schedule, **costs)] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_zbv_has_no_bubble_between_actions_of_equal_time(ranks):
    for rank in zbv(ranks, 2 * ranks + 3).simulate().spans:
        assert all(before.end == after.start for before, after in zip(rank, rank[1:], strict=False))


@pytest.mark.parametrize("ranks, micro_batches", [(4, 8), (8, 20)])
def test_memory_is_what_the_methods_promise(ranks, micro_batches):
    def peak(make):
        return make(ranks, micro_batches).simulate().peak_activations

    assert peak(gpipe) == [micro_batches] * ranks
    assert peak(one_f_one_b) == list(range(ranks, 0, -1))
    assert peak(zb1p) == [ranks] * ranks
    assert peak(zbv) == [2 * ranks] * ranks
    assert peak(dualpipe) == [ranks + 1] * ranks
    assert peak(dualpipev) == [2 * ranks + 1] * ranks
    assert max(peak(interleaved_one_f_one_b)) == interleaved_one_f_one_b(ranks, micro_batches).max_activations


def test_every_rank_holds_its_share_of_the_model_and_dualpipe_two():
    for make in SCHEDULES.values():
        assert make(4, 8).parameters == [0.5 if make is dualpipe else 0.25] * 4
    held = [{(stop.direction, stop.stage) for route in dualpipe(4, 8).routes for stop in route if stop.rank == r}
            for r in range(4)]  # fmt: skip
    assert held == [{(0, r), (1, 3 - r)} for r in range(4)]


def test_comparison_on_the_same_devices():
    """V3 Table 2 at PP 8 with 20 micro-batches: 21, 7 and 6; a cut in two stages per rank halves its actions."""
    rows = {row.pop("schedule"): row for row in compare(make(8, 20) for make in SCHEDULES.values())}
    figures = {name: tuple(row.values()) for name, row in rows.items()}
    assert list(rows["dualpipe"]) == ["parameters", "activations", "bubble", "formula", "makespan"]
    assert figures == {
        "gpipe": (1, 20, 21, 21, 81),
        "one_f_one_b": (1, 8, 21, 21, 81),
        "interleaved_one_f_one_b": (1, 12.5, 10.5, 10.5, 70.5),
        "zb1p": (1, 8, 7, 7, 67),
        "zbv": (1, 8, 3.5, None, 63.5),
        "dualpipe": (2, 9, 6, 6, 66),
        "dualpipev": (1, 8.5, 7, 7, 67),
    }
