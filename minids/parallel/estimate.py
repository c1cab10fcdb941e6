"""Estimate the time and the memory of a training step on GPUs that are not there, from config, layout and recipe.

The assumptions of `step_seconds`, each of which a real cluster breaks a little:
- all stages of the pipeline take equally long, a backward twice a forward, its weight half as long as a forward;
- while it computes, a GPU reaches a constant share of its peak, whatever the layout;
- the experts are evenly loaded; a token is sent to as many nodes as routing allows, and its own is not among them;
- in a pipeline the exchanges with experts and between stages are hidden completely, without one not at all;
- gradients and weights are exchanged once per step, after all computation; the optimizer itself takes no time.
"""

from dataclasses import dataclass

from minids import cost
from minids.config import ModelConfig
from minids.parallel.activation_cost import kept_bytes
from minids.parallel.layout import Layout
from minids.parallel.plan import parameters_per_rank
from minids.training.pretrain import Recipe

FP8_AND_BF16 = 3  # bytes per channel: FP8 there and BF16 back (V3 section 3.3)


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links; the defaults are V3's H800 (V3 section 3.2.2; FACTS.md section 7.2)."""

    utilisation: float
    """Share of the peak that a GPU reaches while it computes."""
    peak_flops: float = cost.H800_PEAK_FLOPS
    gpus_per_node: int = 8
    bytes_within_node: float = 160e9
    """Per second and GPU, over NVLink."""
    bytes_between_nodes: float = 50e9
    """Per second and GPU, over InfiniBand."""


def step_seconds(config: ModelConfig, layout: Layout, recipe: Recipe, cluster: Cluster) -> dict[str, float]:
    """Return the seconds of a step by cause: computation, bubble, exposed exchange with experts, exchange of data.

    Raises `ValueError` for an impossible layout.
    """
    layout.check(config, recipe, layout.world)
    tokens = recipe.batch_size * recipe.seq_len / layout.world
    flops = cost.training_flops_per_token(config, recipe.seq_len)
    computation, bubble = tokens * flops / (cluster.utilisation * cluster.peak_flops), 0.0
    if layout.pp > 1:
        timeline = layout.pipeline(recipe).simulate()
        idle = max(timeline.bubble) / timeline.makespan
        bubble = computation * idle / (1 - idle)
    experts = link_seconds(config, layout, recipe, cluster)["experts"] if layout.pp == 1 else 0.0
    data = link_seconds(config, layout, recipe, cluster)["data"]
    return {"computation": computation, "bubble": bubble, "experts, exposed": experts, "gradients, weights": data}


def link_seconds(config: ModelConfig, layout: Layout, recipe: Recipe, cluster: Cluster) -> dict[str, float]:
    """Return the seconds of a step that a GPU's link is busy, by axis: experts (ep), stages (pp) and data (dp).

    Rows go to experts in FP8 and return in BF16; between stages the residual stream is BF16; gradients are scattered in
    FP32, and new weights gathered in BF16.
    """
    rank_tokens = recipe.batch_size * recipe.seq_len / layout.replicas
    within = layout.ep <= cluster.gpus_per_node
    nodes = layout.ep // cluster.gpus_per_node
    copies = config.num_experts_per_tok * (1 - 1 / layout.ep) if within else min(config.topk_group, nodes)
    link = cluster.bytes_within_node if within else cluster.bytes_between_nodes
    rows = rank_tokens * config.num_moe_layers / layout.pp * copies
    count = parameters_per_rank(layout, config, recipe)
    away = {"experts": 1 - 1 / layout.dp, "others": 1 - 1 / layout.replicas}
    return {
        "experts": 2 * rows * FP8_AND_BF16 * config.hidden_size / link,
        "stages": (layout.pp > 1) * rank_tokens * config.hidden_size * 2 * 4 / cluster.bytes_between_nodes,
        "data": sum((4 + 2) * count[part] * away[part] for part in count) / cluster.bytes_between_nodes,
    }


def memory_bytes(
    config: ModelConfig, layout: Layout, recipe: Recipe, stage: int = 1, *, as_v3: bool = True
) -> dict[str, float]:
    """Return the bytes on the fullest GPU: weights, gradients, optimizer (ZeRO `stage`; V3's bytes), activations.

    `as_v3`: the activations are those that V3 keeps; otherwise all of them, in BF16.
    """
    count = parameters_per_rank(layout, config, recipe)
    sharded = ((count["experts"], layout.dp), (count["others"], layout.replicas))
    parts = [cost.zero_bytes_per_gpu(n, ranks, stage) for n, ranks in sharded if n]
    state = {name: sum(part[name] for part in parts) for name in parts[0]}
    pipeline, rows = layout.pipeline(recipe) if layout.pp > 1 else None, recipe.batch_size // layout.replicas
    micro = rows // pipeline.micro_batches if pipeline else min(recipe.micro_batch_size or rows, rows)
    return state | {"activations": kept_bytes(config, micro * recipe.seq_len, pipeline, as_v3=as_v3)}
