"""Overlap computation with all-to-all: several micro-batches take turns, for chapter 08 (V3 section 3.4).

On a GPU only forward passes take turns, because autograd runs backward passes in a thread of its own.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from threading import Semaphore
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minids.course import plots

What = Literal["compute", "wait"]


class Stretch(NamedTuple):
    """One interval of a micro-batch, in seconds from a common start: it computed, or waited for its all-to-all."""

    work: int
    what: What
    start: float
    end: float


_exchange: ContextVar[Callable[[dist.Work], Any]] = ContextVar("turns", default=lambda message: message.wait())


def let_others_work(message: dist.Work) -> None:
    """The `wait` argument of `shard_experts`: let another micro-batch compute until the exchange has ended."""
    _exchange.get()(message)


class _Delayed:
    """An exchange that ends some time after its start, however early its bytes are there."""

    def __init__(self, message: Any, seconds: float):
        self.message, self.arrival = message, time.perf_counter() + seconds

    def wait(self) -> None:
        self.message.wait()
        time.sleep(max(0.0, self.arrival - time.perf_counter()))


def over_slow_link(seconds: float) -> Callable[[dist.Work], None]:
    """Return a `wait` argument as `let_others_work`, where no exchange ends before `seconds` have passed."""
    return lambda message: let_others_work(_Delayed(message, seconds))  # type: ignore[arg-type]


class _Turns:
    """A round-robin lock: one micro-batch computes while the others wait for their all-to-all."""

    def __init__(self, works: Sequence[Callable[[], Any]]):
        self.works, self.going = works, list(range(len(works)))
        self.locks = [Semaphore(0) for _ in works]
        self.stretches: list[Stretch] = []
        self.start = time.perf_counter()

    def run(self, me: int) -> Any:
        self.locks[me].acquire()
        since = time.perf_counter()

        def exchange(message) -> None:
            nonlocal since
            self.note(me, "compute", since)
            self.locks[self.after(me)].release()
            self.locks[me].acquire()
            since = time.perf_counter()
            message.wait()
            since = self.note(me, "wait", since)

        _exchange.set(exchange)
        try:
            return self.works[me]()
        finally:
            self.note(me, "compute", since)
            following = self.after(me)
            self.going.remove(me)
            self.locks[following].release()

    def after(self, me: int) -> int:
        return self.going[(self.going.index(me) + 1) % len(self.going)]

    def note(self, me: int, what: What, since: float) -> float:
        now = time.perf_counter()
        self.stretches.append(Stretch(me, what, since - self.start, now - self.start))
        return now


def take_turns(works: Sequence[Callable[[], Any]]) -> tuple[list[Any], list[Stretch]]:
    """Run `works` one at a time, each until it waits for an exchange; return their results and their intervals.

    V3 lets two micro-batches of equal size take turns (V3 section 3.4). The order of the works must be the same on all
    ranks, because it is the order of their exchanges. Each runs in a thread: set modes such as `torch.no_grad` inside.
    """
    turns = _Turns(works)
    with ThreadPoolExecutor(len(works)) as threads:
        results = [threads.submit(turns.run, i) for i in range(len(works))]
        turns.locks[0].release()
        return [result.result() for result in results], turns.stretches


def length(stretches: Sequence[Stretch]) -> float:
    """Return the seconds from the common start to the end of the last interval."""
    return max(stretch.end for stretch in stretches)


def draw_turns(runs: Mapping[str, Sequence[tuple[int, Stretch]]], title: str) -> Figure:
    """Draw each run as a row: its intervals with the number of their micro-batch, computing tall and waiting flat."""
    figure, axes = plots.canvas("time (ms)", "", title, size=(7.4, 3.0))
    for y, stretches in enumerate(runs.values()):
        for number, each in stretches:
            busy = each.what == "compute"
            look: dict[str, Any] = dict(color="#bbbbbb")
            if busy:
                look = dict(color=plots.COLORS[number], hatch=plots.HATCHES[number])
            place = 1000 * (each.end - each.start), 0.7 if busy else 0.25, 1000 * each.start
            axes.barh(y, *place, edgecolor="white", linewidth=0.3, **look)
    axes.set(xlim=(0, None), yticks=range(len(runs)), yticklabels=runs)
    axes.invert_yaxis()
    key = [Patch(fc=plots.COLORS[n], hatch=plots.HATCHES[n], ec="white", label=f"micro-batch {n}") for n in range(2)]
    key.append(Patch(fc="#bbbbbb", label="waiting"))
    figure.legend(handles=key, loc="outside lower center", ncols=3, frameon=False)
    return figure
