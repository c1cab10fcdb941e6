"""DualPipe and DualPipeV equal their eight steps, simulated with mailboxes."""

from collections import Counter, deque

import pytest

from minids.parallel.dualpipe import dualpipe, dualpipev

BOTH_WAYS = [(2, 4), (2, 6), (4, 8), (4, 18), (6, 12), (8, 16), (8, 20), (12, 26)]


class Steps:
    """FACTS.md section 6.1 word by word, for one rank: what it does next, as a list of (kind, phase)."""

    def __init__(self, repeats, k, is_middle):
        self.repeats, self.k, self.is_middle = repeats, k, is_middle

    def __iter__(self):
        nF0, nF0F1, nB1W1F1, nF0B1F1B0, nB1F1B0, nB1B0, nWB0, nW = self.repeats
        for _ in range(nF0):
            yield [("F", 0)]
        for _ in range(nF0F1):
            yield [("F", 0)]
            yield [("F", 1)]
        for _ in range(nB1W1F1):
            yield [("I", 1)]
            yield [("W", None)]
            yield [("F", 1)]
        first = True
        for _ in range(nF0B1F1B0):
            if first and self.is_middle:
                yield [("F", 0)]
                yield [("B", 1)]
            else:
                yield [("F", 0), ("B", 1)]
            first = False
            yield [("F", 1), ("B", 0)]
        for _ in range(nB1F1B0):
            yield [("B", 1)]
            yield [("F", 1), ("B", 0)]
        zero_bubble = False
        for i in range(nB1B0):
            if i == (self.k + 1) // 2 and self.k % 2 == 1:
                zero_bubble = True
            yield [("I" if zero_bubble else "B", 1)]
            if i == (self.k + 1) // 2 and self.k % 2 == 0:
                zero_bubble = True
            yield [("I" if zero_bubble else "B", 0)]
        for _ in range(nWB0):
            yield [("W", None)]
            yield [("I", 0)]
        for _ in range(nW):
            yield [("W", None)]


def steps_of(ranks, chunks, folded):
    """Each rank's numbers of repeats, from the table's two columns."""
    for r in range(ranks):
        if folded:
            n, N = ranks, chunks
            yield Steps([2 * (n - r - 1), r + 1, n - r - 1, N - 2 * n + r + 1, n - r - 1, r + 1, n - r - 1, r + 1],
                       r, r == n - 1)  # fmt: skip
        else:
            n, h, k, C = ranks, ranks // 2, min(r, ranks - 1 - r), chunks // 2
            yield Steps([2 * (h - k - 1), k + 1, h - k - 1, C - n + k + 1, h - k - 1, k + 1, h - k - 1, k + 1],
                       k, r in (h - 1, h))  # fmt: skip


def play(ranks, chunks, folded, F=1, B=2, W=1, FB=3):
    """Ranks take micro-batches from mailboxes and pass them on; nobody counts. Per rank: [(parts, start, end), ...]."""
    mail = {}  # (forward?, rank, direction) -> micro-batches with their time of arrival

    def box(*address):
        return mail.setdefault(address, deque())

    def pass_on(forward, rank, direction, micro_batch, time):
        ahead = 1 if direction == 0 else -1
        neighbour = rank + (ahead if forward else -ahead)
        if 0 <= neighbour < ranks:
            box(forward, neighbour, direction).append((micro_batch, time))
        elif folded and direction == (0 if forward else 1) and rank == ranks - 1:
            box(forward, rank, 1 - direction).append((micro_batch, time))  # the tip of the V
        elif forward:
            box(False, rank, direction).append((micro_batch, time))  # the loss

    for micro_batch in range(chunks if folded else chunks // 2):
        box(True, 0, 0).append((micro_batch, 0))
        if not folded:
            box(True, ranks - 1, 1).append((micro_batch, 0))

    programs = [deque(steps) for steps in steps_of(ranks, chunks, folded)]
    clock, later, did = [0] * ranks, [deque() for _ in range(ranks)], [[] for _ in range(ranks)]
    while any(programs):
        before = sum(map(len, programs))
        for rank, program in enumerate(programs):
            while program:
                own_end = 0 if folded or rank < ranks // 2 else 1
                work = [(kind, phase if phase is None else phase ^ own_end) for kind, phase in program[0]]
                boxes = [box(kind == "F", rank, direction) for kind, direction in work if kind != "W"]
                if not all(boxes):
                    break
                program.popleft()
                start, parts = clock[rank], []
                for kind, direction in work:
                    if kind == "W":
                        direction, micro_batch = later[rank].popleft()
                    else:
                        micro_batch, arrival = box(kind == "F", rank, direction).popleft()
                        start = max(start, arrival)
                    if kind == "I":
                        later[rank].append((direction, micro_batch))
                    parts.append((kind, micro_batch, direction))
                cost = FB if len(work) == 2 else {"F": F, "B": B, "I": B - W, "W": W}[work[0][0]]
                clock[rank] = start + cost
                for kind, micro_batch, direction in parts:
                    if kind != "W":
                        pass_on(kind == "F", rank, direction, micro_batch, clock[rank])
                did[rank].append((parts, start, clock[rank]))
        assert sum(map(len, programs)) < before, "the steps got stuck"
    assert not any(later) and not any(mail.values())
    return did


COSTS = [(1, 2, 1, 3), (1, 2, 0.5, 3), (1, 1.5, 1, 2.5), (2, 3, 1.25, 4)]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("ranks, micro_batches", BOTH_WAYS)
@pytest.mark.parametrize("make", [dualpipe, dualpipev])
def test_dualpipe_order_and_times_equal_the_eight_steps_played_out(make, ranks, micro_batches, costs):
    folded = make is dualpipev
    spans = make(ranks, micro_batches).simulate(*costs).spans
    for rank, played in enumerate(play(ranks, micro_batches, folded, *costs)):
        stages = (rank, 2 * ranks - 1 - rank if folded else ranks - 1 - rank)
        want = [([(kind, m, stages[d], d) for kind, m, d in parts], start, end) for parts, start, end in played]
        assert [([tuple(part) for part in a.parts], start, end) for a, start, end in spans[rank]] == want


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_dualpipe_order_equals_the_eight_steps_for_every_size(ranks):
    for make, folded in ((dualpipe, False), (dualpipev, True)):
        for micro_batches in range(2 * ranks, 3 * ranks + 3, 2):
            for rank, played in enumerate(play(ranks, micro_batches, folded)):
                ours = [[part[:2] + part[3:] for part in a.parts] for a in make(ranks, micro_batches).actions[rank]]
                assert ours == [parts for parts, _, _ in played]


def test_step_counts_of_eight_ranks_and_twenty_micro_batches():
    half = [[6, 1, 3, 3, 3, 1, 3, 1], [4, 2, 2, 4, 2, 2, 2, 2], [2, 3, 1, 5, 1, 3, 1, 3], [0, 4, 0, 6, 0, 4, 0, 4]]
    assert [steps.repeats for steps in steps_of(8, 20, folded=False)] == half + half[::-1]
    deferred, pairs = [7, 6, 5, 4], [9, 10, 11, 11]
    schedule = dualpipe(8, 20)
    for rank, actions in enumerate(schedule.actions):
        kinds = Counter(action.kind for action in actions)
        assert kinds["F"] + kinds["FB"] == 20 and kinds["B"] + kinds["I"] + kinds["FB"] == 20
        distance = min(rank, 7 - rank)
        assert kinds["W"] == kinds["I"] == deferred[distance] and kinds["FB"] == pairs[distance]
