"""Rotary position embedding: a pair of channels turns with the position, and each pair at its own speed."""

import math

from matplotlib.patches import Ellipse

from minids.config import ModelConfig
from minids.course.diagrams import INK, LOOK, MUTED, STRONG, UNIT, Diagram

RADIUS = 0.72  # inches


def rope_pairs(config: ModelConfig | None = None) -> Diagram:
    """Draw three pairs at the first positions, and the tokens per turn of every pair of the rotated channels."""
    c = config or ModelConfig.preset("v3")
    width = c.qk_rope_head_dim if c.attention == "mla" else c.v_head_dim
    pairs = width // 2
    speeds = [c.rope_theta ** (-2 * pair / width) for pair in range(pairs)]
    d = Diagram(
        17.2, 6.6, "Each pair of channels turns with the position: fast pairs for neighbours, slow pairs for far"
    )
    for number, pair in enumerate((0, pairs // 8, pairs - 1)):
        _circle(d, 1.7 + 3.2 * number, 3.6, pair, speeds[pair])
    d.note(0.4, 0.75, "Query and key are turned alike: their score depends on the distance only.")
    _frequencies(d, speeds, 10.9, 1.5, 6.0, 3.8)
    return d


def _circle(d: Diagram, x: float, y: float, pair: int, speed: float) -> None:
    """Draw the vector of a pair at positions 0 to 3."""
    across, up = RADIUS / UNIT[0], RADIUS / UNIT[1]
    face, edge = LOOK["tensor"][:2]
    d.axes.add_patch(Ellipse((x, y), 2 * across, 2 * up, facecolor=face, edgecolor=edge, zorder=1))
    d.note(x, y + up + 1.0, f"pair {pair}", align="center", size=10)
    for position in range(4):
        angle = position * speed
        tip = x + across * math.cos(angle), y + up * math.sin(angle)
        arrowhead = dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, color=STRONG if position == 0 else INK)
        d.axes.annotate("", tip, (x, y), arrowprops=arrowhead, zorder=3)
        if 3 * speed > 0.5 or position == 0:
            label = str(position) if 3 * speed > 0.5 else "0–3"
            d.note(x + 1.22 * across * math.cos(angle), y + 1.2 * up * math.sin(angle), label, align="center")
    d.note(x, y - up - 0.65, f"one turn in {2 * math.pi / speed:,.0f} tokens", align="center")


def _frequencies(d: Diagram, speeds: list[float], left: float, bottom: float, width: float, height: float) -> None:
    """Draw a stem for each pair, with the tokens per turn on a logarithmic scale."""
    turns = [2 * math.pi / speed for speed in speeds]
    top = math.ceil(math.log10(max(turns)))
    step = width / len(turns)
    for power in range(top + 1):
        y = bottom + height * power / top
        d.axes.plot((left, left + width), (y, y), color="#d5dae0", linewidth=0.7, zorder=1)
        d.note(left - 0.15, y, f"{10**power:,}", align="right")
    for pair, tokens in enumerate(turns):
        x = left + step * (pair + 0.5)
        d.axes.plot((x, x), (bottom, bottom + height * math.log10(tokens) / top), color=LOOK["tensor"][1], linewidth=3)
    for pair in (0, len(turns) // 8, len(turns) - 1):
        d.note(left + step * (pair + 0.5), bottom - 0.35, str(pair), align="center")
    d.note(left + width / 2, bottom - 0.75, "pair of channels", align="center")
    d.axes.text(left, bottom + height + 0.45, "tokens per turn", size=8.2, color=MUTED, va="center")
