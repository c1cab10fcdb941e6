"""A notation for pipeline schedules: one program of words per rank, from which the list of its actions is built.

"F0" is a forward through the first of the rank's stages, "B1" a full backward through the second, "I" and "W" are the
input and weight halves of B, "F0B1" is an overlapped pair. A program has no micro-batch numbers: every stage processes
its micro-batches in order.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from minids.config import require
from minids.parallel.schedule import Action, Pair, Route, Schedule, Stop


def build(
    name: str, micro_batches: int, routes: tuple[Route, ...], max_activations: int, program: Callable[[int], list[str]]
) -> Schedule:
    """Build the schedule in which each rank executes `program(rank)`, in the notation of this module's docstring."""
    actions = []
    for rank in range(1 + max(stop.rank for route in routes for stop in route)):
        stops = sorted((stop for route in routes for stop in route if stop.rank == rank), key=lambda stop: stop.stage)
        actions.append(list(_actions(" ".join(program(rank)).split(), stops)))
    return Schedule(name, micro_batches, routes, max_activations, actions)


def _actions(words: list[str], stops: list[Stop]) -> Iterator[Action | Pair]:
    """Number the micro-batches of each stage; a W belongs to the oldest I without a W, of its stage if it names one."""
    count: Counter[tuple[Stop, bool]] = Counter()
    waiting: list[Action] = []  # every I without a W, the oldest first

    def action(kind: str, chunk: str) -> Action:
        if kind == "W":
            oldest = next(each for each in waiting if not chunk or each.stage == stops[int(chunk)].stage)
            waiting.remove(oldest)
            return oldest._replace(kind="W")
        stop, forward = stops[int(chunk)], kind == "F"
        count[stop, forward] += 1
        new = Action(kind, count[stop, forward] - 1, stop.stage, stop.direction)
        if kind == "I":
            waiting.append(new)
        return new

    for word in words:
        parts = [action(*part) for part in re.findall(r"([FBIW])(\d*)", word)]
        yield Pair(*parts) if len(parts) == 2 else parts[0]


def in_turn(forwards: list[str], backwards: list[str], ahead: int) -> list[str]:
    """Return `ahead` forwards, then forwards and backwards in alternation, then the remaining backwards."""
    ahead = min(ahead, len(forwards))
    steady = [word for turn in zip(forwards[ahead:], backwards, strict=False) for word in turn]
    return forwards[:ahead] + steady + backwards[len(forwards) - ahead :]


# Routes: the stages of each rank, in the order in which a micro-batch visits them ------------------------------------


def looped(ranks: int, stages_per_rank: int = 1) -> tuple[Route, ...]:
    """Return one route that visits all ranks in order, once per stage of a rank."""
    return (tuple(Stop(stage % ranks, stage, 0) for stage in range(ranks * stages_per_rank)),)


def v_shaped(ranks: int) -> tuple[Route, ...]:
    """Return one route down the ranks and up again: rank r holds stages r and 2 * ranks - 1 - r."""
    return (tuple(Stop(min(s, 2 * ranks - 1 - s), s, int(s >= ranks)) for s in range(2 * ranks)),)


def two_way(ranks: int) -> tuple[Route, ...]:
    """Return opposite routes through two copies of the model: rank r holds stages r and ranks - 1 - r."""
    return (*looped(ranks), tuple(Stop(ranks - 1 - stage, stage, 1) for stage in range(ranks)))


def check_size(ranks: int, micro_batches: int) -> None:
    """Raise `ValueError` unless both are at least 1."""
    require(ranks >= 1, "ranks", ranks, "must be at least 1")
    require(micro_batches >= 1, "micro_batches", micro_batches, "must be at least 1")
