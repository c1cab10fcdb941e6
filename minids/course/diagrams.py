"""The drawing vocabulary of the course: boxes for tensors, operations, weights, caches and devices, and arrows between.

Notable choices:
- a box has a role, which sets its colour, its edge and its corners, so that roles differ in grey too;
- places are in units of the drawing, x to the right and y upwards; boxes have names, and arrows connect names;
- a diagram displays itself in a notebook as SVG, and keeps its boxes, so that tests can read labels and shapes.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

Role = Literal["tensor", "weight", "operation", "cache", "device", "here", "idle"]

INK, MUTED, STRONG = "#22303c", "#5c6873", "#b8500c"
LOOK = {  # role: face, edge, width of the edge, style of the edge
    "tensor": ("#e8f1fa", "#2b6ca3", 1.0, "-"),
    "weight": ("#f1f1ee", "#8a8a84", 1.0, "-"),
    "operation": ("#ffffff", INK, 1.0, "-"),
    "cache": ("#fde3c8", STRONG, 2.0, "-"),
    "device": ("#fafbfc", "#9aa5b1", 1.0, (0, (4, 3))),
    "here": ("#fff3b8", "#7a6200", 2.4, "-"),
    "idle": ("#ffffff", "#b9c1c9", 1.0, (0, (2, 2))),
}
UNIT = (0.62, 0.5)  # inches of one unit, across and up
WIDEST = 690.0  # points: what JupyterLab shows beside its file browser in a window of 1,366 pixels


@dataclass(frozen=True)
class Box:
    """A drawn box: its centre, its size, and what it says."""

    x: float
    y: float
    width: float
    height: float
    label: str
    shape: str
    role: Role


def _narrowed(size: re.Match) -> str:
    """Scale a drawing's size to at most `WIDEST`; the viewBox stays, so that all of the drawing shrinks."""
    width, height = map(float, size.groups())
    factor = min(1.0, WIDEST / width)
    return f'width="{width * factor:.2f}pt" height="{height * factor:.2f}pt"'


