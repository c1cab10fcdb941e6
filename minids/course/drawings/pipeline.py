"""The bubble of GPipe, DualPipe with one of its pairs magnified, and DualPipeV as DualPipe cut and folded."""

from typing import Any

from matplotlib.patches import Rectangle

from minids.course.diagrams import INK, STRONG, Box, Diagram, Role
from minids.course.overlap import overlap
from minids.course.pipeline_chart import LOOKS
from minids.parallel.dualpipe import dualpipe, dualpipev
from minids.parallel.one_f_one_b import gpipe
from minids.parallel.schedule import Pair, Route, Span, Timeline

LEFT, WIDTH = 2.2, 14.6  # where time begins, and the length of the axis
ROW = 1.0  # height of a rank's row
IDLE: dict[str, Any] = dict(fill=False, ec="#b9c1c9", ls=(0, (2, 2)), zorder=1)


def bubble(ranks: int = 4, micro_batches: int = 8) -> Diagram:
    """Draw GPipe as it is simulated (forward 1, backward 2), with the bubble of each rank labelled."""
    timeline = gpipe(ranks, micro_batches).simulate()
    end = timeline.makespan
    idle = max(timeline.bubble)
    title = f"GPipe: each rank is idle for {idle:g} of {end:g} time units, the bubble (PP − 1)(F + B)"
    d = Diagram(17.2, 1.9 + ROW * ranks + 0.7, title)
    unit, top = WIDTH / end, 1.9 + ROW * ranks
    _timeline(d, timeline, top)
    for rank, spans in enumerate(timeline.spans):
        for start, stop in _gaps([(span.start, span.end) for span in spans], end):
            if (stop - start) * unit > 1:
                place = LEFT + (start + stop) / 2 * unit, top - ROW * (rank + 0.5)
                d.note(*place, "idle", align="center", strong=True)
    drain = end - 2 * (ranks - 1)
    d.note(LEFT, top + 0.35, f"fill: {ranks - 1} F until the last rank starts")
    d.note(LEFT + drain * unit, top + 0.35, f"drain: {ranks - 1} B")
    _axis(d, 1.45, f"time; a forward F takes 1, a backward B takes 2; numbers: {micro_batches} micro-batches")
    d.note(LEFT, 0.35, f"PP = {ranks} ranks, one stage (a part of the layers) on each")
    return d


def dual(ranks: int = 4, micro_batches: int = 8) -> Diagram:
    """Draw DualPipe as it is simulated, and one layer of one of its pairs on the two streams of a GPU."""
    timeline = dualpipe(ranks, micro_batches).simulate()
    title = "DualPipe: micro-batches enter at both ends; a pair computes one chunk while the other's tokens travel"
    d = Diagram(17.2, ROW * ranks + 7.0, title)
    unit, top = WIDTH / timeline.makespan, ROW * ranks + 6.2
    _timeline(d, timeline, top)
    d.note(LEFT, top + 0.35, f"light: {micro_batches // 2} micro-batches that enter at rank 0")
    d.note(LEFT + 7.3, top + 0.35, f"dark: {micro_batches // 2} that enter at rank {ranks - 1}; framed: a pair")
    _axis(d, top - ROW * ranks - 0.25, "time; forward 1, backward 2, pair 3", LEFT + 9.6)
    start, end, pair = next((s.start, s.end, s.action) for s in timeline.spans[-1] if isinstance(s.action, Pair))
    _magnified(d, LEFT + start * unit, LEFT + end * unit, top - ROW * (ranks - 0.1), pair)
    return d


