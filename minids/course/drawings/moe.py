"""From one feed-forward network to many small experts: how many weights a token uses, of how many there are."""

import math

from minids.config import ModelConfig
from minids.cost import expert_parameters
from minids.course.diagrams import INK, Diagram, Role, shape


def moe_layers(config: ModelConfig | None = None, coarser: int = 4) -> Diagram:
    """Draw a dense layer, one with experts `coarser` times as wide as the config's, and the config's own."""
    c = config or ModelConfig.preset("v3")
    each, experts, used, own = expert_parameters(c), c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts
    d = Diagram(17.2, 8.3, "Fine-grained experts: similar weights and work, far more ways to combine them")
    large, taken = experts // coarser, max(1, used // coarser)
    width = c.moe_intermediate_size

    _ends(d, "dense", 2.3, "dense", f"{_short((used + own) * each)} of {_short((used + own) * each)}", "one way")
    d.box("dense", 2.3, 4.4, "feed-forward", f"{shape(width * (used + own))} wide", "weight", 3.2, 2.4)
    d.arrow("dense in", "dense")
    d.arrow("dense", "dense out")

    _ends(d, "coarse", 7.3, f"coarse: {taken} of {large} experts",
          f"{_short(taken * coarser * each)} of {_short(experts * each)}", _ways(large, taken))  # fmt: skip
    _grid(d, "coarse", 7.3, (2, 4), large, taken, f"{shape(width * coarser)} wide")
    _through(d, "coarse")

    _ends(d, "fine", 12.7, f"fine-grained: {used} of {experts} experts" + (f" + {own} shared" if own else ""),
          f"{_short((used + own) * each)} of {_short((experts + own) * each)}", _ways(experts, used))  # fmt: skip
    _grid(d, "fine", 12.7, (4, 8), experts, used, f"{shape(width)} wide")
    _through(d, "fine")
    if own:
        d.box("shared", 16.1, 4.4, "shared", "always", "weight", 1.4, 1.2)
        d.arrow("fine in", "shared", bend=1.72)
        d.arrow("shared", "fine out", bend=6.6, at=13.6)
    return d


def _ends(d: Diagram, name: str, x: float, words: str, weights: str, ways: str) -> None:
    d.note(x, 8.05, words, align="center", size=10)
    d.box(f"{name} in", x, 1.25, "token", "", "tensor", 1.8, 0.6)
    d.box(f"{name} out", x, 7.35, "sum by gate weight" if name != "dense" else "output", "", "tensor", 2.8, 0.6)
    d.note(x, 0.35, f"a token uses {weights}\nweights, {ways}", strong=True, align="center")


def _grid(d: Diagram, name: str, x: float, grid: tuple[int, int], experts: int, taken: int, words: str) -> None:
    """Draw experts, as many as the grid holds, the `taken` ones filled."""
    (rows, columns), used = grid, {(5 * number + 1) % min(experts, grid[0] * grid[1]) for number in range(taken)}
    left, bottom, width, height = x - 2.1, 3.2, 4.2, 2.4
    d.frame(left - 0.1, bottom - 0.1, left + width + 0.1, bottom + height + 0.55,
            f"{min(experts, rows * columns)} of {experts} drawn, {words}")  # fmt: skip
    for number in range(min(experts, rows * columns)):
        row, column = divmod(number, columns)
        place = left + width * (column + 0.5) / columns, bottom + height * (row + 0.5) / rows
        role: Role = "weight" if number in used else "idle"
        d.box(f"{name} {number}", *place, "✓" if number in used else "", "", role,
              width / columns * 0.86, height / rows * 0.8)  # fmt: skip


def _through(d: Diagram, name: str) -> None:
    x = d.boxes[f"{name} in"].x
    d.box(f"{name} router", x, 2.3, "router", "", "operation", 1.8, 0.6)
    d.arrow(f"{name} in", f"{name} router")
    for start, stop in ((2.6, 3.1), (6.15, 7.05)):
        d.axes.annotate(
            "", (x, stop), (x, start), arrowprops=dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, color=INK), zorder=2
        )


def _short(weights: int) -> str:
    size, letter = next((size, letter) for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if weights >= size)
    return f"{weights / size:.1f}{letter}" if letter == "B" else f"{weights / size:.0f}{letter}"


def _ways(experts: int, taken: int) -> str:
    ways = math.comb(experts, taken)
    if ways < 1e6:
        return f"{ways:,} ways"
    power = int(math.log10(ways))
    return f"${ways / 10**power:.0f} \\cdot 10^{{{power}}}$ ways"
