"""Engram: a memory whose rows are chosen by the hash of the last tokens, and a gate that decides what it adds."""

from minids.config import EngramConfig
from minids.course.diagrams import Diagram, shape

V4_1 = EngramConfig(layers=(1, 14), rows=16_000_000, max_ngram=4, heads=8, dim=2048)  # FACTS.md section 10


def engram(config: EngramConfig = V4_1, width: int = 5120) -> Diagram:
    """Draw the memory of one layer for one token: h += gate * W_v e (Engram; `minids.model.engram`)."""
    c = config
    lengths, each = c.max_ngram - 1, c.dim // c.heads
    d = Diagram(17.2, 8.6, "Which rows are read depends on the tokens alone; how much they add, on the hidden state")
    d.frame(0.3, 0.3, 11.0, 4.6, "before the forward pass: integers only")
    d.frame(11.3, 0.3, 16.9, 4.6, "tables, on any device")
    d.frame(0.3, 4.9, 16.9, 8.2, "in the layer, before its attention")
    for i in range(c.max_ngram):
        back = c.max_ngram - 1 - i
        d.box(f"token {back}", 1.7 + 1.75 * i, 1.1, "$t$" if not back else f"$t - {back}$", "", "tensor", 1.5, 0.6)
    middle = 1.7 + 1.75 * (c.max_ngram - 1) / 2
    d.box("hash", middle, 2.9, "hash", "XOR of id × odd, mod prime", "operation", 5.7)
    for i in range(c.max_ngram):
        d.arrow(f"token {i}", "hash", at=d.boxes[f"token {i}"].x)
    d.box("rows", 9.2, 2.9, "row numbers", shape(lengths, c.heads), "tensor", 2.6)
    d.box("tables", 14.1, 2.9, f"{lengths * c.heads} tables", f"{c.rows:,} or more rows × {each}", "weight", 5.0, 1.4)
    d.arrow("hash", "rows")
    d.arrow("rows", "tables", "fetch")
    d.note(0.8, 3.85, f"n = 2 to {c.max_ngram}, {c.heads} hash heads for each n")
    d.box("memory", 15.1, 5.8, "memory e", shape(lengths * c.dim), "tensor", 3.2)
    d.box("value", 10.2, 5.8, "$W_v e$", shape(width), "operation", 2.4)
    d.box("key", 10.2, 7.3, "$W_k e$", shape(width), "operation", 2.4)
    d.box("gate", 6.6, 7.3, "gate", "0 to 1, one per stream", "operation", 3.4)
    d.box("add", 6.6, 5.8, "h + gate · $W_v e$", shape(width), "operation", 3.4)
    d.box("h", 2.4, 7.3, "hidden state h", shape(width), "tensor", 3.0)
    d.path([(15.9, 3.6), (15.9, 5.4)])
    d.arrow("memory", "value")
    d.path([(15.1, 6.2), (15.1, 7.3), (11.4, 7.3)])
    d.arrow("key", "gate")
    d.arrow("h", "gate")
    d.arrow("gate", "add")
    d.arrow("value", "add")
    d.path([(2.4, 6.9), (2.4, 5.8), (4.9, 5.8)])
    return d
