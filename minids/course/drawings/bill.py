"""From a model's config to its training bill: what is computed, what DeepSeek reported, and what it assumed."""

import math

from minids import cost
from minids.config import ModelConfig
from minids.course.diagrams import Diagram, shape


def power_of_ten(number: float) -> tuple[float, int]:
    """Return mantissa and exponent: 3.71e24 is (3.71, 24)."""
    exponent = math.floor(math.log10(number))
    return number / 10**exponent, exponent


def bill(config: ModelConfig | None = None, tokens: float = 14.8e12, seq_len: int = 4096, usd: float = 2) -> Diagram:
    """Draw the way from sizes to dollars for V3's pre-training (V3 sections 1 and 4.2), or another model's."""
    c = config or ModelConfig.preset("v3")
    hours, all_hours = cost.V3_GPU_HOURS["pre-training"], sum(cost.V3_GPU_HOURS.values())
    flops = cost.training_flops_per_token(c, seq_len)
    utilisation = cost.mfu(tokens / hours / 3600, flops)
    peak = cost.H800_PEAK_FLOPS
    (done, power), at_peak = power_of_ten(tokens * flops), 3600 * hours * peak
    d = Diagram(
        17.2, 7.0, "Computed FLOPs and reported GPU-hours give the utilisation; the price of an hour is assumed"
    )
    d.frame(0.2, 4.9, 17.0, 6.8, "parameters, computed from the config")
    d.frame(0.2, 0.2, 5.5, 4.6, "reported by DeepSeek")
    d.box("config", 1.75, 5.7, "config", f"{c.num_hidden_layers} layers of {shape(c.hidden_size)}", "tensor", 2.4)
    d.box("total", 5.15, 5.7, f"{cost.num_parameters(c) / 1e9:.2f}B", "stored", "weight", 2.4)
    d.box("active", 8.55, 5.7, f"{cost.num_parameters(c, active=True) / 1e9:.2f}B", "active per token", "weight", 2.6)
    d.box("multiplied", 11.95, 5.7, f"{cost.matmul_parameters(c) / 1e9:.2f}B", "N, multiplied", "weight", 2.4)
    d.box("flops", 15.35, 5.7, f"{flops / 1e9:.0f} GFLOP a token", "6 N + attention", "tensor", 3.0)
    d.box("work", 15.35, 3.1, f"${done:.2f} \\cdot 10^{{{power}}}$ FLOP", "pre-training", "tensor", 2.9)
    share = f"{done:.2f} of {at_peak / 10**power:.2f} e{power} FLOP"
    d.box("utilisation", 9.9, 3.1, f"utilisation {utilisation:.0%}", share, "here", 3.6)
    d.box("hours", 2.85, 3.1, f"{hours:,.0f} GPU-hours", "pre-training", "tensor", 4.4)
    d.box("all hours", 2.85, 0.9, f"{all_hours:,.0f} GPU-hours", "all stages", "tensor", 4.4)
    d.box("price", 9.9, 0.9, f"× USD {usd:g} per hour", "assumed", "idle", 3.0)
    d.box("bill", 15.35, 0.9, f"USD {cost.rent_usd(all_hours, usd):,.0f}", "the bill", "here", 2.9)
    for start, end in (("config", "total"), ("total", "active"), ("active", "multiplied"), ("multiplied", "flops")):
        d.arrow(start, end)
    d.arrow("flops", "work", f"× {tokens / 1e12:g}T tokens")
    d.arrow("work", "utilisation", "FLOP done")
    d.arrow("hours", "utilisation", f"× peak, {peak / 1e12:g} TFLOP/s")
    d.arrow("hours", "all hours", "+ context extension,\npost-training")
    d.arrow("all hours", "price")
    d.arrow("price", "bill", dashed=True)
    return d
