"""Wrong answers to the exercises of chapter 07."""

from minids.course.exercises import chapter07 as given


def programs_from_one(ranks, micro_batches):
    programs = given.one_f_one_b(ranks, micro_batches)
    return [[f"{word[0]}{int(word[1:]) + 1}" for word in program] for program in programs]


def programs_backward_first(ranks, micro_batches):
    programs = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        words = [f"F{m}" for m in range(ahead)]
        for m in range(micro_batches):
            words.append(f"B{m}")
            if m + ahead < micro_batches:
                words.append(f"F{m + ahead}")
        programs.append(words)
    return programs


def programs_without_minimum(ranks, micro_batches):
    programs = []
    for rank in range(ranks):
        ahead = ranks - 1 - rank
        words = [f"F{m}" for m in range(ahead)]
        for m in range(micro_batches):
            words += [f"F{m + ahead}", f"B{m}"] if m + ahead < micro_batches else [f"B{m}"]
        programs.append(words)
    return programs


def programs_without_the_end(ranks, micro_batches):
    return [program[: 2 * micro_batches - 1] for program in given.one_f_one_b(ranks, micro_batches)]


def programs_as_text(ranks, micro_batches):
    return [" ".join(program) for program in given.one_f_one_b(ranks, micro_batches)]


def programs_as_pairs(ranks, micro_batches):
    return [[(word[0], int(word[1:])) for word in program] for program in given.one_f_one_b(ranks, micro_batches)]


def programs_with_two_mistakes(ranks, micro_batches):
    return [given.run_ahead(ranks, micro_batches)[: 2 * micro_batches - 1] for _ in range(ranks)]


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
        ("from 1", programs_from_one, r"the result\[0\]\[0\]: got 'F1', expected 'F0'"),
        ("backward first", programs_backward_first, r"\[1\]: got 'B0', expected 'F1'\n +got +\['F0', 'B0'"),
        (
            "no minimum",
            programs_without_minimum,
            r"example 3 of 6, ranks = 5, micro_batches = 3:\n.*should have 6 parts",
        ),
        ("no last backward", programs_without_the_end, r"should have 4 parts, not 3: got"),
        ("text", programs_as_text, r"the result\[0\] should be a list of 4; got 'F0 F1"),
        ("pairs", programs_as_pairs, r"the result\[0\]\[0\]: got \('F', 0\), expected 'F0'"),
        ("two mistakes", programs_with_two_mistakes, r"the result\[0\] should have 4 parts, not 3: got"),
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
}
