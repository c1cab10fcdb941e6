"""Bias-based load balancing as a loop: counts move a bias, the bias moves the choice, and no gradient is involved."""

from itertools import pairwise

from minids.config import ModelConfig
from minids.course.diagrams import INK, Diagram, shape
from minids.training.pretrain import Recipe


def balance_loop(config: ModelConfig | None = None, speed: float | None = None) -> Diagram:
    """Draw one step of the loop; `speed` is the change of a bias per step, by default the recipe's (V3's)."""
    c = config or ModelConfig.preset("v3")
    experts, used = c.n_routed_experts, c.num_experts_per_tok
    d = Diagram(17.2, 6.8, "The bias decides which experts are chosen; the gate weight never sees it")
    gamma = Recipe().balance_speed if speed is None else speed
    groups = f"in {c.topk_group} of {c.n_group} groups" if c.topk_group < c.n_group else ""
    d.box("scores", 1.9, 5.9, "affinities $s$", f"tokens × {experts}", "tensor", 3.0)
    normalised = "$s$ of the chosen, divided by their sum"
    d.box("gate", 9.0, 5.9, normalised, f"× {c.routed_scaling_factor:g}", "operation", 6.4)
    d.box("weights", 15.3, 5.9, "gate weights $g$", f"tokens × {used}", "tensor", 3.0)
    d.box("add", 1.9, 3.6, "$s + b$", "", "operation", 3.0)
    d.box("choose", 6.1, 3.6, f"top {used}", groups, "operation", 2.4)
    d.box("chosen", 9.9, 3.6, "chosen experts", f"tokens × {used}", "tensor", 3.0)
    d.box("count", 15.3, 3.6, "tokens per expert", f"{shape(experts)} counts of a batch", "tensor", 3.4)
    d.box("bias", 1.9, 1.2, "bias $b$", f"{experts}, no gradient", "weight", 3.0)
    rule = "count above the mean: $b - \\gamma$,  below: $b + \\gamma$"
    d.box("move", 9.9, 1.2, rule, f"γ = {gamma:g}", "operation", 7.4)
    for start, end in [
        *pairwise(("scores", "gate", "weights")),
        *pairwise(("scores", "add", "choose", "chosen", "count")),
    ]:
        d.arrow(start, end)
    d.arrow("bias", "add")
    d.arrow("chosen", "gate", at=9.9)
    d.note(10.1, 4.75, "the choice, without $b$")
    d.note(12.45, 3.85, "count", align="center", size=8)
    d.axes.plot((15.3, 15.3), (3.2, 1.2), color=INK, linewidth=1.0, linestyle="--", zorder=2)
    arrowhead = dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, color=INK, linestyle="--")
    d.axes.annotate("", (13.6, 1.2), (15.3, 1.2), arrowprops=arrowhead, zorder=2)
    d.arrow("move", "bias", "once per step", dashed=True)
    return d
