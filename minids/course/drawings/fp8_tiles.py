"""Tiles and blocks along the contraction dimension, promotion of partial sums, new tiles for the weight gradient."""

from matplotlib.patches import Rectangle

from minids.config import ModelConfig
from minids.course.diagrams import INK, LOOK, STRONG, Diagram, shape

TILE = 128  # tile, block and promotion interval (FACTS.md section 5)


def fp8_tiles(config: ModelConfig | None = None) -> Diagram:
    """Draw the first product of an expert: tokens times `gate_proj`, contraction over the hidden size."""
    c = config or ModelConfig.preset("v3")
    tiles, blocks = c.hidden_size // TILE, c.moe_intermediate_size // TILE
    d = Diagram(17.2, 9.0, f"Tiles run along the contraction, so one pair of scales serves {TILE} products")
    d.note(0.4, 8.5, f"X: tokens × {c.hidden_size:,}, a scale per 1×{TILE}")
    _grid(d, 0.4, 5.6, 4, 5, 1.5, 0.5, row=1)
    d.note(8.05, 6.6, f"... {tiles} tiles\nin a row")
    d.note(11.0, 8.5, f"Wᵀ: {shape(c.hidden_size, c.moe_intermediate_size)}, a scale per {TILE}×{TILE}")
    _grid(d, 11.0, 4.8, 4, 3, 1.1, 0.85, column=1)
    d.note(14.5, 6.5, f"... {blocks} blocks\nacross,\n{tiles} down")
    d.note(0.4, 5.2, "contraction K →", strong=True)
    d.note(9.6, 5.0, "contraction\nK ↓", strong=True)
    steps = 3
    for k in range(steps):
        x = 2.3 + 4.0 * k
        d.box(
            f"sum {k}",
            x,
            3.6,
            f"tile {k + 1} · column of block {k + 1}",
            f"{TILE} products, ~14-bit sum",
            "cache",
            3.8,
            0.9,
        )
        d.box(f"promote {k}", x, 1.1, "FP32 sum", "", "tensor", 2.2, 0.8)
        d.arrow(f"sum {k}", f"promote {k}", f"$\\times\\; s_{{X{k + 1}}}\\, s_{{W{k + 1}}}$")
        if k:
            d.arrow(f"promote {k - 1}", f"promote {k}", "+")
    d.path([(2.3 + 4.0 * (steps - 1) + 1.1, 1.1), (13.4, 1.1)])
    d.note(13.6, 1.1, f"... after {tiles} tiles:\none element of the product")
    d.note(12.5, 3.6, "promotion: after each tile the\ntensor core's sum goes to FP32")
    return d


def fp8_retile() -> Diagram:
    """Draw 128 tokens and channels of a layer's input: tiles that the forward pass keeps, and those of Wgrad."""
    d = Diagram(17.2, 6.0, "The weight gradient sums over tokens: the kept input gets new tiles, and is rounded again")
    size = 3.6
    for left, product, tile, contracted, bars in (
        (1.0, "kept by Fprop", f"1×{TILE}", "contraction: channels →", {"rows": 8, "columns": 1, "row": 2}),
        (12.0, "needed by Wgrad", f"{TILE}×1", "contraction: tokens ↓", {"rows": 1, "columns": 8, "column": 2}),
    ):
        d.note(left, 5.5, f"X, {product}: a scale per {tile}")
        _grid(d, left, 1.4, width=size / bars["columns"], height=size / bars["rows"], words=False, **bars)
        d.note(left, 0.9, contracted, strong=True)
        d.note(left, 0.4, f"{TILE} tokens ↓ by {TILE} channels →, 8 drawn")
    steps = (
        ("multiply by the scale", f"of its 1×{TILE} tile"),
        ("largest magnitude", f"of {TILE} tokens: a new scale"),
        ("divide, round again", "to E4M3"),
    )
    for number, (label, words) in enumerate(steps):
        d.box(f"step {number}", 8.3, 4.6 - 1.5 * number, label, words, "operation", 3.8, 0.9)
        if number:
            d.arrow(f"step {number - 1}", f"step {number}")
    d.path([(4.8, 4.6), (6.35, 4.6)])
    d.path([(10.25, 1.6), (11.8, 1.6)])
    d.note(8.3, 0.6, "scales 2ⁿ: rounding again\nchanges almost nothing", align="center")
    return d


def _grid(
    d: Diagram,
    left: float,
    bottom: float,
    rows: int,
    columns: int,
    width: float,
    height: float,
    words: bool = True,
    **marked: int,
) -> None:
    """Draw tiles as a grid; those of the marked `row` or `column` are shaded, and numbered with `words`."""
    face, edge, *_ = LOOK["tensor"]
    for r in range(rows):
        for c in range(columns):
            hit = marked.get("row") == r or marked.get("column") == c
            corner = (left + c * width, bottom + (rows - 1 - r) * height)
            fill, line = (LOOK["cache"][0], STRONG) if hit else (face, edge)
            tile = Rectangle(corner, width, height, fc=fill, ec=line, lw=1.6 if hit else 0.7, zorder=3 + hit)
            d.axes.add_patch(tile)
            number = c + 1 if "row" in marked else r + 1
            if hit and words and number <= 3:
                name = f"{'tile' if 'row' in marked else 'block'} {number}"
                place = corner[0] + width / 2, corner[1] + height / 2
                d.axes.text(*place, name, size=7.4, color=INK, ha="center", va="center", zorder=5)