class Diagram:
    """A drawing of `width` x `height` units with a title that says its point."""

    def __init__(self, width: float, height: float, title: str):
        self.title = title
        self.boxes: dict[str, Box] = {}
        self.notes: list[str] = []
        self.figure = Figure(figsize=(width * UNIT[0], (height + 0.9) * UNIT[1]))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height + 0.9))
        self.axes.set_axis_off()
        self._text(0.2, height + 0.45, title, 12, INK, "left", weight="bold")

    def box(
        self,
        name: str,
        x: float,
        y: float,
        label: str,
        shape: str = "",
        role: Role = "tensor",
        width: float = 2.0,
        height: float = 0.8,
    ) -> None:
        """Draw a box with its centre at (x, y); `shape` stands in small letters under the label."""
        face, edge, thickness, style = LOOK[role]
        self._rectangle(
            x, y, width, height, face, edge, thickness, style, rounding=0.4 * height if role == "operation" else 0.12
        )
        self._text(x, y + (0.16 if shape else 0), label, 9.5, INK)
        if shape:
            self._text(x, y - 0.2, shape, 7.4, MUTED, family="DejaVu Sans Mono")
        self.boxes[name] = Box(x, y, width, height, label, shape, role)

    def frame(self, left: float, bottom: float, right: float, top: float, label: str, role: Role = "device") -> None:
        """Draw a large box behind others, such as a device or what is cached, with a label in its upper left corner."""
        face, edge, thickness, style = LOOK[role]
        place = (left + right) / 2, (bottom + top) / 2
        self._rectangle(*place, right - left, top - bottom, face, edge, thickness, style, rounding=0.18, order=1)
        self._text(left + 0.15, top - 0.22, label, 8.2, MUTED, "left")
        self.notes.append(label)

    def arrow(
        self,
        start: str,
        end: str,
        label: str = "",
        *,
        bend: float | None = None,
        at: float | None = None,
        dashed: bool = False,
    ) -> None:
        """Draw an arrow between two boxes, upwards, downwards or across, whichever way they lie.

        `bend` is the height at which a vertical arrow turns, `at` the x where it arrives; a dashed arrow is a signal
        that is not differentiated, or a step in time.
        """
        a, b = self.boxes[start], self.boxes[end]
        if abs(a.y - b.y) < max(a.height, b.height) / 2 and bend is None:  # side by side
            sign = 1 if b.x > a.x else -1
            path = [(a.x + sign * a.width / 2, a.y), (b.x - sign * b.width / 2, a.y)]
            place, alignment = ((path[0][0] + path[1][0]) / 2, a.y + 0.25), "center"
        else:
            sign = 1 if b.y > a.y else -1
            first, last = (a.x, a.y + sign * a.height / 2), (at if at is not None else b.x, b.y - sign * b.height / 2)
            if abs(first[0] - last[0]) < 1e-6:
                path = [first, last]
            else:
                turn = bend if bend is not None else (first[1] + last[1]) / 2
                path = [first, (first[0], turn), (last[0], turn), last]
            place, alignment = (last[0] + 0.12, (path[-2][1] + last[1]) / 2), "left"
        line: dict[str, Any] = dict(color=INK, linewidth=1.0, linestyle="--" if dashed else "-", zorder=2)
        self.axes.plot(*zip(*path[:-1], strict=True), **line)
        arrowhead = dict(
            arrowstyle="-|>", shrinkA=0, shrinkB=0, mutation_scale=9, color=INK, linestyle=line["linestyle"]
        )
        self.axes.annotate("", path[-1], path[-2], arrowprops=arrowhead, zorder=2)
        if label:
            self._text(*place, label, 8, MUTED, alignment, style="italic")
            self.notes.append(label)

    def path(self, points: Sequence[tuple[float, float]], *, dashed: bool = False, strong: bool = False) -> None:
        """Draw an arrow through points, for what is not between two boxes; a strong one is thick and coloured."""
        color, width, style = STRONG if strong else INK, 2.0 if strong else 1.0, "--" if dashed else "-"
        if len(points) > 2:
            self.axes.plot(*zip(*points[:-1], strict=True), color=color, linewidth=width, linestyle=style, zorder=2)
        arrowhead: dict[str, Any] = dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, mutation_scale=9, linewidth=width)
        self.axes.annotate("", points[-1], points[-2], arrowprops=arrowhead | dict(color=color, ls=style), zorder=2)

    def note(
        self, x: float, y: float, text: str, *, strong: bool = False, align: str = "left", size: float = 8.2
    ) -> None:
        """Write a remark; a strong one has the colour of what is cached."""
        self._text(x, y, text, size, STRONG if strong else MUTED, align)
        self.notes.append(text)

    def svg(self) -> str:
        """Return the drawing as SVG, the same characters each time."""
        with matplotlib.rc_context({"svg.hashsalt": "minids", "svg.fonttype": "none"}):
            file = io.StringIO()
            self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        drawn = file.getvalue().replace("'DejaVu Sans Mono'", "'DejaVu Sans Mono', Menlo, Consolas, monospace")
        drawn = drawn.replace("font-family: 'DejaVu Sans';", "font-family: 'DejaVu Sans', Verdana, sans-serif;")
        drawn = re.sub(r"\s*<metadata>.*?</metadata>", "", drawn[drawn.index("<svg ") :], flags=re.DOTALL)
        drawn = re.sub(r'width="([\d.]+)pt" height="([\d.]+)pt"', _narrowed, drawn, count=1)
        return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), drawn)

    def png(self, dots: int = 160) -> bytes:
        """Return the drawing as PNG, for a README and for looking at it."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=dots)
        return file.getvalue()

    def _repr_svg_(self) -> str:
        return self.svg()

    def __repr__(self) -> str:
        return f"Drawing: {self.title}"

    def _rectangle(self, x, y, width, height, face, edge, thickness, style, rounding, order=3) -> None:
        shape = f"round,pad=0,rounding_size={rounding}"
        corner = x - width / 2, y - height / 2
        look = dict(boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=thickness, linestyle=style, zorder=order)
        self.axes.add_patch(FancyBboxPatch(corner, width, height, mutation_aspect=UNIT[0] / UNIT[1], **look))

    def _text(self, x: float, y: float, text: str, size: float, color: str, align: str = "center", **look: Any) -> None:
        self.axes.text(x, y, text, size=size, color=color, ha=align, va="center", linespacing=1.35, zorder=4, **look)


def shape(*sizes: int | str) -> str:
    """Return the words for a tensor's shape: shape(128, 64) is "128 × 64", and 7168 alone is "7,168"."""
    return " × ".join(f"{size:,}" if isinstance(size, int) else size for size in sizes)


def row(diagram: Diagram, names: Sequence[str], left: float, right: float, y: float, **box: object) -> None:
    """Draw boxes side by side, evenly between two edges, each labelled with its name."""
    step = (right - left) / len(names)
    for number, name in enumerate(names):
        diagram.box(name, left + (number + 0.5) * step, y, name, width=step * 0.86, **box)  # type: ignore[arg-type]
