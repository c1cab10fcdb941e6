"""Exercises of chapter 07: schedules of a pipeline, as lists of words for each rank.

"F3" is the forward of micro-batch 3, "B3" its backward, "I3" and "W3" the input and weight halves of that.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises.chapter07_plans import (
    plan,
    plan_that_blocks,
    plan_with_all_weights_last,
    plan_with_sum,
    plan_without_last_weights,
)

# 7.1 -----------------------------------------------------------------------------------------------------------------


def run_ahead(ahead: int, micro_batches: int) -> list[str]:
    """`ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    ahead = min(ahead, micro_batches)
    forwards = [f"F{m}" for m in range(ahead)]
    turns = [word for m in range(micro_batches - ahead) for word in (f"F{ahead + m}", f"B{m}")]
    return forwards + turns + [f"B{m}" for m in range(micro_batches - ahead, micro_batches)]


def one_f_one_b(ranks: int, micro_batches: int) -> list[list[str]]:
    """1F1B: rank r runs ranks - 1 - r forwards ahead."""
    return [run_ahead(ranks - 1 - rank, micro_batches) for rank in range(ranks)]


def grouped(ranks: int, micro_batches: int, group: int) -> list[list[str]]:
    """1F1B in which `group` consecutive micro-batches are one unit: that many forwards, that many backwards in turn."""
    return by_groups(ranks, micro_batches, group, lambda ranks, rank: ranks - 1 - rank)


def by_groups(
    ranks: int, micro_batches: int, group: int, ahead: Callable[[int, int], int], newest_first: bool = False
) -> list[list[str]]:
    """A rank runs `ahead(ranks, rank)` groups ahead; `newest_first` reverses the backwards of a group."""
    programs = []
    for rank in range(ranks):
        words = []
        for unit in run_ahead(ahead(ranks, rank), micro_batches // group):
            numbers = range(int(unit[1:]) * group, (int(unit[1:]) + 1) * group)
            words += [f"{unit[0]}{m}" for m in (reversed(numbers) if newest_first and unit[0] == "B" else numbers)]
        programs.append(words)
    return programs


def grouped_newest_first(ranks, micro_batches, group):
    return by_groups(ranks, micro_batches, group, lambda ranks, rank: ranks - 1 - rank, newest_first=True)


def group_ahead_by(groups: Callable[[int, int], int]) -> Callable[[int, int, int], list[list[str]]]:
    """A schedule in which each rank runs `groups(ranks, rank)` groups ahead."""
    return lambda ranks, micro_batches, group: by_groups(ranks, micro_batches, group, groups)


def ungrouped(ranks, micro_batches, group):
    return one_f_one_b(ranks, micro_batches)


def grouped_ahead_by_micro_batches(ranks, micro_batches, group):
    """Each rank runs `ranks - 1 - rank` micro-batches ahead, not groups; then groups in turn."""
    programs = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        words, forwards = [f"F{m}" for m in range(ahead)], list(range(ahead, micro_batches))
        for first in range(0, micro_batches, group):
            words += [f"F{m}" for m in forwards[:group]] + [f"B{m}" for m in range(first, first + group)]
            forwards = forwards[group:]
        programs.append(words)
    return programs


def all_forwards_first(ranks, micro_batches, group):
    return [run_ahead(micro_batches, micro_batches) for _ in range(ranks)]


def size_examples(_: torch.Generator) -> list[tuple]:
    return [(2, 4, 2), (4, 8, 2), (5, 6, 3), (3, 6, 1), (1, 6, 2), (4, 24, 2), (3, 4, 4)]


# 7.2 -----------------------------------------------------------------------------------------------------------------


def fill_bubble(program: list[str], late: int) -> list[str]:
    """Put a W behind an I as soon as more than `late` I are without one; those left come at the end, in order."""
    return fill(program, late)


def fill(
    program: list[str], late: int, newest_first: bool = False, digits: int | None = None, left_newest: bool = False
) -> list[str]:
    filled, waiting = [], []
    for word in program:
        filled.append(word)
        if word[0] == "I":
            waiting.append(f"W{word[1:][:digits]}")
            if len(waiting) > late:
                filled.append(waiting.pop(-1 if newest_first else 0))
    return filled + (waiting[::-1] if left_newest else waiting)


def fill_at_once(program, late):
    return fill(program, 0)


def fill_at_the_end(program, late):
    return fill(program, len(program))


def fill_one_early(program, late, **options):
    return fill(program, max(late - 1, 0), **options)


def fill_one_late(program, late):
    return fill(program, late + 1)


def halved(ranks: int, micro_batches: int) -> list[list[str]]:
    """1F1B with the input half of each backward in its place."""
    return [[word.replace("B", "I") for word in program] for program in one_f_one_b(ranks, micro_batches)]


def program_examples(_: torch.Generator) -> list[tuple]:
    small = [(["F0", "I0", "F1", "I1"], 1), (halved(3, 4)[0], 2)]
    sized = [(halved(4, 8)[rank], rank) for rank in (3, 0, 1)]
    return [*small, *sized, (halved(3, 2)[0], 5), (halved(6, 7)[2], 2), (halved(2, 12)[0], 3), ([], 1)]


# 7.3 -----------------------------------------------------------------------------------------------------------------


def end_times(
    programs: list[list[str]], cost: dict[str, float], waits: str = "FI", digits: int | None = None
) -> dict[tuple[int, str], float]:
    """When every (rank, word) ends. Words of the kinds `waits` wait for another rank; numbers have `digits` digits."""
    ended: dict[tuple[int, str], float] = {}
    clock, position = [0.0] * len(programs), [0] * len(programs)

    def needs(rank: int, word: str) -> Iterator[tuple[int, str]]:
        kind, number = word[0], word[1:][:digits]
        if kind == "F" and rank > 0 and "F" in waits:
            yield rank - 1, kind + number
        if kind == "I":
            yield rank, "F" + number
            if rank + 1 < len(programs) and "I" in waits:
                yield rank + 1, kind + number
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


def bubble(programs: list[list[str]], cost: dict[str, float]) -> list[float]:
    """The time that each rank idles between the start of the step and its end."""
    return idle(programs, cost)


def idle(programs, cost, waits="FI", digits=None) -> list[float]:
    makespan = max(end_times(programs, cost, waits, digits).values())
    return [float(makespan - work) for work in busy(programs, cost)]


def own_ends(programs, cost, waits="FI") -> list[float]:
    ended = end_times(programs, cost, waits)
    return [ended[rank, program[-1]] for rank, program in enumerate(programs)]


def idle_to_own_end(programs, cost, waits="FI"):
    return [float(end - work) for end, work in zip(own_ends(programs, cost, waits), busy(programs, cost), strict=True)]


def idle_after_own_end(programs, cost):
    ends = own_ends(programs, cost)
    return [float(max(ends) - end) for end in ends]


def idle_share(programs, cost, waits="FI"):
    makespan = max(end_times(programs, cost, waits).values())
    return [each / makespan for each in idle(programs, cost, waits)]


def idle_by_formula(programs, cost):
    return [float((len(programs) - 1) * (cost["F"] + cost["I"] - cost["W"]))] * len(programs)


def bubble_examples(_: torch.Generator) -> list[tuple]:
    sizes = ((2, 2), (4, 8), (3, 4), (3, 12), (1, 3))
    zb1p = [[fill(program, rank) for rank, program in enumerate(halved(*size))] for size in sizes]
    at_once = [fill(program, 0) for program in halved(4, 6)]
    at_the_end = [fill(program, 8) for program in halved(3, 5)]
    costs = [dict(F=1.0, I=1.0, W=1.0), dict(F=1.0, I=2.0, W=0.5), dict(F=2.0, I=1.0, W=3.0)]
    small = [(zb1p[0], costs[0]), (zb1p[1], costs[0]), (zb1p[2], costs[1])]
    return [*small, (at_once, costs[0]), (at_the_end, costs[2]), (zb1p[3], costs[1]), (zb1p[4], costs[2])]


# 7.5 -----------------------------------------------------------------------------------------------------------------

# 1F1B, 8 ranks, 20 micro-batches: 16.0 % longer over 60 seeds (SD 2.9); the median of 20 seeds has an SD below 1.
JITTER_LOW, JITTER_HIGH = 13.0, 19.0

EXERCISES = [
    Function(
        "7.1", "grouped", grouped, size_examples,
        mistakes={
            "a rank runs ahead by ranks - 1 - rank micro-batches, not groups": grouped_ahead_by_micro_batches,
            "the group is ignored: one forward and one backward in turn": ungrouped,
            "every rank runs ahead by as many groups as the first": group_ahead_by(lambda ranks, rank: ranks - 1),
            "a rank does one group of forwards too many before its first backward":
                group_ahead_by(lambda ranks, rank: ranks - rank),
            "the last rank runs ahead most, and the first not at all": group_ahead_by(lambda ranks, rank: rank),
            "no rank runs ahead": group_ahead_by(lambda ranks, rank: 0),
            "the backwards of a group come newest first": grouped_newest_first,
            "all forwards come before all backwards, as in GPipe": all_forwards_first,
            "every rank runs ahead by as many groups as the first, and by one too many":
                group_ahead_by(lambda ranks, rank: ranks),
        },
        hints=(
            "write 1F1B for units first, with a unit for each group; then replace each unit by its micro-batches",
            "ahead = min(ranks - 1 - rank, micro_batches // group); unit u stands for the micro-batches u * group to "
            "u * group + group - 1, in this order, forward and backward",
        ),
        section="chapter 07, section 2.3: 1F1B",
        points=2,
    ),
    Function(
        "7.2", "fill_bubble", fill_bubble, program_examples,
        mistakes={
            "every W follows its own I at once": fill_at_once,
            "all W wait until the end": fill_at_the_end,
            "the newest I gets its W first": partial(fill, newest_first=True),
            "only late - 1 of the I may be without a W": fill_one_early,
            "late + 1 of the I may be without a W": fill_one_late,
            "only the first digit of a micro-batch's number is read": partial(fill, digits=1),
            "the W that are left come newest first": partial(fill, left_newest=True),
            "the newest I gets its W first, and only late - 1 of the I may be without one":
                partial(fill_one_early, newest_first=True),
            "only the first digit of a number is read, and only late - 1 of the I may be without a W":
                partial(fill_one_early, digits=1),
        },
        hints=(
            "which W may be inserted after an I depends on the I before it: remember those that have no W yet",
            "keep a queue of the W to come; after each I, insert the oldest if more than `late` are in the queue",
        ),
        section="chapter 07, sections 2.4 and 2.6: the two halves of backward, and when W runs",
        points=2,
    ),
    Function(
        "7.3", "bubble", bubble, bubble_examples,
        mistakes={
            "an input half does not wait for that of the next rank": partial(idle, waits="F"),
            "a forward does not wait for that of the rank before": partial(idle, waits="I"),
            "no rank waits for another": partial(idle, waits=""),
            "a rank's time is counted to its own end, not to the end of the step": idle_to_own_end,
            "only the time after a rank's last word is counted": idle_after_own_end,
            "the bubble is given as a share of the step": idle_share,
            "the formula of ZB1P is used for every schedule": idle_by_formula,
            "only the first digit of a micro-batch's number is read": partial(idle, digits=1),
            "an input half does not wait for the next rank, and a rank's time is counted to its own end":
                partial(idle_to_own_end, waits="F"),
            "an input half does not wait for the next rank, and the bubble is given as a share of the step":
                partial(idle_share, waits="F"),
        },
        hints=(
            "first find when every word ends, then compare a rank's own work with the end of the last rank",
            "extend `times` of section 2.1: I waits for its own F and for I on rank + 1, W for its own I; "
            "then subtract each rank's sum of costs from the largest end",
        ),
        section="chapter 07, section 2.1: what waits for what",
        points=3,
    ),
    SpotTheBug(
        "7.4", "test_plan", plan,
        (
            Bug("a pair takes F + B, whatever was measured", plan_with_sum, "is FB = 3 a good choice for a test?"),
            Bug("the last W of each rank is forgotten", plan_without_last_weights, "is the gradient complete?"),
            Bug("the ranks wait for each other: a deadlock", plan_that_blocks, "can the schedule run at all?"),
            Bug("all W wait until the end", plan_with_all_weights_last, "what does the report promise about memory?"),
        ),
        hints=(
            "a schedule has to run and to be complete; a timeline has a bubble and a memory that formulas predict",
            "call plan(8, 20, 2.5): schedule.check(), bubble (PP / 2 - 1)(FB + B - 3 W), at most PP + 1 activations",
        ),
        section="chapter 07, section 2.6 (W at the end), section 3.4 (the check) and section 4.2 (the formula)",
    ),
    Experiment(
        "7.5", "longer_by", "step longer than without jitter, %", JITTER_LOW, JITTER_HIGH, seeds=tuple(range(20)),
        hints=(
            "the actions of `schedule.in_order()` come in an order in which all inputs are complete: one loop does it",
            "keep a clock per rank and the end of each pass: start = max(clock[rank], *(ended[each] for each in "
            "schedule.needs(action))); draw the factor once per action; set ended[each] for each of action.passes",
        ),
        section="chapter 07, section 2.1: what waits for what",
    ),
    OpenTask(
        "7.6", "better_pairs",
        (
            "`check()` passes, with the largest number of activations as the bound that you state",
            "one copy of the parameters, one stage per rank, and a computing share above 1F1B made of pairs (80.6 %)",
            "it says which idle slots the new order fills, and with what; a chart shows them",
            "it compares activations with 1F1B made of pairs (32), DualPipe (17) and DualPipeV (16.5)",
            "it is tried at another ratio of communication and with 32 micro-batches, and says where it loses",
        ),
        hints=(
            "1F1B made of pairs idles where it drains: what could be split there, as ZB1P and DualPipe do?",
            "draw the chart of 4 ranks: in the drain the first ranks wait for every gradient; replace the whole "
            "backwards there by I and W, and try where each W does least harm",
        ),
        section="chapter 07, sections 3.3 and 4.5: where W goes, 1F1B made of pairs",
    ),
]  # fmt: skip
