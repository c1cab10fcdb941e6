"""Schedules are simulated as by a clock, and an impossible one is refused with its reason."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_sizes import takes

from minids.parallel.dualpipe import dualpipe, dualpipev
from minids.parallel.one_f_one_b import gpipe, interleaved_one_f_one_b, one_f_one_b
from minids.parallel.schedule import Action, Pair, ScheduleError
from minids.parallel.schedules import SCHEDULES
from minids.parallel.zero_bubble import zb1p, zbv


@st.composite
def any_schedule(draw):
    make = draw(st.sampled_from(list(SCHEDULES.values())))
    ranks, micro_batches = draw(st.integers(1, 6)), draw(st.integers(1, 16))
    ranks += make is dualpipe and ranks % 2
    while not takes(make, ranks, micro_batches):
        micro_batches += 1
    if make is interleaved_one_f_one_b:
        return make(ranks, micro_batches, draw(st.integers(1, 3)))
    return make(ranks, micro_batches)


# Simulation ----------------------------------------------------------------------------------------------------------


def by_the_clock(schedule, cost, transfer):
    """Start of every action in ticks: at each tick, every free rank looks whether its next action may begin."""
    way = {(s.direction, s.stage): (n, i, len(r)) for n, r in enumerate(schedule.routes) for i, s in enumerate(r)}
    holder = {(n, i): stop.rank for n, route in enumerate(schedule.routes) for i, stop in enumerate(route)}
    finished = {}  # (forward?, route, position, micro-batch) -> tick
    starts, free_at = [[] for _ in schedule.actions], [0] * len(schedule.actions)
    tick = 0
    while any(len(starts[r]) < len(actions) for r, actions in enumerate(schedule.actions)):
        for rank, actions in enumerate(schedule.actions):
            if len(starts[rank]) == len(actions) or free_at[rank] > tick:
                continue
            action = actions[len(starts[rank])]
            awaited, results = [], []
            for kind, m, stage, direction in action.parts:
                n, i, length = way[direction, stage]
                if kind == "F":
                    results.append((True, n, i, m))
                    awaited += [(True, n, i - 1, m)] if i else []
                elif kind in "BI":
                    results.append((False, n, i, m))
                    awaited += [(True, n, i, m)] + ([(False, n, i + 1, m)] if i + 1 < length else [])
            seen_at = [finished.get(a, tick + 1) + transfer * (holder[a[1:3]] != rank) for a in awaited]
            if all(when <= tick for when in seen_at):
                starts[rank].append(tick)
                free_at[rank] = tick + cost[action.kind]
                finished |= dict.fromkeys(results, free_at[rank])
        tick += 1
    return starts


@settings(max_examples=60, deadline=None)
@given(any_schedule(), *[st.integers(1, 4)] * 4, st.integers(0, 3))
def test_times_equal_those_by_the_clock(schedule, F, input_half, W, saved, transfer):
    B = input_half + W
    FB = max(F + B - saved, 1)
    timeline = schedule.simulate(F, B, W, FB, transfer)
    cost = {"F": F, "B": B, "I": input_half, "W": W, "FB": FB}
    assert [[s.start for s in rank] for rank in timeline.spans] == by_the_clock(schedule, cost, transfer)
    assert all(s.end - s.start == cost[s.action.kind] for rank in timeline.spans for s in rank)
    assert timeline.makespan == max(s.end for rank in timeline.spans for s in rank)
    for rank, spans in enumerate(timeline.spans):
        assert timeline.bubble[rank] == timeline.makespan - sum(cost[s.action.kind] for s in spans)


def test_a_pipeline_of_two_by_hand():
    """F0 F1 . . . B0 . B1 above . F0 B0 F1 B1, with B = 2F; then with a transfer of 1."""
    timeline = one_f_one_b(2, 2).simulate(F=1, B=2)
    assert [[s.start for s in rank] for rank in timeline.spans] == [[0, 1, 4, 7], [1, 2, 4, 5]]
    assert timeline.makespan == 9 and timeline.bubble == [3, 3] and timeline.peak_activations == [2, 1]
    timeline = one_f_one_b(2, 2).simulate(F=1, B=2, transfer=1)
    assert [[s.start for s in rank] for rank in timeline.spans] == [[0, 1, 6, 9], [2, 3, 5, 6]]


@pytest.mark.parametrize(
    "costs, complaint",
    [
        (dict(W=3), "W=3: must not exceed B=2, of which it is a part"),
        (dict(F=-1), "F=-1: must be a finite number of at least 0"),
        (dict(FB=float("inf")), "FB=inf: must be a finite number of at least 0"),
        (dict(transfer=float("nan")), "transfer=nan: must be a finite number of at least 0"),
        (dict(F=0), "F=0: must be above 0"),
    ],
)
def test_impossible_costs_are_named(costs, complaint):
    with pytest.raises(ValueError) as error:
        dualpipe(4, 8).simulate(**costs)
    assert str(error.value) == complaint


# Check ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(any_schedule())
def test_every_schedule_passes_its_check(schedule):
    schedule.check()


@settings(max_examples=60, deadline=None)
@given(any_schedule(), st.data())
def test_an_action_left_out_is_named(schedule, data):
    rank = data.draw(st.integers(0, len(schedule.actions) - 1))
    i = data.draw(st.integers(0, len(schedule.actions[rank]) - 1))
    broken = edited(schedule, rank, lambda actions: actions[:i] + actions[i + 1 :])
    lost = [str(each) for each in schedule.actions[rank][i].passes]
    with pytest.raises(ScheduleError) as error:
        broken.check()
    assert str(error.value) in [f"rank {rank} never does {each}" for each in lost]


@settings(max_examples=60, deadline=None)
@given(any_schedule(), st.data())
def test_an_action_before_what_it_needs_on_its_own_rank_is_named(schedule, data):
    """Every stage does F, then the input gradient, then the weight gradient: put a later one first."""
    rank = data.draw(st.integers(0, len(schedule.actions) - 1))
    later = [i for i, action in enumerate(schedule.actions[rank]) if action.kind in "BIW"]
    if not later:
        return
    i = data.draw(st.sampled_from(later))
    action = schedule.actions[rank][i]
    broken = edited(schedule, rank, lambda actions: [action, *actions[:i], *actions[i + 1 :]])
    needed = action._replace(kind="I" if action.kind == "W" else "F")
    with pytest.raises(ScheduleError) as error:
        broken.check()
    assert str(error.value) == f"rank {rank} does {action} before {needed}, which it needs"


def edited(schedule, rank, edit):
    return replace(schedule, actions=[edit(a) if r == rank else a for r, a in enumerate(schedule.actions)])


def test_a_missing_weight_gradient_is_named():
    schedule = dualpipe(4, 8)
    weight = next(action for action in schedule.actions[1] if action.kind == "W")
    broken = edited(schedule, 1, lambda actions: [action for action in actions if action != weight])
    with pytest.raises(ScheduleError, match=f"rank 1 never does {weight}"):
        broken.check()
    broken.simulate()  # it runs, all the same


def test_a_backward_without_its_weight_half_is_named():
    broken = edited(
        gpipe(2, 2), 0, lambda actions: [a._replace(kind="I") if a == ("B", 1, 0, 0) else a for a in actions]
    )
    with pytest.raises(ScheduleError, match="rank 0 never does W of micro-batch 1 at stage 0"):
        broken.check()


def test_a_swapped_pair_is_named():
    broken = edited(one_f_one_b(2, 2), 1, lambda actions: [actions[1], actions[0], *actions[2:]])
    with pytest.raises(ScheduleError, match="rank 1 does B of micro-batch 0 .* before F of micro-batch 0 .* needs"):
        broken.check()


def test_a_deadlock_is_named():
    """Each rank is in order for itself, but rank 0 wants a gradient that rank 1 only makes after a later forward."""
    one_forward_ahead = edited(one_f_one_b(2, 3), 0, lambda a: [a[0], a[2], a[1], *a[3:]])
    one_forward_ahead.check()
    two = edited(one_forward_ahead, 1, lambda a: [a[0], a[2], a[1], *a[3:]])
    with pytest.raises(ScheduleError) as error:
        two.check()
    assert str(error.value) == (
        "deadlock: rank 0 at B of micro-batch 0 at stage 0 in direction 0 waits for I of micro-batch 0 at stage 1 in "
        "direction 0, rank 1 at F of micro-batch 1 at stage 1 in direction 0 waits for F of micro-batch 1 at stage 0 "
        "in direction 0"
    )
    with pytest.raises(ScheduleError, match="deadlock"):
        two.simulate()


def test_a_pair_cannot_feed_itself():
    itself = Pair(Action("F", 0, 0), Action("B", 0, 0))
    broken = replace(gpipe(1, 1), actions=[[itself]])
    with pytest.raises(ScheduleError, match="rank 0 does the pair of .* before F of micro-batch 0"):
        broken.check()


def test_simulating_what_never_comes_names_it():
    broken = edited(gpipe(2, 1), 0, lambda actions: actions[1:])
    with pytest.raises(ScheduleError, match="rank 1 waits forever at F .*: rank 0 never does F|rank 0 does B"):
        broken.simulate()
    broken = edited(gpipe(2, 1), 0, lambda actions: [])
    with pytest.raises(ScheduleError, match="rank 1 waits forever at F .*: rank 0 never does F of micro-batch 0"):
        broken.simulate()


@pytest.mark.parametrize(
    "added, complaint",
    [
        (Action("F", 0, 0), "rank 0 does F of micro-batch 0 at stage 0 in direction 0 2 times"),
        (Action("W", 3, 0), "rank 0 does W of micro-batch 3 at stage 0 in direction 0, but there are 3 micro-batches"),
        (Action("F", 0, 1), "rank 0 does F of micro-batch 0 at stage 1 in direction 0, which belongs on rank 1"),
        (Action("F", 0, 0, 1), "F of micro-batch 0 at stage 0 in direction 1: there is no such stage"),
        (Action("X", 0, 0), "rank 0 does X of micro-batch 0 at stage 0 in direction 0, which is not a known kind"),
        (Pair(Action("B", 3, 0), Action("F", 3, 0)), "rank 0 does the pair of B .*, which is not a known kind"),
    ],
)
def test_what_does_not_belong_is_named(added, complaint):
    with pytest.raises(ScheduleError, match=complaint):
        edited(one_f_one_b(2, 3), 0, lambda actions: [added, *actions]).check()


def test_more_activations_than_promised_are_named():
    with pytest.raises(ScheduleError, match="rank 0 keeps 8 activations; max_activations=4"):
        replace(gpipe(4, 8), max_activations=4).check()


@pytest.mark.parametrize(
    "make, size, complaint",
    [
        (gpipe, (0, 4), "ranks=0: must be at least 1"),
        (one_f_one_b, (4, 0), "micro_batches=0: must be at least 1"),
        (interleaved_one_f_one_b, (4, 9), "micro_batches=9: must divide into 2 equal groups"),
        (interleaved_one_f_one_b, (4, 8, 0), "stages_per_rank=0: must be at least 1"),
        (zb1p, (-1, 4), "ranks=-1: must be at least 1"),
        (zbv, (4, 6), "micro_batches=6: must be at least 2 * ranks - 1 = 7"),
        (dualpipe, (7, 20), "ranks=7: must be even"),
        (dualpipe, (8, 21), "micro_batches=21: must be even, half for each direction"),
        (dualpipe, (8, 14), "micro_batches=14: must be at least 2 * ranks = 16"),
        (dualpipev, (4, 7), "micro_batches=7: must be at least 2 * ranks = 8"),
    ],
)
def test_sizes_that_a_method_does_not_take_get_one_clear_line(make, size, complaint):
    with pytest.raises(ValueError) as error:
        make(*size)
    assert str(error.value) == complaint
