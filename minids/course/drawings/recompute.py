"""What a layer keeps of its forward pass for the backward pass, and what V3 recomputes instead."""

from minids.config import ModelConfig
from minids.course.diagrams import Diagram
from minids.parallel.activation_cost import kept_bytes_per_token


def recompute(config: ModelConfig | None = None) -> Diagram:
    """Draw the tensors of a layer with their bytes per token, everything in BF16 and as V3 keeps them."""
    c = config or ModelConfig.preset("v3")
    whole, kept = (kept_bytes_per_token(c, as_v3=as_v3) for as_v3 in (False, True))
    before, after = (f"{sum(each.values()) / 1e3:,.0f} kB" for each in (whole, kept))
    d = Diagram(17.2, 6.4, f"Recomputation and fewer bits leave {after} of {before} per token and layer")

    def tensor(name: str, x: float, y: float, width: float = 3.6) -> None:
        cost = f"{whole[name] / 1e3:.0f} kB: recomputed" if not kept[name] else f"{whole[name] / 1e3:.0f} kB"
        if 0 < kept[name] < whole[name]:
            cost += f"; in {16 * kept[name] / whole[name]:.0f} bits: {kept[name] / 1e3:.0f}"
        d.box(name, x, y, name, cost, "cache" if kept[name] else "idle", width, 0.95)

    d.frame(0.2, 4.0, 17.0, 6.2, "attention (MLA)")
    d.frame(0.2, 0.8, 17.0, 3.6, "mixture of experts")
    tensor("residual stream", 2.3, 4.9)
    tensor("latents", 6.4, 4.9, 2.6)
    tensor("queries, keys, values", 10.4, 4.9, 4.0)
    tensor("attention output", 14.7, 4.9, 3.8)
    tensor("RMSNorm outputs", 4.4, 1.9)
    tensor("expert inputs", 8.2, 1.9, 3.4)
    tensor("gate and up", 11.55, 1.9, 2.8)
    tensor("SwiGLU output", 15.1, 1.9, 3.4)
    for start, end in (
        ("residual stream", "latents"),
        ("latents", "queries, keys, values"),
        ("queries, keys, values", "attention output"),
        ("RMSNorm outputs", "expert inputs"),
        ("expert inputs", "gate and up"),
        ("gate and up", "SwiGLU output"),
    ):
        d.arrow(start, end)
    d.path([(14.7, 4.42), (14.7, 3.75), (4.4, 3.75), (4.4, 2.38)])
    d.note(4.6, 3.05, "+ residual stream, RMSNorm")
    d.note(
        0.3,
        0.35,
        "sizes in BF16. Thick: kept; dashed: not kept. Residual stream: of both halves; norms: also of the latents",
    )
    return d
