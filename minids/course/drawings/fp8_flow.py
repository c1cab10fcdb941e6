"""The data flow of a linear layer in FP8 training: which operand and which result has which precision (V3 figure 6)."""

from minids.course.diagrams import Diagram, Role

FP8 = {  # product: its two operands with their tiles, then result, precision and where it goes (FACTS.md section 5)
    "Fprop": (("X", "1×128"), ("W", "128×128"), "Y", "BF16", "output"),
    "Dgrad": (("∂Y", "1×128"), ("W", "128×128"), "∂X", "BF16", "gradient of the input"),
    "Wgrad": (("∂Y", "128×1"), ("X", "128×1"), "∂W", "FP32", "gradient of the weight"),
}
SOURCES: dict[str, tuple[Role, str]] = {
    "X": ("tensor", "BF16"),
    "W": ("weight", "FP32 master"),
    "∂Y": ("tensor", "BF16"),
}


def fp8_flow() -> Diagram:
    """Draw the three products of a linear layer; shaded is what is in FP8."""
    d = Diagram(17.2, 9.3, "All three products of a linear layer read FP8; sums and results are more precise")
    for column, (product, (first, second, result, precision, words)) in enumerate(FP8.items()):
        left = 0.2 + 5.7 * column
        middle = left + 2.7
        d.frame(left, 0.2, left + 5.4, 9.0, words)
        for x, (name, tile) in ((left + 1.4, first), (left + 4.0, second)):
            role, kept = SOURCES[name]
            stored = name == "X" and product == "Wgrad"  # the forward pass keeps its tiles for the backward pass
            d.box(
                f"{product} {name}",
                x,
                1.0,
                name,
                "FP8, 1×128" if stored else kept,
                "cache" if stored else role,
                2.1,
                0.9,
            )
            d.box(f"{product} {name} FP8", x, 3.2, f"{name} in FP8", tile, "cache", 2.1, 0.9)
            d.arrow(f"{product} {name}", f"{product} {name} FP8", "re-tile" if stored else "quantise")
        d.box(product, middle, 5.5, product, "sums in FP32", "operation", 3.6, 1.0)
        for x, (name, _) in ((left + 1.4, first), (left + 4.0, second)):
            d.arrow(f"{product} {name} FP8", product, at=x)
        d.box(f"{product} result", middle, 7.6, result, precision, "weight" if result == "∂W" else "tensor", 2.1, 0.9)
        d.arrow(product, f"{product} result")
    d.note(15.6, 7.6, "AdamW:\nmoments\nin BF16")
    d.note(2.9, 4.3, "8 bits:\nE4M3", strong=True, align="center")
    return d
