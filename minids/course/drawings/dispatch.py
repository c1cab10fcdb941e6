"""Dispatch and combine: the path of one token to its experts, over InfiniBand once per node, then over NVLink."""

from minids.config import ModelConfig
from minids.course.diagrams import Diagram

IB, NVLINK = 50, 160  # GB/s for each GPU (FACTS.md section 6.2)
GPUS, EXPERTS = 8, 4  # in a node, and of a layer on a GPU: EP64 (FACTS.md section 3)
BYTES = 3  # per channel: FP8 in dispatch, BF16 in combine


def dispatch(config: ModelConfig | None = None, gpu: int = 1) -> Diagram:
    """Draw the copies of a token of `gpu`, with the same number of experts in each of the nodes that it may reach."""
    c = config or ModelConfig.preset("v3")
    nodes, k = c.topk_group, c.num_experts_per_tok
    each = k // nodes
    before, after = (copies * BYTES * c.hidden_size / IB / 1e3 for copies in (k, nodes))  # microseconds
    title = f"A token crosses InfiniBand once per node: {nodes} copies in place of {k}, "
    title += f"{after:.1f} µs a layer in place of {before:.1f}"
    d = Diagram(17.2, 9.9, title)
    d.box("token", 8.6, 0.8, f"a token on node 0, GPU {gpu}", f"{c.hidden_size:,} channels", "tensor", 5.2, 1.0)
    width = 17.0 / nodes
    for n in range(nodes):
        left = 0.2 + width * n
        middle = left + width / 2 - 0.1
        first = (n + 1) * GPUS * EXPERTS
        d.frame(left, 4.6, left + width - 0.2, 9.6, f"node {n + 1}: experts {first} to {first + GPUS * EXPERTS - 1}")
        d.box(f"land {n}", middle, 5.5, f"GPU {gpu}", "forwards", "device", 2.2, 0.9)
        d.path([(8.0, 1.3), (8.0, 2.55), (middle - 0.4, 2.55), (middle - 0.4, 5.05)], strong=True)
        d.path([(middle + 0.4, 5.05), (middle + 0.4, 3.4), (9.2, 3.4), (9.2, 1.3)], dashed=True)
        targets = sorted((gpu + 1 + (n + 3 * e) % (GPUS - 1)) % GPUS for e in range(each))
        for e, target in enumerate(targets):
            expert = first + target * EXPERTS + (n + 2 * e) % EXPERTS
            x = middle + (e - (each - 1) / 2) * 1.95
            d.box(f"expert {n} {e}", x, 8.2, f"GPU {target}", f"expert {expert}", "weight", 1.75, 0.9)
            d.arrow(f"land {n}", f"expert {n} {e}", bend=6.8)
    groups = c.n_group
    rest = ", ".join(str(n) for n in range(nodes + 1, groups))
    d.box("rest", 15.1, 0.8, f"nodes 0, {rest}", "not chosen: nothing sent", "idle", 4.0, 1.0)
    d.note(0.4, 6.35, f"NVLink,\n{NVLINK} GB/s")
    d.note(9.5, 2.15, f"dispatch: FP8, InfiniBand, {IB} GB/s, to the GPU of the same number", strong=True)
    d.note(9.5, 1.7, "combine: the same path back, BF16; a node adds up its experts first")
    rule = f"rule: at most {nodes} of {groups} nodes,\nthose with the highest sums of\ntheir best {each} affinities"
    d.note(0.3, 1.15, rule)
    return d
