"""DualPipe, V3's pipeline schedule: micro-batches enter at both ends and F overlaps B; and DualPipeV, its half."""

from minids.config import require
from minids.parallel.programs import build, check_size, two_way, v_shaped
from minids.parallel.schedule import Schedule


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe: half of the micro-batches enter at each end (V3 section 3.2.1; FACTS.md section 6.1)."""
    check_size(ranks, micro_batches)
    require(ranks % 2 == 0, "ranks", ranks, "must be even")
    require(micro_batches % 2 == 0, "micro_batches", micro_batches, "must be even, half for each direction")
    require(micro_batches >= 2 * ranks, "micro_batches", micro_batches, f"must be at least 2 * ranks = {2 * ranks}")

    def program(rank: int) -> list[str]:
        return _eight_steps(ranks // 2, min(rank, ranks - 1 - rank), micro_batches // 2)

    return build("dualpipe", micro_batches, two_way(ranks), ranks + 1, program)


def dualpipev(ranks: int, micro_batches: int) -> Schedule:
    """DualPipeV: one half of DualPipe, with the second direction folded back into a V (FACTS.md section 6.1)."""
    check_size(ranks, micro_batches)
    require(micro_batches >= 2 * ranks, "micro_batches", micro_batches, f"must be at least 2 * ranks = {2 * ranks}")

    def program(rank: int) -> list[str]:
        return _eight_steps(ranks, rank, micro_batches)

    return build("dualpipev", micro_batches, v_shaped(ranks), 2 * ranks + 1, program)


def _eight_steps(half: int, k: int, micro_batches: int) -> list[str]:
    """Return the program of rank k of the `half` ranks from an end to the middle; `micro_batches` enter at each end."""
    main = (micro_batches - 2 * half + k + 1) * ["F0B1 F1B0"]
    if k == half - 1:
        main[0] = "F0 B1 F1B0"  # the published order does not overlap the first pair of the middle ranks
    full, halved = (["B1", "B0"] * (k + 1))[: k + 1], (["I1", "I0"] * (k + 1))[k + 1 :]
    return (
        2 * (half - k - 1) * ["F0"]  # 1
        + (k + 1) * ["F0 F1"]  # 2
        + (half - k - 1) * ["I1 W F1"]  # 3
        + main  # 4
        + (half - k - 1) * ["B1 F1B0"]  # 5
        + full + halved  # 6
        + (half - k - 1) * ["W I0"]  # 7
        + (k + 1) * ["W"]  # 8
    )  # fmt: skip
