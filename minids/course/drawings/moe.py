"""From one feed-forward network to many small experts, drawn to scale: an area is the weights that a layer keeps."""

import math

from matplotlib.patches import PathPatch
from matplotlib.path import Path

from minids.config import ModelConfig
from minids.cost import expert_parameters
from minids.course.diagrams import INK, LOOK, Diagram, shape

WIDTH, HEIGHT = 5.6, 2.4  # of all routed experts of a layer, in units of the drawing
BOTTOM = 3.3
CHOSEN = INK


def moe_layers(config: ModelConfig | None = None, coarser: int = 4) -> Diagram:
    """Draw a dense layer, one with experts `coarser` times as wide as the config's, and the config's own."""
    c = config or ModelConfig.preset("v3")
    each, experts, used, own = expert_parameters(c), c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts
    times = (experts + own) / (used + own)
    d = Diagram(18.2, 8.6, f"Similar work per token, {times:.0f} times the weights, and more ways to combine them")
    large, taken, width = experts // coarser, max(1, used // coarser), c.moe_intermediate_size

    _ends(d, "dense", 1.8, "dense", f"{_short((used + own) * each)} of {_short((used + own) * each)}", "one way")
    share = (used + own) / experts * c.n_group
    d.box("dense", 1.8, BOTTOM + HEIGHT / 2, "", "", "weight", WIDTH * share, HEIGHT / c.n_group)
    d.note(1.92, BOTTOM + 0.55, f"one network,\n{shape(width * (used + own))} wide")
    d.arrow("dense in", "dense")
    d.arrow("dense", "dense out")

    _ends(d, "coarse", 6.4, f"coarse: {taken} of {large} experts",
          f"{_short(taken * coarser * each)} of {_short(experts * each)}", _words(ways(large, taken)))  # fmt: skip
    _grid(d, "coarse", 6.4, c.n_group, large // c.n_group, taken, f"{large} experts, {shape(width * coarser)} wide")
    _through(d, "coarse", 9.5, taken)

    _ends(d, "fine", 13.0, f"fine-grained: {used} of {experts} experts" + (f" + {own} shared" if own else ""),
          f"{_short((used + own) * each)} of {_short((experts + own) * each)}",
          _words(ways(experts, used, c.n_group, c.topk_group)))  # fmt: skip
    limit = f": {c.n_group} rows, one a node; at most {c.topk_group} used" if c.topk_group < c.n_group else ""
    _grid(d, "fine", 13.0, c.n_group, experts // c.n_group, used, f"{experts} experts, {shape(width)} wide{limit}",
          c.topk_group)  # fmt: skip
    _through(d, "fine", 16.1, used)
    if own:
        d.box("shared", 17.35, BOTTOM + HEIGHT / 2, "shared", "always", "weight", 1.4, 0.9)
        entry, leave = d.boxes["fine in"], d.boxes["fine out"]
        d.path([(entry.x + entry.width / 2, entry.y), (17.35, entry.y), (17.35, BOTTOM + HEIGHT / 2 - 0.45)])
        d.path([(17.35, BOTTOM + HEIGHT / 2 + 0.45), (17.35, leave.y), (leave.x + leave.width / 2, leave.y)])
        d.note(15.9, leave.y + 0.25, "added as it is", align="center", size=8)
    return d


def ways(experts: int, taken: int, groups: int = 1, kept: int = 1) -> int:
    """Count the sets of `taken` experts that lie in at most `kept` of `groups` groups of equal size."""
    each = experts // groups

    def exactly(used: int) -> int:  # by inclusion and exclusion
        terms = ((-1) ** out * math.comb(used, out) * math.comb(each * (used - out), taken) for out in range(used + 1))
        return math.comb(groups, used) * sum(terms)

    return sum(exactly(used) for used in range(1, kept + 1))


def _ends(d: Diagram, name: str, x: float, words: str, weights: str, combinations: str) -> None:
    d.note(x, 8.35, words, align="center", size=10)
    d.box(f"{name} in", x, 1.35, "token", "", "tensor", 1.8, 0.6)
    d.box(f"{name} out", x, 7.6, "output", "", "tensor", 1.8, 0.6)
    d.note(x, 0.45, f"a token uses {weights}\nweights, {combinations}", strong=True, align="center")


def _grid(
    d: Diagram, name: str, x: float, rows: int, columns: int, taken: int, words: str, kept: int | None = None
) -> None:
    """Draw all experts of a layer, a row for each group, and `taken` of them filled, in at most `kept` rows."""
    left, across, up = x - WIDTH / 2, WIDTH / columns, HEIGHT / rows
    d.frame(left - 0.12, BOTTOM - 0.12, left + WIDTH + 0.12, BOTTOM + HEIGHT + 0.5, words)
    used = [rows - 2 - 2 * number for number in range(rows // 2)][: kept or rows]
    chosen = {(used[number % len(used)], (7 * number + 2) % columns) for number in range(taken)}
    for filled in (False, True):
        corners = [
            (left + column * across, BOTTOM + row * up)
            for row in range(rows)
            for column in range(columns)
            if ((row, column) in chosen) == filled
        ]
        squares = Path.make_compound_path(*(_square(*corner, across, up) for corner in corners))
        face, edge, *_ = LOOK["weight"]
        d.axes.add_patch(
            PathPatch(squares, facecolor=CHOSEN if filled else face, edgecolor=edge, linewidth=0.5, zorder=3)
        )
    assert len(chosen) == taken


def _square(x: float, y: float, across: float, up: float) -> Path:
    right, top, x, y = x + 0.92 * across, y + 0.88 * up, x + 0.08 * across, y + 0.12 * up
    return Path([(x, y), (right, y), (right, top), (x, top), (x, y)], closed=True)


def _through(d: Diagram, name: str, side: float, taken: int) -> None:
    """Draw the way through router, experts and weighted sum; the gate weights go round the experts, at x = `side`."""
    x = d.boxes[f"{name} in"].x
    d.box(f"{name} router", x, 2.4, "router", "", "operation", 1.8, 0.6)
    d.box(f"{name} sum", x, 6.55, "weighted sum", "", "operation", 2.4, 0.6)
    d.arrow(f"{name} in", f"{name} router")
    d.path([(x, 2.7), (x, BOTTOM - 0.12)])
    d.path([(x, BOTTOM + HEIGHT + 0.5), (x, 6.25)])
    d.arrow(f"{name} sum", f"{name} out")
    d.path([(x + 0.9, 2.4), (side, 2.4), (side, 6.55), (x + 1.2, 6.55)])
    d.note(x + 1.3, 6.8, f"{taken} gate weights", size=8)
    d.note(x + 0.12, 2.95, f"{taken} chosen", size=8)


def _short(weights: int) -> str:
    size, letter = next((size, letter) for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if weights >= size)
    return f"{weights / size:.1f}{letter}" if letter == "B" else f"{weights / size:.0f}{letter}"


def _words(number: int) -> str:
    if number < 1e6:
        return f"{number:,} ways"
    power = int(math.log10(number))
    return f"${number / 10**power:.1f} \\cdot 10^{{{power}}}$ ways"
