"""The device mesh of a run: which rank holds which experts, other weights and optimizer states."""

from minids.config import ModelConfig
from minids.course.diagrams import Diagram, Role
from minids.parallel.layout import Layout


def mesh(layout: Layout | None = None, config: ModelConfig | None = None) -> Diagram:
    """Draw the ranks of a layout with a pipeline (ZeRO-1), a row per pipeline rank; marked: what equals rank 0's."""
    layout = layout or Layout(pp=2, dp=2, ep=2)
    c = config or ModelConfig.preset("nano", num_hidden_layers=4)
    columns, own = layout.replicas, c.n_routed_experts // layout.ep
    equal = f"{layout.dp} of {layout.world} ranks hold rank 0's experts, {columns} its other weights"
    title = f"{equal}, 1 its optimizer states"
    row, above = 4.7, 1.9  # heights: of a row of ranks with the gap under it, and of the arrows over the first row
    d = Diagram(17.2, row * layout.pp + above, title)
    width = 17.0 / columns
    for rank in range(layout.world):
        pp, rest = divmod(rank, columns)
        dp, ep = divmod(rest, layout.ep)
        left, top = 0.2 + width * rest, 0.6 + row * (layout.pp - pp)
        middle, size = left + width / 2 - 0.1, width - 0.6
        d.frame(left, top - 3.95, left + width - 0.2, top, f"rank {rank}: pp {pp}, dp {dp}, ep {ep}")
        roles: list[Role] = ["here" if pp == 0 and ep == 0 else "weight", "here" if pp == 0 else "weight", "cache"]
        layers = f"layers of pp {pp}"
        experts = f"experts {own * ep} to {own * (ep + 1) - 1}"
        d.box(f"{rank} experts", middle, top - 0.95, experts, layers, roles[0], size, 0.85)
        d.box(f"{rank} others", middle, top - 2.05, "all other weights", layers, roles[1], size, 0.85)
        d.box(f"{rank} states", middle, top - 3.3, "optimizer states", "", roles[2], size, 0.55)
        shares = f"for 1/{layout.dp} of the experts, 1/{columns} of the rest"
        d.note(middle, top - 2.76, shares, align="center", size=7.4)
    first, top = 0.1 + width / 2, 0.6 + row * layout.pp
    if layout.ep > 1:
        d.path([(first, top), (first, top + 0.45), (first + width, top + 0.45), (first + width, top)])
        d.note(first + 0.2, top + 0.72, "ep: tokens, to and from experts")
    if layout.dp > 1:
        start, end = first - 0.5, first + width * layout.ep
        d.path([(start, top), (start, top + 1.1), (end, top + 1.1), (end, top)])
        d.note(end - 0.2, top + 1.35, "dp: gradients of experts", align="right")
    if layout.pp > 1:
        d.path([(first, top - 3.95), (first, top - row)])
        d.note(first + 0.2, top - 4.32, "pp: activations")
    d.note(
        0.3,
        0.28,
        "marked: the same weights as on rank 0, so gradients are added. Arrows: what rank 0 exchanges with whom",
    )
    return d
