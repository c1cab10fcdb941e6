"""Exercises of chapter 07: orders of work in a pipeline, as lists of words for each rank.

"F3" is the forward of micro-batch 3, "B3" its backward, "I3" and "W3" the input and weight halves of that.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from minids.course.checks import Bug, Function, SpotTheBug
from minids.parallel.dualpipe import dualpipe
from minids.parallel.schedule import Schedule, Timeline, peak_activations


def run_ahead(ahead: int, micro_batches: int) -> list[str]:
    """`ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    ahead = min(ahead, micro_batches)
    forwards = [f"F{m}" for m in range(ahead)]
    turns = [word for m in range(micro_batches - ahead) for word in (f"F{ahead + m}", f"B{m}")]
    return forwards + turns + [f"B{m}" for m in range(micro_batches - ahead, micro_batches)]


def one_f_one_b(ranks: int, micro_batches: int) -> list[list[str]]:
    """1F1B: rank r runs ranks - 1 - r forwards ahead."""
    return [run_ahead(ranks - 1 - rank, micro_batches) for rank in range(ranks)]


def one_f_one_b_all_alike(ranks, micro_batches):
    return [run_ahead(ranks - 1, micro_batches) for _ in range(ranks)]


def one_f_one_b_one_more(ranks, micro_batches):
    return [run_ahead(ranks - rank, micro_batches) for rank in range(ranks)]


def one_f_one_b_upside_down(ranks, micro_batches):
    return [run_ahead(rank, micro_batches) for rank in range(ranks)]


def gpipe(ranks, micro_batches):
    return [run_ahead(micro_batches, micro_batches) for _ in range(ranks)]


def size_examples(_: torch.Generator) -> list[tuple]:
    return [(4, 8), (2, 2), (5, 3), (3, 1), (1, 4), (8, 20)]


def fill_bubble(program: list[str], late: int, newest_first: bool = False) -> list[str]:
    """Put a W behind an I as soon as more than `late` I are without one; those left come at the end, in order."""
    filled, waiting = [], []
    for word in program:
        filled.append(word)
        if word[0] == "I":
            waiting.append(f"W{word[1:]}")
            if len(waiting) > late:
                filled.append(waiting.pop(-1 if newest_first else 0))
    return filled + waiting


def fill_at_once(program, late):
    return fill_bubble(program, 0)


def fill_at_the_end(program, late):
    return fill_bubble(program, len(program))


def fill_newest_first(program, late):
    return fill_bubble(program, late, newest_first=True)


def fill_one_early(program, late):
    return fill_bubble(program, max(late - 1, 0))


def halved(ranks: int, micro_batches: int) -> list[list[str]]:
    """1F1B with the input half of each backward in its place."""
    return [[word.replace("B", "I") for word in program] for program in one_f_one_b(ranks, micro_batches)]


def program_examples(_: torch.Generator) -> list[tuple]:
    return [(halved(4, 8)[rank], rank) for rank in (3, 0, 1)] + [(halved(3, 2)[0], 5), (halved(6, 7)[2], 2)]


def end_times(programs: list[list[str]], cost: dict[str, float], waits: bool) -> dict[tuple[int, str], float]:
    """When every (rank, word) ends; an input half waits for that of the next rank, unless `waits` is False."""
    ended, clock, position = {}, [0.0] * len(programs), [0] * len(programs)

    def needs(rank: int, word: str) -> Iterator[tuple[int, str]]:
        kind, number = word[0], word[1:]
        if kind == "F" and rank > 0:
            yield rank - 1, word
        if kind == "I":
            yield rank, "F" + number
            if waits and rank + 1 < len(programs):
                yield rank + 1, word
        if kind == "W":
            yield rank, "I" + number

    while len(ended) < sum(map(len, programs)):
        for rank, program in enumerate(programs):
            while position[rank] < len(program):
                word = program[position[rank]]
                needed = list(needs(rank, word))
                if not all(each in ended for each in needed):
                    break
                clock[rank] = max([clock[rank], *(ended[each] for each in needed)]) + cost[word[0]]
                ended[rank, word] = clock[rank]
                position[rank] += 1
    return ended


def busy(programs: list[list[str]], cost: dict[str, float]) -> list[float]:
    """The work of each rank."""
    return [sum(cost[word[0]] for word in program) for program in programs]


def bubble(programs: list[list[str]], cost: dict[str, float], waits: bool = True) -> list[float]:
    """The time that each rank idles between the start of the step and its end."""
    makespan = max(end_times(programs, cost, waits).values())
    return [float(makespan - work) for work in busy(programs, cost)]


def bubble_without_waiting(programs, cost):
    return bubble(programs, cost, waits=False)


def bubble_to_own_end(programs, cost):
    ended = end_times(programs, cost, waits=True)
    ends = [ended[rank, program[-1]] for rank, program in enumerate(programs)]
    return [float(end - work) for end, work in zip(ends, busy(programs, cost), strict=True)]


def bubble_as_share(programs, cost):
    makespan = max(end_times(programs, cost, waits=True).values())
    return [idle / makespan for idle in bubble(programs, cost)]


def bubble_by_formula(programs, cost):
    return [float((len(programs) - 1) * (cost["F"] + cost["I"] - cost["W"]))] * len(programs)


def bubble_examples(_: torch.Generator) -> list[tuple]:
    zb1p = [[fill_bubble(program, rank) for rank, program in enumerate(halved(n, m))] for n, m in ((4, 8), (3, 4))]
    at_once = [fill_bubble(program, 0) for program in halved(4, 6)]
    at_the_end = [fill_bubble(program, 8) for program in halved(3, 5)]
    costs = [dict(F=1.0, I=1.0, W=1.0), dict(F=1.0, I=2.0, W=0.5), dict(F=2.0, I=1.0, W=3.0)]
    return [(zb1p[0], costs[0]), (zb1p[1], costs[1]), (at_once, costs[0]), (at_the_end, costs[2])]


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
    """Rank 0 begins with a forward from the other end; the times are still those of the right order."""
    schedule, timeline = plan(ranks, micro_batches, FB)
    first, *others = schedule.actions
    early = next(action for action in first if action.kind == "F" and action.direction == 1)
    rest = [action for action in first if action != early]
    return replace(schedule, actions=[[early, *rest], *others]), timeline


def plan_with_all_weights_last(ranks, micro_batches, FB):
    """It promises the memory that it takes, so that its own check is content."""
    schedule = dualpipe(ranks, micro_batches)
    actions = [[a for a in row if a.kind != "W"] + [a for a in row if a.kind == "W"] for row in schedule.actions]
    schedule = replace(schedule, actions=actions, max_activations=max(map(peak_activations, actions)))
    return schedule, schedule.simulate(F=1, B=2, W=1, FB=FB)


EXERCISES = [
    Function(
        "7.1", "one_f_one_b", one_f_one_b, size_examples,
        mistakes={
            "every rank runs ahead by as many forwards as the first": one_f_one_b_all_alike,
            "a rank does one forward too many before its first backward": one_f_one_b_one_more,
            "the last rank runs ahead most, and the first not at all": one_f_one_b_upside_down,
            "all forwards come before all backwards, as in GPipe": gpipe,
        },
        hint="rank r starts with min(ranks - 1 - r, micro_batches) forwards; then forward and backward in turn",
        points=2,
    ),
    Function(
        "7.2", "fill_bubble", fill_bubble, program_examples,
        mistakes={
            "every W follows its own I at once": fill_at_once,
            "all W wait until the end": fill_at_the_end,
            "the newest I gets its W first": fill_newest_first,
            "only late - 1 of the I may be without a W": fill_one_early,
        },
        hint="keep a queue of the W that wait; after each I, take the oldest out if there are more than `late`",
        points=2,
    ),
    Function(
        "7.3", "bubble", bubble, bubble_examples,
        mistakes={
            "an input half does not wait for that of the next rank": bubble_without_waiting,
            "a rank's time is counted to its own end, not to the end of the step": bubble_to_own_end,
            "the bubble is given as a share of the step": bubble_as_share,
            "the formula of ZB1P is used for every order": bubble_by_formula,
        },
        hint="extend `times` of chapter section 2.1: I waits for its own F and the next rank's I, W for its own I",
        points=3,
    ),
    SpotTheBug(
        "7.4", "test_plan", plan,
        (
            Bug("a pair takes F + B, whatever was measured", plan_with_sum, "is FB = 3 a good choice for a test?"),
            Bug("the last W of each rank is forgotten", plan_without_last_weights, "is the gradient complete?"),
            Bug("the ranks wait for each other in a circle", plan_that_blocks, "can the schedule run at all?"),
            Bug("all W wait until the end", plan_with_all_weights_last, "what does the report promise about memory?"),
        ),
    ),
]  # fmt: skip
