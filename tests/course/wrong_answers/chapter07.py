"""Wrong answers to the exercises of chapter 07."""

import torch

from minids.course.exercises import chapter07 as given
from minids.parallel.one_f_one_b import one_f_one_b


def groups_from_one(ranks, micro_batches, group):
    programs = given.grouped(ranks, micro_batches, group)
    return [[f"{word[0]}{int(word[1:]) + 1}" for word in program] for program in programs]


def groups_backward_first(ranks, micro_batches, group):
    programs = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches // group) * group
        words = [f"F{m}" for m in range(ahead)]
        for first in range(0, micro_batches, group):
            words += [f"B{m}" for m in range(first, first + group)]
            words += [f"F{m}" for m in range(first + ahead, first + ahead + group) if m < micro_batches]
        programs.append(words)
    return programs


def groups_without_minimum(ranks, micro_batches, group):
    programs = []
    for rank in range(ranks):
        ahead = (ranks - 1 - rank) * group
        words = [f"F{m}" for m in range(ahead)]
        for first in range(0, micro_batches, group):
            words += [f"F{m}" for m in range(first + ahead, first + ahead + group) if m < micro_batches]
            words += [f"B{m}" for m in range(first, first + group)]
        programs.append(words)
    return programs


def groups_as_units(ranks, micro_batches, group):
    return given.one_f_one_b(ranks, micro_batches // group)


def groups_interleaved(ranks, micro_batches, group):
    """Each unit's words are strided: unit u is micro-batches u, u + units, ..."""
    units = micro_batches // group
    programs = given.one_f_one_b(ranks, units)
    return [[f"{w[0]}{int(w[1:]) + i * units}" for w in program for i in range(group)] for program in programs]


def groups_as_text(ranks, micro_batches, group):
    return [" ".join(program) for program in given.grouped(ranks, micro_batches, group)]


def groups_with_two_mistakes(ranks, micro_batches, group):
    return [program[:-1] for program in given.grouped_newest_first(ranks, micro_batches, group)]


def fill_with_one_digit(program, late):
    """As submitted in a review; it passed until an example had ten micro-batches."""
    filled, waiting = [], []
    for w in program:
        filled.append(w)
        if w[0] == "I":
            waiting.append("W" + w[1])
        if len(waiting) > late:
            filled.append(waiting.pop(0))
    return filled + waiting


def fill_in_place(program, late):
    program[:] = given.fill_bubble(program, late)
    return program


def fill_before(program, late):
    filled, waiting = [], []
    for word in program:
        if word[0] == "I":
            waiting.append("W" + word[1:])
            if len(waiting) > late:
                filled.append(waiting.pop(0))
        filled.append(word)
    return filled + waiting


def fill_without_rest(program, late):
    filled = given.fill_bubble(program, late)
    return filled[: len(filled) - min(late, len(filled) // 3)]


def fill_as_text(program, late):
    return " ".join(given.fill_bubble(program, late))


def fill_with_two_mistakes(program, late):
    return given.fill(program, late + 1, newest_first=True)


def idle_sum(programs, cost):
    return sum(given.bubble(programs, cost))


def idle_of_busiest(programs, cost):
    return max(given.bubble(programs, cost))


def idle_with_equal_costs(programs, cost):
    return given.bubble(programs, dict.fromkeys(cost, 1.0))


def idle_by_own_end_as_share(programs, cost):
    ends = given.own_ends(programs, cost)
    return [idle / end for idle, end in zip(given.idle_to_own_end(programs, cost), ends, strict=True)]


def idle_without_last_rank(programs, cost):
    return given.bubble(programs, cost)[:-1]


def idle_by_rank(programs, cost):
    return dict(enumerate(given.bubble(programs, cost)))


def jitter(seed, low=0.5, per_rank=False, kinds="FB"):
    generator = torch.Generator().manual_seed(seed)

    def factor():
        return low + torch.rand((), generator=generator).item()

    schedule = one_f_one_b(8, 20)
    clock, ended, of_rank = [0.0] * 8, {}, [factor() for _ in range(8)]
    for rank, action in schedule.in_order():
        drawn = of_rank[rank] if per_rank else factor()
        time = {"F": 1, "B": 2}[action.kind] * (drawn if action.kind in kinds else 1)
        clock[rank] = max([clock[rank], *(ended[each] for each in schedule.needs(action))]) + time
        ended.update(dict.fromkeys(action.passes, clock[rank]))
    return 100 * (max(clock) / 81 - 1)


def only_checks(plan):
    plan(8, 20, 2.5)[0].check()


def with_sum_of_pair(plan):
    schedule, timeline = plan(8, 20, 3)
    schedule.check()
    assert max(timeline.bubble) == (8 / 2 - 1) * (3 + 2 - 3)
    assert max(timeline.peak_activations) == 9


def only_bubble(plan):
    _, timeline = plan(8, 20, 2.5)
    assert max(timeline.bubble) == (8 / 2 - 1) * (2.5 + 2 - 3)


def only_two_ranks(plan):
    schedule, timeline = plan(2, 4, 2.5)
    schedule.check()
    assert max(timeline.peak_activations) == 3


def allows_too_few_activations(plan):
    assert max(plan(8, 20, 2.5)[1].peak_activations) == 8


def wants_no_bubble(plan):
    assert max(plan(8, 20, 2.5)[1].bubble) == 0


WRONG = {
    "7.1": [
        ("from 1", groups_from_one, r"the result\[0\]\[0\]: got 'F1', expected 'F0'"),
        ("backward first", groups_backward_first, r"\[2\]: got 'B0', expected 'F2'\n +got +\['F0', 'F1', 'B0'"),
        (
            "no minimum",
            groups_without_minimum,
            r"example 3 of 7, ranks = 5, micro_batches = 6, group = 3:\n.*should have 12 parts",
        ),
        ("units, not micro-batches", groups_as_units, r"the result\[0\] should have 8 parts, not 4: got"),
        ("strided groups", groups_interleaved, r"the result\[0\]\[1\]: got 'F2', expected 'F1'"),
        ("text", groups_as_text, r"the result\[0\] should be a list of 8; got 'F0 F1"),
        ("two mistakes", groups_with_two_mistakes, r"the result\[0\] should have 8 parts, not 7: got"),
    ],
    "7.2": [
        ("one digit", fill_with_one_digit, r"comes out when only the first digit of a micro-batch's number is read"),
        ("in place", fill_in_place, r"your code changed the argument `program`; return a new value instead"),
        ("W before its I", fill_before, r"the result\[\d+\]: got 'W0', expected 'I\d'"),
        ("no rest", fill_without_rest, r"the result should have 6 parts, not 5: got"),
        ("text", fill_as_text, r"the result should be a list of 6; got 'F0 I0"),
        ("two mistakes", fill_with_two_mistakes, r"the result\[\d+\]: got '[FIW]\d', expected 'W0'"),
    ],
    "7.3": [
        ("the sum", idle_sum, r"the result should be a list of 2; got \d"),
        ("the largest", idle_of_busiest, r"the result should be a list of 2; got \d"),
        ("equal costs", idle_with_equal_costs, r"example 3 of 7.*'W': 0\.5.*\n.*the result\[0\]: got"),
        (
            "two mistakes",
            idle_by_own_end_as_share,
            r"the result\[0\]: got 0\.\d+, expected \d+\n +got .*\n +expected \[",
        ),
        ("a rank missing", idle_without_last_rank, r"should have 2 parts, not 1: got \[1\], expected \["),
        ("a dict", idle_by_rank, r"the result should be a list of 2; got \{0: "),
    ],
    "7.4": [
        ("only check()", only_checks, r"✗ it misses a bug; hint: is FB = 3 a good choice[\s\S]*the report promise"),
        ("FB = F + B", with_sum_of_pair, r"✗ it misses a bug; hint: is FB = 3 a good choice for a test\?\n +✓"),
        ("only the bubble", only_bubble, r"hint: is the gradient complete\?\n.*hint: can the schedule run"),
        ("two ranks", only_two_ranks, r"✗ it misses a bug; hint: is FB = 3 a good choice for a test\?"),
        ("PP activations", allows_too_few_activations, r"it rejects the correct implementation"),
        ("no bubble", wants_no_bubble, r"it rejects the correct implementation"),
    ],
    "7.5": [
        ("no jitter", lambda seed: 0.0, r"median 0, .*\n.*expected: a median between 13 and 19"),
        ("factors from 0 to 1", lambda seed: jitter(seed, low=0.0), r"median -33"),
        ("a share, not per cent", lambda seed: jitter(seed) / 100, r"median 0\.1"),
        ("one factor per rank", lambda seed: jitter(seed, per_rank=True), r"median 2\d\.\d"),
        ("only forwards jitter", lambda seed: jitter(seed, kinds="F"), r"median [56]\."),
        ("the time of the step", lambda seed: 81 * (1 + jitter(seed) / 100), r"median 9\d"),
        ("a list", lambda seed: [jitter(seed)], r"the function should return a float, got"),
    ],
}
