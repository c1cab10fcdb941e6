"""Horizontal bars made of parts, with their totals and a limit, for what has to fit into a memory."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from minids.course import plots

FACES = ("#0072B2", "#56B4E9", "#CC79A7", "#E69F00", "#009E73")


def stacked_bars(
    rows: Mapping[str, Mapping[str, float]], xlabel: str, title: str, limit: tuple[float, str] | None = None
) -> Figure:
    """Draw a bar per row, made of the same parts in every row, with its total; `limit` is a labelled vertical line."""
    figure, axes = plots.canvas(xlabel, "", title, (7.5, 1.6 + 0.42 * len(rows)))
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    for number, name in enumerate(names):
        starts = [sum(parts[other] for other in names[:number]) for parts in rows.values()]
        look: dict[str, Any] = dict(color=FACES[number % 5], hatch=plots.HATCHES[number % 7], ec="white", lw=0.5)
        axes.barh(range(len(rows)), [parts[name] for parts in rows.values()], 0.7, starts, label=name, **look)
    behind: dict[str, Any] = dict(facecolor="white", edgecolor="none", pad=0.6)
    totals = [sum(parts.values()) for parts in rows.values()]
    for y, total in enumerate(totals):
        axes.text(total, y, f" {total:,.0f}" if total >= 10 else f" {total:.1f}", va="center", fontsize=9, bbox=behind)
    axes.set_yticks(range(len(rows)), [name.replace("\n", " ") for name in rows])
    axes.set(xlim=(0, 1.12 * max(*totals, limit[0] if limit else 0)), ylim=(len(rows) - 0.4, -0.75))
    if limit is not None:
        axes.axvline(limit[0], color="black", linestyle="--", linewidth=1.2, zorder=2.5)
        axes.text(limit[0], -0.5, f" {limit[1]}", fontsize=9, va="center")
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return figure
