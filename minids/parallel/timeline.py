"""What a pipeline schedule is, the proof that it can run, and when everything happens.

Notable choices:
- a schedule is a list of actions per rank and holds no times: the same lists are checked, simulated under any costs,
  drawn, and run on processes;
- dependencies are between passes (forward, input gradient, weight gradient of one micro-batch at one stage), so a full
  backward and an overlapped pair need no rules of their own;
- checking and simulating both follow `Schedule.in_order`, which takes only what can run.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch


class ScheduleError(ValueError):
    """A schedule that cannot run, or that does not compute the gradient; names the first violation."""


class Action(NamedTuple):
    """One micro-batch through one stage: F forward, B full backward, or its halves, I input and W weight gradients.

    `direction` is 0 from the first rank to the last and 1 the other way. Micro-batches count from 0, in each direction
    where they enter from both ends.
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
        """What is computed, in terms of F, I and W."""
        return (self._replace(kind="I"), self._replace(kind="W")) if self.kind == "B" else (self,)

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch} at stage {self.stage} in direction {self.direction}"


class Pair(NamedTuple):
    """A forward and a full backward, overlapped: F&B in the V3 report."""

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
    """A stage on a micro-batch's way, and the rank that holds it."""

    rank: int
    stage: int
    direction: int


Route = tuple[Stop, ...]


class Span(NamedTuple):
    """An action, or a named component inside a pair, and when it runs."""

    action: Action | Pair | str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated schedule: the spans of each rank, in order. Times are in the unit of the costs."""

    spans: list[list[Span]]

    @property
    def makespan(self) -> float:
        """The end of the last action, counted from the start of the first."""
        return max(span.end for rank in self.spans for span in rank)

    @property
    def bubble(self) -> list[float]:
        """The time that each rank idles within the makespan."""
        return [self.makespan - busy_time(rank) for rank in self.spans]

    @property
    def peak_activations(self) -> list[int]:
        """Micro-batches whose activations each rank keeps at once, summed over its stages."""
        return [peak_activations([span.action for span in rank]) for rank in self.spans]


def busy_time(spans: Sequence[Span]) -> float:
    """The sum of their lengths."""
    return sum(span.end - span.start for span in spans)


def peak_activations(actions: Sequence[Action | Pair], size: Callable[[int], int] = lambda stage: 1) -> int:
    """The most activations alive at once: each, of its stage's `size`, from its F to the end of its weight gradient."""
    live = peak = 0
    for action in actions:
        made, freed = (sum(size(each.stage) for each in action.passes if each.kind == kind) for kind in "FW")
        live += made
        peak = max(peak, live)
        live -= freed
    return peak


