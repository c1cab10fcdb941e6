"""Hyper-connections: several residual streams, of which a sublayer reads a mixture, and to all of which it writes."""

from minids.course.diagrams import Diagram, shape

PRIME = "\u2032"  # as a character: matplotlib writes the apostrophe of a formula in a font that browsers do not have


def hyper_connections(streams: int = 4, width: int = 7168, iterations: int = 20) -> Diagram:
    """Draw one site of manifold hyper-connections: x' = H_res x + H_post^T F(H_pre x)."""
    d = Diagram(17.2, 8.0, f"{streams} residual streams: read as one, mixed without growing, written to all")
    gap = 0.95
    low, high = 1.0, 1.0 + gap * (streams - 1)
    ys = [high - gap * i for i in range(streams)]  # the first stream is at the top
    middle = (low + high) / 2
    d.frame(0.3, low - 0.75, 2.9, high + 0.9, "streams x")
    d.frame(14.3, low - 0.75, 16.9, high + 0.9, f"streams x{PRIME}")
    for i, y in enumerate(ys):
        d.box(f"x{i}", 1.6, y, f"$x_{i + 1}$", "", "tensor", 1.9, 0.6)
        d.box(f"y{i}", 15.6, y, f"$x{PRIME}_{i + 1}$", "", "tensor", 1.9, 0.6)
    d.box("mix", 8.6, middle, "$H_{res}$", shape(streams, streams), "weight", 2.6, 1.6)
    d.note(6.0, low - 0.35, f"rows and columns sum to 1: Sinkhorn, {iterations} iterations")
    for y in ys:
        d.path([(2.6, y), (7.2, middle + (y - middle) * 0.25)])
        d.path([(10.0, middle + (y - middle) * 0.25), (14.55, y)])
    top = high + 2.2
    d.box("pre", 4.4, top, "$H_{pre}$", f"{streams} weights, 0 to 1", "weight", 2.8)
    d.box("layer", 8.6, top, "norm, attention or FFN", shape(width), "operation", 4.2)
    d.box("post", 13.0, top, "$H_{post}$", f"{streams} weights, 0 to 2", "weight", 2.8)
    d.path([(1.6, high + 0.9), (1.6, top), (3.0, top)])
    d.arrow("pre", "layer", "sum")
    d.arrow("layer", "post")
    d.path([(14.4, top), (15.6, top), (15.6, high + 0.9)])
    d.note(14.55, top + 0.45, "added to all")
    d.note(3.0, top + 0.85, "all three are computed from the streams, for each token")
    return d
