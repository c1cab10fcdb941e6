"""Pipeline schedules with full backward passes: GPipe, 1F1B and interleaved 1F1B."""

from minids.config import require
from minids.parallel.programs import build, check_size, in_turn, looped
from minids.parallel.schedule import Schedule


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """GPipe: all forwards, then all backwards; the activations of all micro-batches are alive at once."""
    check_size(ranks, micro_batches)
    program = micro_batches * ["F0"] + micro_batches * ["B0"]
    return build("gpipe", micro_batches, looped(ranks), micro_batches, lambda rank: program)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B: forwards until the pipeline is full, then forwards and backwards in alternation."""
    check_size(ranks, micro_batches)

    def program(rank: int) -> list[str]:
        return in_turn(micro_batches * ["F0"], micro_batches * ["B0"], ahead=ranks - 1 - rank)

    return build("one_f_one_b", micro_batches, looped(ranks), ranks, program)


def interleaved_one_f_one_b(ranks: int, micro_batches: int, stages_per_rank: int = 2) -> Schedule:
    """Interleaved 1F1B: a rank holds several stages and switches to the next stage after a group of micro-batches.

    All groups are equal: as many micro-batches as ranks, or the smallest larger number that leaves no remainder.
    """
    check_size(ranks, micro_batches)
    require(stages_per_rank >= 1, "stages_per_rank", stages_per_rank, "must be at least 1")
    groups = max(1, micro_batches // ranks)
    require(micro_batches % groups == 0, "micro_batches", micro_batches, f"must divide into {groups} equal groups")
    group = micro_batches // groups
    chunks = [i // group % stages_per_rank for i in range(micro_batches * stages_per_rank)]
    forwards = [f"F{chunk}" for chunk in chunks]
    backwards = [f"B{stages_per_rank - 1 - chunk}" for chunk in chunks]
    first_round = (stages_per_rank - 1) * group

    def program(rank: int) -> list[str]:
        return in_turn(forwards, backwards, ahead=first_round + 2 * (ranks - 1 - rank))

    routes = looped(ranks, stages_per_rank)
    return build("interleaved_one_f_one_b", micro_batches, routes, first_round + 2 * ranks - 1, program)
