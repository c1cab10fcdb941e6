"""From a model's config to its training bill, each step one formula of `minids.cost`."""

import math

from minids import cost
from minids.config import ModelConfig
from minids.course.diagrams import Diagram, shape


def bill(config: ModelConfig | None = None, tokens: float = 14.8e12, seq_len: int = 4096, usd: float = 2) -> Diagram:
    """Draw the way from sizes to dollars for V3's pre-training (V3 sections 1 and 4.2), or another model's."""
    c = config or ModelConfig.preset("v3")
    hours = cost.V3_GPU_HOURS["pre-training"]
    flops = cost.training_flops_per_token(c, seq_len)
    utilisation = cost.mfu(tokens / hours / 3600, flops)
    total, active = cost.num_parameters(c), cost.matmul_parameters(c)
    everything, power = sum(cost.V3_GPU_HOURS.values()), math.floor(math.log10(tokens * flops))
    d = Diagram(17.2, 7.0, "From the config to the bill: sizes give the work, hours are reported, the price is assumed")
    d.frame(5.0, 0.3, 9.8, 4.5, "GPU hours, reported by DeepSeek")
    d.box("config", 1.8, 5.9, "config", f"{c.num_hidden_layers} layers × {shape(c.hidden_size)}", "tensor", 2.8)
    d.box("total", 5.6, 5.9, "weights", f"{total / 1e9:.0f}B", "weight", 2.4)
    d.box("active", 9.5, 5.9, "used per token", f"{active / 1e9:.1f}B", "weight", 2.8)
    d.box("flops", 15.3, 5.9, "FLOPs per token", f"{flops / 1e9:.0f}G", "tensor", 3.2)
    work = f"${tokens * flops / 10**power:.2f} \\cdot 10^{{{power}}}$"
    d.box("work", 15.3, 3.4, "FLOPs of the run", work, "tensor", 3.2)
    d.box("hours", 7.4, 3.4, "pre-training", f"{hours:,.0f}", "tensor", 3.8)
    d.box("dollars", 1.8, 3.4, "pre-training", f"USD {cost.rent_usd(hours, usd):,.0f}", "tensor", 2.8)
    d.box("all hours", 7.4, 1.2, "all stages", f"{everything:,.0f}", "tensor", 3.8)
    d.box("bill", 1.8, 1.2, "the bill", f"USD {cost.rent_usd(everything, usd):,.0f}", "here", 2.8)
    d.arrow("config", "total")
    d.arrow("total", "active")
    d.arrow("active", "flops", "× 6, and attention")
    d.arrow("flops", "work", f"× {tokens / 1e12:g}T tokens")
    d.arrow("work", "hours", f"÷ {utilisation:.0%} of {cost.H800_PEAK_FLOPS / 1e12:g} TFLOP/s")
    d.arrow("hours", "all hours", "+ context extension,\npost-training")
    d.arrow("hours", "dollars", f"× {usd:g} USD")
    d.arrow("all hours", "bill", f"× {usd:g} USD")
    d.note(10.2, 2.75, f"{utilisation:.0%} utilisation follows from the hours")
    return d
