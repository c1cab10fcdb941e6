"""The data flow of a linear layer in FP8 training: the precision of each operand, sum and result (V3 Figure 6)."""

from minids.config import ModelConfig
from minids.course.diagrams import Diagram, Role

FP8 = {  # product: its two operands with their tiles, then result, precision and what it computes (FACTS.md section 5)
    "Fprop": (("X", "1×128"), ("W", "128×128"), "Y", "BF16", "output: Y = X Wᵀ"),
    "Dgrad": (("∂Y", "1×128"), ("W", "128×128"), "∂X", "BF16", "gradient of the input: ∂X = ∂Y W"),
    "Wgrad": (("∂Y", "128×1"), ("X", "128×1"), "∂W", "FP32", "gradient of the weight: ∂W = ∂Yᵀ X"),
}
SOURCES: dict[str, tuple[Role, str]] = {
    "X": ("tensor", "BF16"),
    "W": ("weight", "FP32"),
    "∂Y": ("tensor", "BF16"),
}


def fp8_flow(config: ModelConfig | None = None) -> Diagram:
    """Draw the three products of an expert's `gate_proj`, T tokens long; shaded is what is in FP8."""
    c = config or ModelConfig.preset("v3")
    x, w, y = f"T×{c.hidden_size}", f"{c.moe_intermediate_size}×{c.hidden_size}", f"T×{c.moe_intermediate_size}"
    shapes = {"X": x, "W": w, "Y": y}
    d = Diagram(17.2, 11.4, "All three products of a linear layer read FP8; sums and results are more precise")
    for column, (product, (first, second, result, precision, words)) in enumerate(FP8.items()):
        left = 0.2 + 5.7 * column
        middle = left + 2.7
        d.frame(left, 0.2, left + 5.4, 11.2, words)
        for place, (name, tile) in ((left + 1.4, first), (left + 4.0, second)):
            role, kept = SOURCES[name]
            stored = name == "X" and product == "Wgrad"  # the forward pass keeps its tiles for the backward pass
            shape = f"{kept} {shapes[name.removeprefix('∂')]}"
            shape = "FP8, 1×128" if stored else shape
            label = "X, kept" if stored else "W, master" if name == "W" else name
            d.box(f"{product} {name}", place, 0.9, label, shape, "cache" if stored else role, 2.4, 0.9)
            d.box(f"{product} {name} FP8", place, 2.9, f"{name} in FP8", f"tiles {tile}", "cache", 2.4, 0.9)
            d.arrow(f"{product} {name}", f"{product} {name} FP8", "re-tile" if stored else "quantise")
        d.box(product, middle, 4.9, product, "accumulator of ~14 bits", "operation", 4.0, 1.0)
        for place, (name, _) in ((left + 1.4, first), (left + 4.0, second)):
            d.arrow(f"{product} {name} FP8", product, at=place)
        d.box(f"{product} sum", middle, 7.3, "sum in FP32", "", "tensor", 2.6, 0.8)
        d.arrow(product, f"{product} sum", "promotion: every 128\nproducts, × scales")
        shape = f"{precision} {shapes[result.removeprefix('∂')]}"
        d.box(f"{product} result", middle, 9.7, result, shape, "weight" if result == "∂W" else "tensor", 2.6, 0.9)
        d.arrow(
            f"{product} sum", f"{product} result", "kept in FP32" if precision == "FP32" else f"cast to {precision}"
        )
    d.note(14.3, 10.5, "to AdamW: FP32 master, BF16 moments", align="center")
    d.note(2.9, 3.9, "E4M3", strong=True, align="center")
    return d