def _magnified(d: Diagram, start: float, end: float, y: float, pair: Pair) -> None:
    """Draw one layer of an overlapped pair, below, with lines to its place in the timeline."""
    streams, top = overlap("FB", layers=1), 4.0
    unit = WIDTH / streams.makespan
    for x, corner in ((start, LEFT), (end, LEFT + WIDTH)):
        d.axes.plot([x, corner], [y, top], color=STRONG, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for name, stream, height in (("compute", streams.compute, 3.3), ("all-to-all", streams.communication, 2.1)):
        d.note(0.3, height, name)
        for block in stream:
            part, kind = block.action.split()
            direction = pair.forward.direction if kind == "F" else pair.backward.direction
            place = LEFT + block.start * unit, height, (block.end - block.start) * unit, 0.9
            _bar(d, f"pair {block.action}", *place, block.action, kind, direction, 8.2)
    gap = next(a.end for a, b in zip(streams.compute, streams.compute[1:], strict=False) if b.start > a.end)
    d.axes.add_patch(Rectangle((LEFT + gap * unit, 2.85), streams.exposed * unit, 0.9, **IDLE))
    d.note(LEFT, 1.15, "one layer of the framed pair; F: forward chunk; I, W: halves of the backward chunk")
    d.note(LEFT, 0.45, "all-to-all: dispatch sends tokens to their experts' GPUs, combine brings the results back")


def _timeline(d: Diagram, timeline: Timeline, top: float) -> None:
    """Draw the rows of all ranks as bars in the colours of the charts; a pair is stacked and framed."""
    unit = WIDTH / timeline.makespan
    for rank, spans in enumerate(timeline.spans):
        y = top - ROW * (rank + 0.5)
        d.note(0.3, y, f"rank {rank}")
        d.axes.add_patch(Rectangle((LEFT, y - 0.4), WIDTH, 0.8, **IDLE))
        for span in spans:
            _pass(d, rank, span, LEFT + span.start * unit, y, (span.end - span.start) * unit)


def _pass(d: Diagram, rank: int, span: Span, start: float, y: float, length: float) -> None:
    height = 0.8 / len(span.action.parts)
    for i, part in enumerate(span.action.parts):
        place = start, y + 0.4 - (i + 0.5) * height, length, height
        size = 8.2 if len(span.action.parts) == 1 else 7
        _bar(d, f"{rank} {part}", *place, f"{part.kind}{part.micro_batch}", part.kind, part.direction, size)
    if len(span.action.parts) == 2:
        d.axes.add_patch(Rectangle((start, y - 0.4), length, 0.8, fill=False, ec=INK, lw=1.6, zorder=5))


def _bar(
    d: Diagram, name: str, left: float, y: float, width: float, height: float,
    words: str, kind: str, direction: int, size: float,
) -> None:  # fmt: skip
    """Draw one labelled bar whose colour is that of its kind, light in direction 0 and dark in direction 1."""
    _, *colors, hatch = LOOKS[kind]
    look: dict[str, Any] = dict(fc=colors[direction], ec="white", hatch=hatch, lw=0.6, zorder=3, clip_on=False)
    d.axes.add_patch(Rectangle((left, y - height / 2), width, height, **look))
    behind = dict(facecolor=colors[direction], edgecolor="none", pad=0.6) if hatch else None  # keeps the hatch off
    middle = left + width / 2
    font: dict[str, Any] = dict(size=size, color=(INK, "white")[direction], family="DejaVu Sans")
    d.axes.text(middle, y, words, ha="center", va="center", bbox=behind, zorder=4, **font)
    d.boxes[name] = Box(middle, y, width, height, words, "", "tensor")


def _axis(d: Diagram, y: float, words: str, left: float = LEFT) -> None:
    d.path([(LEFT, y), (LEFT + WIDTH, y)])
    d.note(left, y - 0.5, words)


def _gaps(busy: list[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """Return the idle intervals between busy ones, from 0 to `end`."""
    edges = [0.0, *(time for span in busy for time in span), end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def fold(ranks: int = 4) -> Diagram:
    """Draw DualPipe's stages, cut in the middle, and both halves of one route on the ranks that stay (Sea AI Lab)."""
    half = ranks // 2
    title = "DualPipeV: cut DualPipe in the middle, and fold the route's second half onto the first's ranks"
    d = Diagram(17.2, 8.2, title)
    d.frame(0.2, 0.2, 9.9, 7.9, f"DualPipe: {ranks} ranks, micro-batches enter at both ends")
    there, back = dualpipe(ranks, 2 * ranks).routes
    step = 8.6 / ranks
    places = {rank: 0.8 + step * (rank + 0.5) for rank in range(ranks)}
    _stages(d, "both 0", there, places, 5.2)
    _stages(d, "both 1", back, places, 3.5)
    d.note(0.45, 6.0, "direction 0")
    d.note(9.65, 2.75, "direction 1", align="right")
    for rank, x in places.items():
        d.note(x, 6.9, f"rank {rank}", align="center")
    middle = 0.8 + step * half
    d.axes.plot([middle, middle], [2.5, 7.2], color=STRONG, linewidth=1.8, linestyle=(0, (5, 3)), zorder=5)
    d.note(middle, 2.1, "cut: the right half does the same as the left half, mirrored", align="center", strong=True)
    held = f"ranks 0 to {half - 1} already hold stages {half} to {ranks - 1}, for direction 1"
    d.note(5.05, 1.3, held, align="center")
    d.note(5.05, 0.7, "each rank holds 2 stages, each stage is on 2 ranks", align="center")
    d.frame(10.3, 0.2, 17.0, 7.9, f"DualPipeV: {half} ranks, one route in the shape of a V")
    (route,) = dualpipev(half, ranks).routes
    kept = {rank: 10.9 + 4.9 / half * (rank + 0.5) for rank in range(half)}
    _stages(d, "down", route[:half], kept, 5.2, "first half")
    _stages(d, "up", route[half:], kept, 3.5, "folded back")
    right = kept[half - 1] + 0.85
    d.path([(right, 5.2), (right + 0.5, 5.2), (right + 0.5, 3.5), (right, 3.5)], strong=True)
    for rank, x in kept.items():
        d.note(x, 6.9, f"rank {rank}", align="center")
    d.note(right + 0.6, 4.35, "fold", strong=True)
    d.note(13.65, 1.3, "the other ranks are free", align="center")
    d.note(13.65, 0.7, "each rank holds 2 stages, each stage is on 1 rank", align="center")
    return d


def _stages(d: Diagram, name: str, route: Route, places: dict[int, float], y: float, small: str = "") -> None:
    """Draw the stages of a route in a row, with arrows in the order in which a micro-batch visits them."""
    for number, stop in enumerate(route):
        role: Role = "cache" if stop.direction else "tensor"
        d.box(f"{name} {number}", places[stop.rank], y, f"stage {stop.stage}", small, role, 1.7, 1.0)
        if number:
            d.arrow(f"{name} {number - 1}", f"{name} {number}")
