"""Pipeline schedules: the actions of each rank, the check that they can run, and the simulation of their times.

Notable choices:
- a schedule is a list of actions per rank without times: the same lists are checked, simulated under any costs, drawn,
  and run on processes;
- dependencies are between passes (forward, input gradient, weight gradient of one micro-batch at one stage), so a full
  backward and an overlapped pair need no rules of their own;
- checking and simulating both use `Schedule.in_order`, which yields only actions whose inputs are complete.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

What = TypeVar("What")


class ScheduleError(ValueError):
    """A schedule that cannot run or does not compute the gradient; the message names the first violation."""


class Action(NamedTuple):
    """One pass of one micro-batch at one stage. Kinds: F forward, B full backward, I input and W weight half of B.

    `direction` is 0 from the first rank to the last, 1 in reverse. Micro-batches count from 0, in each direction
    separately where they enter at both ends.
    """

    kind: str
    micro_batch: int
    stage: int
    direction: int = 0

    @property
    def parts(self) -> tuple["Action", ...]:
        return (self,)

    @property
    def passes(self) -> tuple["Action", ...]:
        """The action in terms of F, I and W."""
        return (self._replace(kind="I"), self._replace(kind="W")) if self.kind == "B" else (self,)

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch} at stage {self.stage} in direction {self.direction}"


class Pair(NamedTuple):
    """An overlapped pair of a forward and a full backward: F&B in the V3 report."""

    forward: Action
    backward: Action

    @property
    def kind(self) -> str:
        return "FB"

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self.forward, self.backward)

    @property
    def passes(self) -> tuple[Action, ...]:
        return self.forward.passes + self.backward.passes

    def __str__(self) -> str:
        return f"the pair of {self.forward} and {self.backward}"


class Stop(NamedTuple):
    """A stage on the route of a micro-batch, and the rank that holds it."""

    rank: int
    stage: int
    direction: int


Route = tuple[Stop, ...]


class Span(NamedTuple, Generic[What]):
    """An action, or a named component of a pair (`Span[str]`), with its start and end time."""

    action: What
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated schedule: the spans of each rank, in order; times are in the unit of the costs."""

    spans: list[list[Span[Action | Pair]]]

    @property
    def makespan(self) -> float:
        """Time from the start of the first action to the end of the last."""
        return max(span.end for rank in self.spans for span in rank)

    @property
    def bubble(self) -> list[float]:
        """Idle time of each rank within the makespan."""
        return [self.makespan - busy_time(rank) for rank in self.spans]

    @property
    def peak_activations(self) -> list[int]:
        """Peak number of micro-batches whose activations each rank keeps, summed over its stages."""
        return [peak_activations([span.action for span in rank]) for rank in self.spans]


def busy_time(spans: Sequence[Span]) -> float:
    """Return the total length of the spans."""
    return sum(span.end - span.start for span in spans)


