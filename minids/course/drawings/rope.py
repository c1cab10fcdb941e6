"""Rotary position embedding: a pair of channels turns with the position, and each pair at its own speed."""

import math

from matplotlib.patches import Arc, Ellipse

from minids.config import ModelConfig
from minids.course.diagrams import INK, LOOK, MUTED, STRONG, UNIT, Diagram

RADIUS = 0.72  # inches


def rope_distance(turn: float = 0.25) -> Diagram:
    """Draw a pair at positions 0 to 3, and a query and a key at two places with the same distance; `turn` is a share.

    Query and key are the same vector (1, 0), turned by `turn` of a full turn per position.
    """
    score = math.cos(2 * math.pi * turn)
    d = Diagram(17.2, 6.0, "Turned by their positions, query and key keep an angle that depends on the distance only")
    degrees = f"{360 * turn:g}°"
    _dial(d, 2.6, 2.9, f"a pair of channels at\npositions 0 to 3, {degrees} each")
    for position in range(4):
        _hand(d, 2.6, 2.9, 2 * math.pi * turn * position, str(position), position == 0)
    for number, position in enumerate((0, 2)):
        x = 8.4 + 5.8 * number
        _dial(d, x, 2.9, f"key at position {position},\nquery at position {position + 1}")
        start = 2 * math.pi * turn * position
        _hand(d, x, 2.9, start, "key", True)
        _hand(d, x, 2.9, start + 2 * math.pi * turn, "query", False)
        size = 0.7 * RADIUS / UNIT[0], 0.7 * RADIUS / UNIT[1]
        arc = Arc((x, 2.9), *size, theta1=math.degrees(start), theta2=math.degrees(start) + 360 * turn, color=INK)
        d.axes.add_patch(arc)
        d.note(x, 0.45, f"angle {degrees}, score {score:.0f}", align="center", strong=True, size=9)
    return d


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
    d.note(0.4, 0.75, f"{width} channels are {pairs} pairs; the arrows are one pair at positions 0 to 3.")
    _frequencies(d, speeds, 10.9, 1.5, 6.0, 3.8)
    return d


def _circle(d: Diagram, x: float, y: float, pair: int, speed: float) -> None:
    """Draw the vector of a pair at positions 0 to 3."""
    _dial(d, x, y, f"pair {pair}")
    for position in range(4):
        label = str(position) if 3 * speed > 0.5 else "0–3" if position == 0 else ""
        _hand(d, x, y, position * speed, label, position == 0)
    d.note(x, y - RADIUS / UNIT[1] - 0.65, f"one turn in {2 * math.pi / speed:,.0f} tokens", align="center")


def _dial(d: Diagram, x: float, y: float, words: str) -> None:
    across, up = RADIUS / UNIT[0], RADIUS / UNIT[1]
    face, edge = LOOK["tensor"][:2]
    d.axes.add_patch(Ellipse((x, y), 2 * across, 2 * up, facecolor=face, edgecolor=edge, zorder=1))
    d.note(x, y + up + (1.25 if "\n" in words else 1.0), words, align="center", size=9 if "\n" in words else 10)


def _hand(d: Diagram, x: float, y: float, angle: float, label: str, strong: bool) -> None:
    """Draw a vector from the centre of a dial, with a label beyond its tip."""
    across, up = RADIUS / UNIT[0], RADIUS / UNIT[1]
    tip = x + across * math.cos(angle), y + up * math.sin(angle)
    arrowhead = dict(
        arrowstyle="-|>", shrinkA=0, shrinkB=0, linewidth=2 if strong else 1, color=STRONG if strong else INK
    )
    d.axes.annotate("", tip, (x, y), arrowprops=arrowhead, zorder=3)
    if label:
        beside = 1.22 + 0.09 * max(len(label) - 1, 0)
        d.note(x + beside * across * math.cos(angle), y + 1.22 * up * math.sin(angle), label, align="center")


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
