"""Multi-token prediction: the main model and one module, which token goes where, and what they share."""

from itertools import pairwise

from minids.config import ModelConfig
from minids.course.diagrams import INK, Diagram, shape


def mtp_chain(config: ModelConfig | None = None) -> Diagram:
    """Draw the main model and the module of depth 1 on four tokens (V3 Figure 3)."""
    c = config or ModelConfig.preset("v3")
    width = c.hidden_size
    d = Diagram(17.2, 9.9, "The MTP module gets the hidden state and the next token, and predicts the token after it")
    d.frame(0.3, 1.25, 7.3, 8.75, "main model")
    d.frame(9.3, 1.25, 16.9, 8.75, "MTP module 1")
    for name, x, first in (("main", 3.8, 1), ("module", 13.1, 2)):
        for number in range(4):
            place = x + 1.3 * (number - 1.5)
            d.box(f"{name} in {number}", place, 0.6, f"$t_{first + number}$", "", "tensor", 0.95, 0.6)
            d.box(f"{name} out {number}", place, 9.4, f"$t_{first + number + 1}$", "", "tensor", 0.95, 0.6)
    d.box("embedding", 3.8, 2.1, "embedding", f"{shape(c.vocab_size)} × {shape(width)}", "weight", 5.2)
    d.box("layers", 3.8, 4.1, f"{c.num_hidden_layers} layers", "", "operation", 5.2)
    d.box("h", 3.8, 5.75, "$h$", f"tokens × {shape(width)}", "tensor", 3.0)
    d.box("head", 3.8, 7.4, "RMSNorm, head", f"{shape(width)} × {shape(c.vocab_size)}", "weight", 5.2)
    d.box("module embedding", 13.1, 2.1, "embedding", "the same", "weight", 5.2)
    d.box("hidden norm", 11.5, 3.6, "RMSNorm", "", "operation", 2.0, 0.6)
    d.box("embedding norm", 14.7, 3.6, "RMSNorm", "", "operation", 2.0, 0.6)
    d.box("join", 13.1, 4.85, "concatenate, project", f"{shape(2 * width)} → {shape(width)}", "operation", 5.2)
    d.box("layer", 13.1, 6.15, "1 transformer layer", f"tokens × {shape(width)}", "operation", 5.2)
    d.box("module head", 13.1, 7.4, "RMSNorm, head", "the same head", "weight", 5.2)
    for path in (("embedding", "layers", "h", "head"), ("join", "layer", "module head")):
        for start, end in pairwise(path):
            d.arrow(start, end)
    d.arrow("hidden norm", "join", at=11.5)
    d.arrow("embedding norm", "join", at=14.7)
    _arrow(d, (14.7, 2.5), (14.7, 3.3))
    d.axes.plot((5.3, 8.3, 8.3), (5.75, 5.75, 3.6), color=INK, linewidth=1.0, zorder=2)
    _arrow(d, (8.3, 3.6), (10.5, 3.6))
    for name in ("main", "module"):
        for number in range(4):
            x = d.boxes[f"{name} in {number}"].x
            _arrow(d, (x, 0.9), (x, 1.7))
            _arrow(d, (x, 7.8), (x, 9.1))
    d.note(8.3, 6.05, "hidden state", align="center")
    d.arrow("embedding", "module embedding", "shared", dashed=True)
    d.arrow("head", "module head", "shared", dashed=True)
    return d


def _arrow(d: Diagram, start: tuple[float, float], end: tuple[float, float]) -> None:
    d.axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, color=INK), zorder=2)
