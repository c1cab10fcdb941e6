"""A pre-norm transformer layer: two sublayers that read the residual stream and add to it."""

from minids.config import ModelConfig
from minids.cost import kv_values_per_layer
from minids.course.diagrams import INK, Diagram, shape


def pre_norm_block(config: ModelConfig | None = None) -> Diagram:
    """Draw one layer; the feed-forward is dense, a mixture of experts, or named as both where the config has both."""
    c = config or ModelConfig.preset("v3")
    width = f"tokens × {shape(c.hidden_size)}"
    d = Diagram(17.2, 5.9, "Each sublayer reads a normalised copy of the residual stream and adds its output to it")
    d.frame(3.2, 0.3, 14.5, 5.75, f"one of {c.num_hidden_layers} layers")
    d.box("in", 1.6, 1.1, "$x$", width, width=2.6)
    d.box("out", 15.8, 1.1, "$x$", width, width=2.4)
    dense, mixture = f"SwiGLU, {shape(c.intermediate_size)} wide", f"{c.num_experts_per_tok} of {c.n_routed_experts}"
    if c.num_moe_layers == 0:
        feed_forward = "feed-forward", dense
    elif c.first_k_dense_replace:
        feed_forward = "feed-forward or MoE", f"MoE in {c.num_moe_layers} layers"
    else:
        feed_forward = "mixture of experts", mixture
    heads = f"{c.num_attention_heads} heads"
    if c.attention == "gqa":
        heads += f", {c.num_key_value_heads} key heads"
    for left, name, label, small, note in (
        (3.6, "attention", "attention", heads, "mixes tokens"),
        (9.2, "feed-forward", *feed_forward, "per token"),
    ):
        d.box(f"{name} norm", left + 1.0, 3.1, "RMSNorm", shape(c.hidden_size), "operation", 1.8)
        d.box(name, left + 3.7, 3.1, label, small, "operation", 2.8)
        d.box(f"{name} +", left + 3.7, 1.1, "+", "", "operation", 0.7, 0.6)
        d.arrow(f"{name} norm", name)
        d.arrow(name, f"{name} +")
        arrowhead = dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, color=INK)
        d.axes.annotate("", (left + 1.0, 2.7), (left + 1.0, 1.1), arrowprops=arrowhead, zorder=2)
        d.note(left + 3.85, 2.2, note)
    d.box("cache", 7.3, 4.9, "KV cache", f"{shape(kv_values_per_layer(c))} values a token", "cache", 4.0)
    d.path([(6.6, 3.5), (6.6, 4.5)])
    d.path([(8.0, 4.5), (8.0, 3.5)], strong=True)
    d.note(6.45, 4.0, "write: 1 token", align="right")
    d.note(8.2, 4.0, "read: all tokens so far", strong=True)
    d.arrow("in", "attention +")
    d.arrow("attention +", "feed-forward +")
    d.arrow("feed-forward +", "out")
    for start, end in ((2.9, 6.6), (7.65, 12.2), (13.25, 14.4)):  # the residual stream
        d.axes.plot((start, end), (1.1, 1.1), color=INK, linewidth=2.4, zorder=2)
    d.note(9.9, 0.7, "residual stream", align="center")
    return d
