"""Dispatch and combine: the way of one token to its experts, over InfiniBand once per node, then over NVLink."""

from minids.config import ModelConfig
from minids.course.diagrams import Diagram

IB, NVLINK = 50, 160  # GB/s for each GPU (FACTS.md section 6.2)
GPUS, EXPERTS = 8, 4  # in a node, and of a layer on a GPU: EP64 (FACTS.md section 3)


def dispatch(config: ModelConfig | None = None, gpu: int = 1) -> Diagram:
    """Draw the copies of a token of `gpu`, with the same number of experts in each of the nodes that it may reach."""
    c = config or ModelConfig.preset("v3")
    nodes, k = c.topk_group, c.num_experts_per_tok
    each = k // nodes
    title = f"A token crosses InfiniBand once per node, for {k} experts at most {nodes} times"
    d = Diagram(17.2, 8.4, title)
    d.box("token", 8.6, 0.8, f"a token on node 0, GPU {gpu}", f"{c.hidden_size:,} channels, FP8", "tensor", 5.2, 1.0)
    width = 17.0 / nodes
    for n in range(nodes):
        left = 0.2 + width * n
        middle = left + width / 2 - 0.1
        d.frame(left, 3.3, left + width - 0.2, 8.1, f"node {n + 1}: {GPUS} GPUs")
        d.box(f"land {n}", middle, 4.2, f"GPU {gpu}", "forwards", "device", 2.0, 0.9)
        d.path([(8.6, 1.3), (8.6, 2.1), (middle, 2.1), (middle, 3.75)], strong=True)
        targets = sorted((gpu + 1 + (n + 3 * e) % (GPUS - 1)) % GPUS for e in range(each))
        for e, target in enumerate(targets):
            expert = (n + 1) * GPUS * EXPERTS + target * EXPERTS + (n + 2 * e) % EXPERTS
            x = middle + (e - (each - 1) / 2) * 1.95
            d.box(f"expert {n} {e}", x, 6.9, f"GPU {target}", f"expert {expert}", "weight", 1.75, 0.9)
            d.arrow(f"land {n}", f"expert {n} {e}", bend=5.5)
    d.note(9.0, 1.75, f"InfiniBand, {IB} GB/s: to the GPU of the same number", strong=True)
    d.note(0.4, 5.05, f"NVLink,\n{NVLINK} GB/s")
    d.note(0.4, 1.0, "combine: the same way back, in BF16;\neach node adds its experts up first")
    return d