def peak_activations(actions: Sequence[Action | Pair], size: Callable[[int], int] = lambda stage: 1) -> int:
    """Return the peak of live activations; each has its stage's `size` and lives from its F to the end of its W."""
    live = peak = 0
    for action in actions:
        made, freed = (sum(size(each.stage) for each in action.passes if each.kind == kind) for kind in "FW")
        live += made
        peak = max(peak, live)
        live -= freed
    return peak


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule: `actions[rank]` is the issue order of a rank.

    `routes` lists the stops of a forward pass; `micro_batches` is divided equally among several routes.
    `max_activations` is the method's bound on a rank's memory, counted as in `Timeline.peak_activations`.
    """

    name: str
    micro_batches: int
    routes: tuple[Route, ...]
    max_activations: int
    actions: list[list[Action | Pair]]

    @property
    def stages(self) -> int:
        """Number of stages into which the model is divided."""
        return len(self.routes[0])

    @property
    def parameters(self) -> list[float]:
        """Fraction of the model that each rank holds, where all stages are equal."""
        held = Counter(stop.rank for route in self.routes for stop in route)
        return [held[rank] / self.stages for rank in range(len(self.actions))]

    def simulate(self, F: float = 1, B: float = 2, W: float = 1, FB: float = 3, transfer: float = 0) -> Timeline:
        """Simulate the schedule: each rank starts its next action as soon as the inputs are available.

        F, B, W and FB are the times of one action: forward, full backward, its weight half (the input half takes B - W)
        and a pair. A result is available when its action ends, on other ranks `transfer` later; sending takes no time
        of a rank. Raises `ValueError` for impossible costs, `ScheduleError` on a deadlock.
        """
        check_times(F=F, B=B, W=W, FB=FB, transfer=transfer)
        for name, time in dict(F=F, B=B, FB=FB).items():
            if time == 0:
                raise ValueError(f"{name}={time}: must be above 0")
        if W > B:
            raise ValueError(f"W={W}: must not exceed B={B}, of which it is a part")
        cost = {"F": F, "B": B, "I": B - W, "W": W, "FB": FB}
        spans: list[list[Span[Action | Pair]]] = [[] for _ in self.actions]
        ended: dict[Action, float] = {}
        for rank, action in self.in_order():
            arrivals = (ended[each] + transfer * (self.rank_of(each) != rank) for each in self.needs(action))
            start = max(spans[rank][-1].end if spans[rank] else 0, *arrivals, 0)
            end = start + cost[action.kind]
            spans[rank].append(Span(action, start, end))
            ended.update(dict.fromkeys(action.passes, end))
        return Timeline(spans)

    def check(self) -> None:
        """Prove that the schedule computes the whole gradient, can run, and keeps its memory bound.

        Raises `ScheduleError` naming the first violation: a pass that is missing, duplicated or on the wrong rank; a
        pass before its inputs; a deadlock; more live activations than `max_activations`.
        """
        self._check_completeness()
        for _ in self.in_order():
            pass
        for rank, actions in enumerate(self.actions):
            if (peak := peak_activations(actions)) > self.max_activations:
                raise ScheduleError(f"rank {rank} keeps {peak} activations; max_activations={self.max_activations}")

    def _check_completeness(self) -> None:
        micro_batches = range(self.micro_batches // len(self.routes))
        done = Counter(each for actions in self.actions for action in actions for each in action.passes)
        for rank, action in ((rank, action) for rank, actions in enumerate(self.actions) for action in actions):
            if "".join(part.kind for part in action.parts) not in ("F", "B", "I", "W", "FB"):
                raise ScheduleError(f"rank {rank} does {action}, which is not a known kind of action")
            for each in action.passes:
                if self.rank_of(each) != rank:
                    raise ScheduleError(f"rank {rank} does {each}, which belongs on rank {self.rank_of(each)}")
                if each.micro_batch not in micro_batches:
                    raise ScheduleError(f"rank {rank} does {each}, but there are {len(micro_batches)} micro-batches")
                if done[each] > 1:
                    raise ScheduleError(f"rank {rank} does {each} {done[each]} times")
        for stop in (stop for route in self.routes for stop in route):
            for each in (Action(kind, m, stop.stage, stop.direction) for m in micro_batches for kind in "FIW"):
                if not done[each]:
                    raise ScheduleError(f"rank {stop.rank} never does {each}")

    def in_order(self) -> Iterator[tuple[int, Action | Pair]]:
        """Yield (rank, action) in an order in which all can run; raises `ScheduleError` when no rank can continue."""
        needs = [[self.needs(action) for action in actions] for actions in self.actions]
        done: set[Action] = set()
        position = [0] * len(self.actions)
        moving = True
        while moving:
            moving = False
            for rank, actions in enumerate(self.actions):
                while position[rank] < len(actions) and needs[rank][position[rank]] <= done:
                    yield rank, actions[position[rank]]
                    done.update(actions[position[rank]].passes)
                    position[rank] += 1
                    moving = True
        blocked = {rank: self.actions[rank][i] for rank, i in enumerate(position) if i < len(self.actions[rank])}
        if blocked:
            raise ScheduleError(self._explain(blocked, done))

    def _explain(self, blocked: dict[int, Action | Pair], done: set[Action]) -> str:
        """Follow the dependencies from rank to rank until they form a cycle or end at a rank that has finished."""
        rank, waiting = min(blocked), {}
        while rank in blocked and rank not in waiting:
            missing = self.needs(blocked[rank]) - done
            waiting[rank] = min(missing, key=lambda each: (self.rank_of(each) != rank, each))
            rank = self.rank_of(waiting[rank])
        if rank not in blocked:
            waiter, needed = waiting.popitem()
            return f"rank {waiter} waits forever at {blocked[waiter]}: rank {rank} never does {needed}"
        if self.rank_of(waiting[rank]) == rank:
            return f"rank {rank} does {blocked[rank]} before {waiting[rank]}, which it needs"
        cycle = list(waiting)[list(waiting).index(rank) :]
        return "deadlock: " + ", ".join(f"rank {r} at {blocked[r]} waits for {waiting[r]}" for r in cycle)

    def needs(self, action: Action | Pair) -> set[Action]:
        """Return the passes that must have ended before `action` may start."""
        return {
            needed
            for part in action.parts
            for each in part.passes
            for needed in self._inputs(each)
            if needed not in part.passes
        }

    def _inputs(self, each: Action) -> Iterator[Action]:
        route, i = self._place(each)
        if each.kind == "F" and i > 0:
            yield Action("F", each.micro_batch, route[i - 1].stage, route[i - 1].direction)
        if each.kind == "I":
            yield each._replace(kind="F")
            if i + 1 < len(route):
                yield Action("I", each.micro_batch, route[i + 1].stage, route[i + 1].direction)
        if each.kind == "W":
            yield each._replace(kind="I")

    def rank_of(self, action: Action) -> int:
        """Return the rank that holds the stage of `action`."""
        route, i = self._place(action)
        return route[i].rank

    def _place(self, action: Action) -> tuple[Route, int]:
        try:
            return self._places[action.direction, action.stage]
        except KeyError:
            raise ScheduleError(f"{action}: there is no such stage") from None

    @cached_property
    def _places(self) -> dict[tuple[int, int], tuple[Route, int]]:
        return {(stop.direction, stop.stage): (route, i) for route in self.routes for i, stop in enumerate(route)}


def check_times(**times: float) -> None:
    """Raise `ValueError` for a time that is negative, infinite or not a number."""
    for name, time in times.items():
        if not 0 <= time < math.inf:
            raise ValueError(f"{name}={time}: must be a finite number of at least 0")
