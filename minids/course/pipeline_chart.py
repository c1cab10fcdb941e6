"""Chart of a simulated pipeline schedule, one row per rank."""

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minids.parallel.schedule import Timeline

LOOKS = {  # label; colour of direction 0 (light) and of direction 1 (dark); a hatch that tells the kinds apart in grey
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
    """Draw a timeline, one row per rank; the two parts of a pair are stacked, and direction 1 is dark.

    `size` is in inches. With `labels`, a bar shows kind and micro-batch where there is room.
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
            place, color = rank - 0.43 + (i + 0.5) * height, colors[part.direction]
            bar = axes.barh(
                place, length, height, span.start, color=color, hatch=hatch, ec="white", lw=0.4, antialiased=False
            )
            text = f"{part.kind}{part.micro_batch}"
            if labels and 60 * size[0] * length / timeline.makespan > 5 * len(text):  # approximate widths in points
                behind = dict(facecolor=color, edgecolor="none", pad=0.6)  # keeps the hatch off
                ink = ("black", "white")[part.direction]
                axes.bar_label(bar, [text], label_type="center", fontsize=6.5, color=ink, bbox=behind)
            used |= {part.kind, part.direction}
    looks = [LOOKS[kind] for kind in LOOKS if kind in used]
    keys = [Patch(fc=light, hatch=hatch, ec="white", label=name) for name, light, _, hatch in looks]
    keys += [Patch(fc="#404040", label="dark: direction 1")] * (1 in used)
    figure.legend(handles=keys, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure
