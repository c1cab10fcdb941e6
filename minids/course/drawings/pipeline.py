"""What a pipeline's bubble is, and DualPipeV as one half of DualPipe, folded."""

from matplotlib.patches import Rectangle

from minids.course.diagrams import INK, Box, Diagram, Role
from minids.course.pipeline_chart import LOOKS
from minids.parallel.dualpipe import dualpipe, dualpipev
from minids.parallel.one_f_one_b import gpipe
from minids.parallel.schedule import Action, Route

ROW = 1.15  # height of a rank's row


def bubble(ranks: int = 4, micro_batches: int = 4) -> Diagram:
    """Draw GPipe as it is simulated (forward 1, backward 2), with the bubble of each rank labelled."""
    timeline = gpipe(ranks, micro_batches).simulate()
    end = timeline.makespan
    idle = max(timeline.bubble)
    title = f"The bubble: each rank is idle for {idle:g} of {end:g} time units, (PP − 1)(F + B)"
    d = Diagram(17.2, 1.5 + ROW * ranks + 0.7, title)
    left, unit = 2.2, 14.6 / end
    top = 1.5 + ROW * ranks
    for rank, spans in enumerate(timeline.spans):
        y = top - ROW * (rank + 0.5)
        d.note(0.3, y, f"rank {rank}\nstage {rank}")
        d.axes.add_patch(
            Rectangle((left, y - 0.4), end * unit, 0.8, fill=False, ec="#b9c1c9", ls=(0, (2, 2)), zorder=1)
        )
        for span in spans:
            if isinstance(span.action, Action):
                _work(
                    d, f"{rank} {span.action}", left + span.start * unit, y, (span.end - span.start) * unit, span.action
                )
        for start, stop in _gaps([(span.start, span.end) for span in spans], end):
            if stop - start >= 3:
                d.note(left + (start + stop) / 2 * unit, y, "idle", align="center", strong=True)
    fill, drain = ranks - 1, end - 2 * (ranks - 1)
    d.note(left, top + 0.35, f"fill: {fill} F until the last rank starts")
    d.note(left + drain * unit, top + 0.35, f"drain: {ranks - 1} B", align="left")
    d.path([(left, 1.05), (left + end * unit, 1.05)])
    d.note(
        left, 0.55, f"time (forward F = 1, backward B = 2); numbers: {micro_batches} micro-batches, one after the other"
    )
    return d


def _work(d: Diagram, name: str, start: float, y: float, length: float, action: Action) -> None:
    """Draw one pass as a bar in the colours of the charts, with its kind and micro-batch."""
    _, light, _, hatch = LOOKS[action.kind]
    corner = start, y - 0.4
    d.axes.add_patch(Rectangle(corner, length, 0.8, fc=light, ec="white", hatch=hatch, lw=0.6, zorder=3))
    behind = dict(facecolor=light, edgecolor="none", pad=0.8)
    words = f"{action.kind}{action.micro_batch}"
    d.axes.text(start + length / 2, y, words, size=8.5, color=INK, ha="center", va="center", bbox=behind, zorder=4)
    d.boxes[name] = Box(start + length / 2, y, length, 0.8, words, "", "tensor")


def _gaps(busy: list[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """Return the idle intervals between busy ones, from 0 to `end`."""
    edges = [0.0, *(time for span in busy for time in span), end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def fold(ranks: int = 4) -> Diagram:
    """Draw which stages the ranks of DualPipe hold, and DualPipeV, which is half of them (Sea AI Lab)."""
    d = Diagram(17.2, 7.6, "DualPipeV is DualPipe cut in the middle and folded: each stage is held once")
    d.frame(0.2, 0.3, 9.9, 7.3, f"DualPipe: {ranks} ranks, micro-batches enter at both ends")
    whole = dualpipe(ranks, 2 * ranks).routes
    step = 8.4 / ranks
    for direction, (route, y) in enumerate(zip(whole, (4.9, 2.9), strict=True)):
        _stages(d, f"both {direction}", route, {rank: 0.9 + step * (rank + 0.5) for rank in range(ranks)}, y)
    for rank in range(ranks):
        d.note(0.9 + step * (rank + 0.5), 6.2, f"rank {rank}", align="center")
    middle = 0.9 + step * ranks / 2
    d.axes.plot([middle, middle], [1.7, 5.9], color=INK, linewidth=1.4, linestyle=(0, (5, 3)), zorder=5)
    d.note(middle, 1.3, "cut here: the halves are mirror images", align="center", strong=True)
    d.note(5.1, 0.7, "each rank 2 stages, each stage on 2 ranks", align="center")
    half = ranks // 2
    d.frame(10.3, 0.3, 17.0, 7.3, f"DualPipeV: {half} ranks, one route (Sea AI Lab)")
    (route,) = dualpipev(half, ranks).routes
    places = {rank: 11.0 + 5.0 / half * (rank + 0.5) for rank in range(half)}
    down, up = route[:half], route[half:]
    _stages(d, "down", down, places, 4.9)
    _stages(d, "up", up, places, 2.9)
    last, right = places[half - 1], places[half - 1] + 0.8
    d.path([(right, 4.9), (right + 0.55, 4.9), (right + 0.55, 2.9), (right, 2.9)])
    for rank, x in places.items():
        d.note(x, 6.2, f"rank {rank}", align="center")
    d.note(last + 1.5, 3.9, "turn", align="left")
    d.note(13.6, 0.7, "each rank 2 stages, each stage on 1 rank", align="center")
    return d


def _stages(d: Diagram, name: str, route: Route, places: dict[int, float], y: float) -> None:
    """Draw the stages of a route in a row, with arrows in the order in which a micro-batch visits them."""
    for number, stop in enumerate(route):
        role: Role = "cache" if stop.direction else "tensor"
        d.box(f"{name} {number}", places[stop.rank], y, f"stage {stop.stage}", "", role, 1.6, 0.9)
        if number:
            d.arrow(f"{name} {number - 1}", f"{name} {number}")