@dataclass(frozen=True)
class Schedule:
    """What each rank does: `actions[rank]`, in order.

    `routes` lists the stops of a forward pass; several routes share `micro_batches` out evenly. `max_activations` is
    the memory that the method promises, counted as in `Timeline.peak_activations`.
    """

    name: str
    micro_batches: int
    routes: tuple[Route, ...]
    max_activations: int
    actions: list[list[Action | Pair]]

    @property
    def stages(self) -> int:
        """Stages that the model is cut into."""
        return len(self.routes[0])

    @property
    def parameters(self) -> list[float]:
        """The share of the model that each rank holds, all stages being equal."""
        held = Counter(stop.rank for route in self.routes for stop in route)
        return [held[rank] / self.stages for rank in range(len(self.actions))]

    def simulate(self, F: float = 1, B: float = 2, W: float = 1, FB: float = 3, transfer: float = 0) -> Timeline:
        """When everything runs if each rank starts its next action as soon as its inputs are there.

        F, B, W and FB are the times of one action: forward, full backward, its weight half (the input half takes B - W)
        and a pair. Results are there when their action ends, on other ranks `transfer` later; sending keeps no rank
        busy. Raises `ValueError` for impossible costs, `ScheduleError` on a deadlock.
        """
        check_times(F=F, B=B, W=W, FB=FB, transfer=transfer)
        for name, time in dict(F=F, B=B, FB=FB).items():
            if time == 0:
                raise ValueError(f"{name}={time}: must be above 0")
        if W > B:
            raise ValueError(f"W={W}: must not exceed B={B}, of which it is a part")
        cost = {"F": F, "B": B, "I": B - W, "W": W, "FB": FB}
        spans, ended = [[] for _ in self.actions], {}
        for rank, action in self.in_order():
            arrivals = (ended[each] + transfer * (self.rank_of(each) != rank) for each in self.needs(action))
            start = max(spans[rank][-1].end if spans[rank] else 0, *arrivals, 0)
            end = start + cost[action.kind]
            spans[rank].append(Span(action, start, end))
            ended.update(dict.fromkeys(action.passes, end))
        return Timeline(spans)

    def check(self) -> None:
        """Prove that the schedule computes the whole gradient, can run, and keeps its memory bound.

        Raises `ScheduleError` naming the first violation: a pass that is missing, done twice or on the wrong rank; one
        done before what it needs; ranks that wait for each other; more live activations than promised.
        """
        self._check_completeness()
        for _ in self.in_order():
            pass
        for rank, actions in enumerate(self.actions):
            if (peak := peak_activations(actions)) > self.max_activations:
                raise ScheduleError(f"rank {rank} keeps {peak} activations; {self.max_activations} were promised")

    def _check_completeness(self) -> None:
        micro_batches = range(self.micro_batches // len(self.routes))
        done = Counter(each for actions in self.actions for action in actions for each in action.passes)
        for rank, action in ((rank, action) for rank, actions in enumerate(self.actions) for action in actions):
            if "".join(part.kind for part in action.parts) not in ("F", "B", "I", "W", "FB"):
                raise ScheduleError(f"rank {rank} does {action}, which is no known kind of action")
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
        """(rank, action) in an order in which everything can run; raises `ScheduleError` when no rank can go on."""
        needs = [[self.needs(action) for action in actions] for actions in self.actions]
        done, position = set(), [0] * len(self.actions)
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
        """Follow the waiting from rank to rank until it comes back, or ends at a rank that has nothing left to do."""
        rank, waiting = min(blocked), {}
        while rank in blocked and rank not in waiting:
            missing = self.needs(blocked[rank]) - done
            waiting[rank] = min(missing, key=lambda each: (self.rank_of(each) != rank, each))
            rank = self.rank_of(waiting[rank])
        if rank not in blocked:
            waiter, missing = waiting.popitem()
            return f"rank {waiter} waits for ever at {blocked[waiter]}: rank {rank} never does {missing}"
        if self.rank_of(waiting[rank]) == rank:
            return f"rank {rank} does {blocked[rank]} before {waiting[rank]}, which it needs"
        circle = list(waiting)[list(waiting).index(rank) :]
        return "deadlock: " + ", ".join(f"rank {r} at {blocked[r]} waits for {waiting[r]}" for r in circle)

    def needs(self, action: Action | Pair) -> set[Action]:
        """The passes that must have ended before `action` may start."""
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
        """The rank that holds the stage of `action`."""
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
    """Raise `ValueError` for a time that cannot be."""
    for name, time in times.items():
        if not 0 <= time < math.inf:
            raise ValueError(f"{name}={time}: must be a finite number of at least 0")


def gantt(timeline: Timeline, width: int = 160) -> str:
    """One line of text per rank: kind and micro-batch of every action, as wide as it is long; dots are bubbles.

    Direction 1 is in lower case. Where `width` leaves no room for the number, the kind stands alone.
    """

    def label(span: Span) -> str:
        texts = ((f"{part.kind}{part.micro_batch}", part.direction) for part in span.action.parts)
        return "".join(text.lower() if direction else text for text, direction in texts)

    wanted = max(len(label(s)) / (s.end - s.start) for spans in timeline.spans for s in spans if s.end > s.start)
    scale = min(wanted, width / timeline.makespan)
    lines = []
    for rank, spans in enumerate(timeline.spans):
        line = ""
        for span in spans:
            start, end = round(span.start * scale), round(span.end * scale)
            text = label(span) if len(label(span)) <= end - start else re.sub(r"\d", "", label(span))
            line = line.ljust(start, ".") + text[: end - start].ljust(end - start, "-")
        lines.append(f"rank {rank:<3}" + line.ljust(round(timeline.makespan * scale), "."))
    return "\n".join(lines)


LOOKS = {  # in words; light for direction 0, dark for direction 1; a hatch that tells the kinds apart in grey
    "F": ("F forward", "#a9d8f5", "#00558c", ""),
    "B": ("B backward", "#f6b393", "#9c3f00", 3 * "\\"),
    "I": ("I input half", "#fbd995", "#8a5a00", "///"),
    "W": ("W weight half", "#9fdcc6", "#005f45", "..."),
}


def draw(
    timeline: Timeline,
    title: str = "",
    unit: str = "forward = 1",
    size: tuple[float, float] = (7, 2.4),
    labels: bool = True,
) -> Figure:
    """A picture of `size` inches, a row per rank; the parts of a pair lie one above the other, direction 1 is dark.

    With `labels`, bars bear kind and micro-batch where there is room.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes, used = figure.subplots(), set()
    axes.set(title=title, xlabel=f"time ({unit})", ylabel="rank", yticks=range(len(timeline.spans)))
    axes.set(xlim=(0, timeline.makespan), ylim=(len(timeline.spans) - 0.5, -0.5))
    axes.spines[["top", "right"]].set_visible(False)
    for rank, span in ((rank, span) for rank, spans in enumerate(timeline.spans) for span in spans):
        length, height = span.end - span.start, 0.86 / len(span.action.parts)
        for i, part in enumerate(span.action.parts):
            _, *colors, hatch = LOOKS[part.kind]
            look = dict(color=colors[part.direction], hatch=hatch, ec="white", lw=0.4, antialiased=False)
            bar = axes.barh(rank - 0.43 + (i + 0.5) * height, length, height, span.start, **look)
            text = f"{part.kind}{part.micro_batch}"
            if labels and 60 * size[0] * length / timeline.makespan > 5 * len(text):  # about the widths in points
                behind = dict(facecolor=colors[part.direction], edgecolor="none", pad=0.6)  # keeps the hatch off
                ink = ("black", "white")[part.direction]
                axes.bar_label(bar, [text], label_type="center", fontsize=6.5, color=ink, bbox=behind)
            used |= {part.kind, part.direction}
    looks = [LOOKS[kind] for kind in LOOKS if kind in used]
    keys = [Patch(fc=color, hatch=hatch, ec="white", label=name) for name, color, _, hatch in looks]
    keys += [Patch(fc="#404040", label="dark: direction 1")] * (1 in used)
    figure.legend(handles=keys, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure
