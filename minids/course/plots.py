"""Figures as functions of plain data. Each returns a matplotlib Figure and changes no global state.

The colours are Okabe and Ito's colour-blind-safe palette; line styles, markers and hatches distinguish series in grey.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo")

Numbers = Sequence[float]


DOTS = 90  # per inch, as a page shows a figure; its picture has twice as many, for sharp text on dense screens


def png(figure: Figure) -> bytes:
    """Render a figure as PNG with 64 colours, a third of the bytes of full colour, since notebooks store figures."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=2 * DOTS)
    small = io.BytesIO()
    Image.open(picture).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def shown_size(figure: Figure) -> dict[str, int]:
    """Return width and height of a figure on a page, in CSS pixels."""
    width, height = figure.get_size_inches() * DOTS
    return {"width": round(width), "height": round(height)}


def png_and_size(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """Return what IPython displays: the picture, and the size at which a page shows it."""
    return png(figure), shown_size(figure)


def canvas(xlabel: str, ylabel: str, title: str = "", size: tuple[float, float] = (7, 3.6)) -> tuple[Figure, Axes]:
    """Return an empty figure with labelled axes; `size` in inches."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def lines(
    series: Mapping[str, tuple[Numbers, Numbers]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    *,
    log: str = "",
    marked: bool = False,
    level: tuple[float, str] | None = None,
) -> Figure:
    """Plot one line per label of `series`, each (x, y). `log` names the logarithmic axes: "x", "y" or "xy".

    `marked` adds a marker at every point; `level` is a horizontal line with its label, for a bound or a control.
    """
    figure, axes = canvas(xlabel, ylabel, title)
    for i, (label, (x, y)) in enumerate(series.items()):
        marker = MARKERS[i % 7] if marked else ""
        axes.plot(x, y, color=COLORS[i % 7], linestyle=LINES[i % 7], marker=marker, markersize=5, label=label)
    if level is not None:
        axes.axhline(level[0], color="grey", linewidth=1, label=level[1])
    _finish(axes, log, legend=len(series) > 1 or level is not None)
    return figure


def bars(
    groups: Mapping[str, Mapping[str, float]], xlabel: str, ylabel: str, title: str = "", *, log: str = ""
) -> Figure:
    """Plot grouped bars: one group per outer label along the x axis, one bar per inner label."""
    figure, axes = canvas(xlabel, ylabel, title)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [g + (i - (len(names) - 1) / 2) * width for g, group in enumerate(groups.values()) if name in group]
        heights = [group[name] for group in groups.values() if name in group]
        axes.bar(places, heights, width, label=name, color=COLORS[i % 7], hatch=HATCHES[i % 7], ec="white", lw=0.5)
    axes.set_xticks(range(len(groups)), groups.keys())
    _finish(axes, log, legend=len(names) > 1)
    return figure


def points(
    places: Mapping[str, tuple[float, float, float]], xlabel: str, ylabel: str, title: str = "", *, log: str = ""
) -> Figure:
    """Plot one labelled point per entry, (x, y, half-width of y's error bar)."""
    figure, axes = canvas(xlabel, ylabel, title)
    for i, (label, (x, y, spread)) in enumerate(places.items()):
        look: dict[str, Any] = dict(color=COLORS[i % 7], marker=MARKERS[i % 7], markersize=8, capsize=4, linestyle="")
        axes.errorbar([x], [y], yerr=[spread], label=label, **look)
    _finish(axes, log, legend=True)
    return figure


def heatmap(table: Sequence[Numbers], xlabel: str, ylabel: str, value: str, title: str = "") -> Figure:
    """Plot a table as colours, first row on top; `value` labels the colour bar, with the unit."""
    figure, axes = canvas(xlabel, ylabel, title)
    image = axes.imshow(table, aspect="auto", cmap="cividis", interpolation="nearest")
    figure.colorbar(image, label=value)
    return figure


def loss_curve(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Plot a run's losses in nats per token and its validation loss in bits per byte, over the training tokens."""
    figure, axes = canvas("training tokens (millions)", "loss (nats per token)", size=(7, 4))
    tokens = [m["tokens"] / 1e6 for m in metrics]
    axes.plot(tokens, [m["loss"] for m in metrics], color=COLORS[0], linewidth=1, label="training loss, next token")
    if any(m["mtp_loss"] for m in metrics):
        mtp_loss = [m["mtp_loss"] for m in metrics]
        axes.plot(tokens, mtp_loss, LINES[3], color=COLORS[4], zorder=1, label="training loss, the token after it")
    validated = [m for m in metrics if "validation_bits_per_byte" in m]
    if validated:
        right = axes.twinx()
        places = [m["tokens"] / 1e6 for m in validated]
        bits = [m["validation_bits_per_byte"] for m in validated]
        right.plot(places, bits, "o--", color=COLORS[3], label="validation (right axis)")
        right.set_ylabel("validation (bits per byte)")
        right.set_ylim(0, 1.1 * max(bits))
        right.legend(loc="lower right", frameon=False)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left", frameon=False)
    return figure


def _finish(axes: Axes, log: str, legend: bool) -> None:
    """Set logarithmic axes, a faint grid and the legend, the same in every figure."""
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if legend:
        axes.legend(frameon=False)
