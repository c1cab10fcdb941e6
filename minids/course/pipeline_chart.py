"""Charts of pipelines: a simulated schedule with one row per rank, its steps, and the two streams of chunks."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minids.course.overlap import Streams
from minids.parallel.schedule import Span, Timeline

LOOKS = {  # label; colour of direction 0 (light) and of direction 1 (dark); a hatch that tells the kinds apart in grey
    "F": ("F forward", "#a9d8f5", "#00558c", ""),
    "B": ("B backward", "#f6b393", "#9c3f00", 3 * "\\"),
    "I": ("I input half", "#fbd995", "#8a5a00", "///"),
    "W": ("W weight half", "#9fdcc6", "#005f45", "---"),
}


def draw(
    timeline: Timeline,
    title: str = "",
    unit: str = "forward = 1",
    size: tuple[float, float] = (7, 2.4),
    labels: bool = True,
) -> Figure:
    """Draw a timeline, one row per rank; the two parts of a pair are stacked, and direction 1 is dark.

    `size` is in inches. With `labels`, a bar shows kind and micro-batch where there is room.
    """
    figure, axes = _canvas(timeline, title, unit, size)
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            _bars(axes, span, rank, 0.86, 60 * size[0] / timeline.makespan if labels else 0)
    _legend(figure, timeline)
    return figure


def draw_steps(
    timeline: Timeline,
    lengths: Sequence[Sequence[int]],
    title: str = "",
    unit: str = "forward = 1",
    size: tuple[float, float] = (10, 6),
) -> Figure:
    """Draw a timeline with a bracket over the actions of each step of a rank; `lengths[rank]` are their counts."""
    figure, axes = _canvas(timeline, title, unit, size)
    for rank, (spans, counts) in enumerate(zip(timeline.spans, lengths, strict=True)):
        for span in spans:
            _bars(axes, span, rank + 0.12, 0.6, 0)
        first = 0
        for step, count in enumerate(counts, start=1):
            if count:
                start, end = spans[first].start, spans[first + count - 1].end
                y, inset = rank - 0.26, 0.12
                bracket: dict[str, Any] = dict(color="black", linewidth=0.9)
                axes.plot([start + inset] * 2 + [end - inset] * 2, [y + 0.07, y, y, y + 0.07], **bracket)
                axes.text((start + end) / 2, y - 0.02, f"{step}", ha="center", va="bottom", fontsize=8)
            first += count
    _legend(figure, timeline)
    return figure


def draw_streams(layouts: Mapping[str, Streams], title: str = "") -> Figure:
    """Draw chunks on the compute and the communication stream of a GPU, one panel per entry, each block labelled."""
    longest = max(layout.makespan for layout in layouts.values())
    figure = Figure(figsize=(9, 1.2 * len(layouts) + 1.0), layout="constrained")
    panels = figure.subplots(len(layouts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, layout) in zip(panels, layouts.items(), strict=True):
        for y, stream in enumerate((layout.compute, layout.communication)):
            for block in stream:
                part, kind = block.action.split()
                _, color, _, hatch = LOOKS[kind]
                length = block.end - block.start
                look: dict[str, Any] = dict(fc=color, hatch=hatch, ec="white", lw=0.6, antialiased=False)
                bar = axes.barh(y, length, 0.8, block.start, **look)
                behind = dict(facecolor=color, edgecolor="none", pad=0.8)
                axes.bar_label(bar, [f"{part[0].upper()} {kind}"], label_type="center", fontsize=6.5, bbox=behind)
        axes.set_title(f"{name}: takes {layout.makespan:.4g}, computes for {layout.makespan - layout.exposed:.4g}")
        axes.set(xlim=(0, longest), ylim=(1.5, -0.5))
        axes.set_yticks([0, 1], ["compute", "all-to-all"])
        axes.spines[["top", "right"]].set_visible(False)
    words = "A attention, M MLP (experts), D dispatch, C combine; F forward chunk, I and W halves of the backward chunk"
    figure.supxlabel(f"time (computation of a forward chunk = 1)\n{words}, B its all-to-all", fontsize=8)
    figure.suptitle(title)
    return figure


def draw_shares(rows: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """Draw a stacked bar per row: the same parts in every row, as fractions of the step, labelled in per cent."""
    looks = iter((("#a9d8f5", ""), ("#f6b393", 3 * "\\"), ("#9fdcc6", "---"), ("#fbd995", "///")))
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.1), layout="constrained")
    axes, keys = figure.subplots(), []
    for number, name in enumerate(names):
        color, hatch = ("white", "") if name == "bubble" else next(looks)
        edge = "black" if name == "bubble" else "white"
        look: dict[str, Any] = dict(fc=color, hatch=hatch, ec=edge, lw=0.6)
        keys.append(Patch(label=name, **look))
        for y, parts in enumerate(rows.values()):
            start, value = 100 * sum(parts[other] for other in names[:number]), 100 * parts[name]
            bar = axes.barh(y, value, 0.7, start, antialiased=False, **look)
            if value >= 2:
                behind = dict(facecolor=color, edgecolor="none", pad=0.8)
                axes.bar_label(bar, [f"{value:.1f}"], label_type="center", fontsize=7.5, bbox=behind)
    axes.set(title=title, xlabel="share of the step (%)", xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=keys, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return figure


def _canvas(timeline: Timeline, title: str, unit: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=f"time ({unit})", ylabel="rank", yticks=range(len(timeline.spans)))
    axes.set(xlim=(0, timeline.makespan), ylim=(len(timeline.spans) - 0.5, -0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(axes: Axes, span: Span, y: float, height: float, points: float) -> None:
    """Draw the parts of an action, stacked; `points` is the approximate width of a unit of time, 0 for no labels."""
    length, height = span.end - span.start, height / len(span.action.parts)
    top = y - height * len(span.action.parts) / 2
    for i, part in enumerate(span.action.parts):
        _, *colors, hatch = LOOKS[part.kind]
        color, text = colors[part.direction], f"{part.kind}{part.micro_batch}"
        look: dict[str, Any] = dict(color=color, hatch=hatch, ec="white", lw=0.4, antialiased=False)
        bar = axes.barh(top + (i + 0.5) * height, length, height, span.start, **look)
        if points * length > 5 * len(text):
            behind = dict(facecolor=color, edgecolor="none", pad=0.6)  # keeps the hatch off
            ink = ("black", "white")[part.direction]
            axes.bar_label(bar, [text], label_type="center", fontsize=6.5, color=ink, bbox=behind)


def _legend(figure: Figure, timeline: Timeline) -> None:
    used = {what for spans in timeline.spans for s in spans for p in s.action.parts for what in (p.kind, p.direction)}
    looks = [LOOKS[kind] for kind in LOOKS if kind in used]
    keys = [Patch(fc=light, hatch=hatch, ec="white", label=name) for name, light, _, hatch in looks]
    keys += [Patch(fc="#404040", label="dark: direction 1")] * (1 in used)
    figure.legend(handles=keys, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
