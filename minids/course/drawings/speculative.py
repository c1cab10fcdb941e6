"""Speculative decoding with one MTP module: one round, from the draft to the tokens that it yields."""

from minids.config import ModelConfig
from minids.course.diagrams import INK, Diagram


def speculative_round(config: ModelConfig | None = None) -> Diagram:
    """Draw a round: draft, verification in one pass, and both outcomes."""
    c = config or ModelConfig.preset("v3")
    d = Diagram(17.2, 8.3, "One pass of the target model verifies the draft: two tokens if it is accepted, else one")
    for left, right, label in (
        (0.2, 5.0, "1  draft model: the MTP module"),
        (5.3, 10.3, "2  target model: verify"),
        (10.6, 17.0, "3  accept or reject"),
    ):
        d.frame(left, 0.3, right, 8.1, label)
    d.box("known", 2.6, 1.2, "$\\ldots\\, t_4, t_5$", "text so far", "tensor", 3.0)
    d.box("module", 2.6, 3.7, "MTP module", "and h4 of the last pass", "operation", 3.9)
    d.box("draft", 2.6, 6.0, "$d_6$", "draft, sampled from q", "idle", 3.0)
    d.arrow("known", "module")
    d.arrow("module", "draft")
    d.box("read", 7.8, 1.3, "$t_5, d_6$", "2 tokens; the rest is cached", "tensor", 4.2)
    d.box("main", 7.8, 3.7, "main model, one pass", f"{c.num_hidden_layers} layers", "operation", 4.2)
    d.box("p", 7.8, 6.0, "$p_6,\\ p_7$", "after t5, after d6", "tensor", 3.0)
    d.box("accept", 13.8, 6.0, "accept $d_6$ ?", "with probability min(1, p6(d6) / q(d6))", "operation", 5.9)
    d.box("two", 12.3, 3.7, "$d_6,\\ t_7$", "2 tokens", "tensor", 2.8)
    d.box("one", 15.4, 3.7, "$t_6$", "1 token", "tensor", 2.8)
    d.note(2.6, 7.1, "costs $c$ passes", strong=True, align="center")
    d.note(7.8, 7.1, "costs $v$ passes over 1 token", strong=True, align="center")
    d.note(13.8, 7.1, r"gains $1 + \alpha$ tokens on average", strong=True, align="center")
    for start, end in ("known", "read"), ("read", "main"), ("main", "p"), ("p", "accept"):
        d.arrow(start, end)
    d.axes.plot((4.1, 5.15, 5.15), (6.0, 6.0, 1.5), color=INK, linewidth=1.0, zorder=2)
    arrowhead = dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, color=INK)
    d.axes.annotate("", (5.7, 1.5), (5.15, 1.5), arrowprops=arrowhead, zorder=2)
    d.arrow("accept", "two", "accepted")
    d.arrow("accept", "one", "rejected")
    d.note(12.3, 2.6, "bonus token:\n$t_7$ from $p_7$", align="center")
    d.note(15.4, 2.6, "$t_6$ from\nmax$(p_6 - q,\\, 0)$,\nscaled to sum 1", align="center")
    d.note(
        13.85,
        1.2,
        "Greedy: the same tokens. Sampled: the same\ndistribution, that of the target model.",
        align="center",
    )
    return d
