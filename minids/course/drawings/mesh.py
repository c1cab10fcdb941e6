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
    d = Diagram(17.2, 0.7 + 4.1 * layout.pp, title)
    width = 17.0 / columns
    for rank in range(layout.world):
        pp, rest = divmod(rank, columns)
        dp, ep = divmod(rest, layout.ep)
        left, top = 0.2 + width * rest, 0.6 + 4.1 * (layout.pp - pp)
        middle, size = left + width / 2 - 0.1, width - 0.6
        d.frame(left, top - 3.95, left + width - 0.2, top, f"rank {rank}: pp {pp}, dp {dp}, ep {ep}")
        roles: list[Role] = ["here" if pp == 0 and ep == 0 else "weight", "here" if pp == 0 else "weight", "cache"]
        layers = f"stages of pp {pp}"
        experts = f"experts {own * ep} to {own * (ep + 1) - 1}"
        d.box(f"{rank} experts", middle, top - 0.95, experts, layers, roles[0], size, 0.85)
        d.box(f"{rank} others", middle, top - 2.05, "all other weights", layers, roles[1], size, 0.85)
        d.box(f"{rank} states", middle, top - 3.3, "optimizer states", "", roles[2], size, 0.55)
        shares = f"1/{layout.dp} of experts', 1/{columns} of others'"
        d.note(middle, top - 2.76, shares, align="center", size=7.4)
    d.note(
        0.3, 0.28, "marked: the same weights as on rank 0, so gradients are added; each rank of a row reads other text"
    )
    return d
