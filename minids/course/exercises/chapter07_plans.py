"""Plans for exercise 7.4 of chapter 7: DualPipe with its times, and plans in which something is wrong."""

from dataclasses import replace

from minids.parallel.dualpipe import dualpipe
from minids.parallel.schedule import Schedule, Timeline, peak_activations


def plan(ranks: int, micro_batches: int, FB: float) -> tuple[Schedule, Timeline]:
    """DualPipe, and when everything runs with F = 1, B = 2, W = 1 and `FB` for a pair."""
    schedule = dualpipe(ranks, micro_batches)
    return schedule, schedule.simulate(F=1, B=2, W=1, FB=FB)


def plan_with_sum(ranks, micro_batches, FB):
    return plan(ranks, micro_batches, FB=3)


def plan_without_last_weights(ranks, micro_batches, FB):
    schedule = dualpipe(ranks, micro_batches)
    schedule = replace(schedule, actions=[actions[:-1] for actions in schedule.actions])
    return schedule, schedule.simulate(F=1, B=2, W=1, FB=FB)


def plan_that_blocks(ranks, micro_batches, FB):
    """Rank 0 begins with a forward from the other end; the times are still those of the correct order."""
    schedule, timeline = plan(ranks, micro_batches, FB)
    first, *others = schedule.actions
    early = next(action for action in first if action.kind == "F" and action.direction == 1)
    rest = [action for action in first if action != early]
    return replace(schedule, actions=[[early, *rest], *others]), timeline


def plan_with_all_weights_last(ranks, micro_batches, FB):
    """It promises the memory that it takes, so that its own check passes."""
    schedule = dualpipe(ranks, micro_batches)
    actions = [[a for a in row if a.kind != "W"] + [a for a in row if a.kind == "W"] for row in schedule.actions]
    schedule = replace(schedule, actions=actions, max_activations=max(map(peak_activations, actions)))
    return schedule, schedule.simulate(F=1, B=2, W=1, FB=FB)
