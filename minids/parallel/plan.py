"""Plan of a parallel run: batch, parameters, memory and schedule per rank, computed before any memory is allocated."""

import functools

import torch

from minids import cost
from minids.config import ModelConfig
from minids.model.moe import Experts
from minids.model.transformer import MiniDS
from minids.parallel.activation_cost import kept_bytes
from minids.parallel.activations import activation_bytes
from minids.parallel.layout import Layout
from minids.parallel.pipeline import stages_of_rank
from minids.training.pretrain import Recipe


def plan(layout: Layout, config: ModelConfig, recipe: Recipe, device: str) -> str:
    """Return the plan of a run as text; nothing is allocated."""
    count = parameters_per_rank(layout, config, recipe)
    stage, moments = (3 if layout.pp == 1 else 1), (4 if recipe.moments == "bf16" else 8)
    shares = ((count["experts"], layout.dp), (count["others"], layout.replicas))
    parts = [cost.zero_bytes_per_gpu(n, ranks, stage, 4, 4, moments) for n, ranks in shares if n]
    state = {name: sum(part[name] for part in parts) for name in parts[0]}
    rows = recipe.batch_size // layout.replicas
    pipeline = layout.pipeline(recipe) if layout.pp > 1 else None
    micro = rows // pipeline.micro_batches if pipeline else min(recipe.micro_batch_size or rows, rows)
    kept = activation_bytes(config, recipe, micro, pipeline, layout.ep)
    lines = [
        f"plan: {layout.world} processes on {device}: {layout}",
        f"  batch      {recipe.batch_size} x {recipe.seq_len} tokens; {rows} rows per rank, {micro} at a time",
        f"  parameters {sum(count.values()):,} at most on a rank before sharding, {count['experts']:,} in experts",
        f"  memory     {_size(sum(state.values()))} on the fullest device, computed: "
        + ", ".join(f"{name} {_size(value)}" for name, value in state.items())
        + f"; plus activations: {_size(kept)} where experts are evenly loaded",
    ]
    if recipe.precision == "fp8" and config.attention == "mla":
        recomputed = kept_bytes(config, micro * recipe.seq_len, pipeline, as_v3=True)
        lines.append(f"  recompute  as V3 does, activations would take {_size(recomputed)} (a formula; not built here)")
    if pipeline:
        timeline = pipeline.simulate()
        idle = max(timeline.bubble) / timeline.makespan
        lines.append(f"  schedule   {pipeline.name}, {pipeline.stages} stages; {pipeline.micro_batches} micro-batches ")
        lines[-1] += f"leave a rank idle for {idle:.0%} of the time, if a backward takes twice the time of a forward"
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def parameters_per_rank(layout: Layout, config: ModelConfig, recipe: Recipe) -> dict[str, int]:
    """Return the parameters of the fullest rank before FSDP shards them: {"experts": ..., "others": ...}."""
    model = _on_meta(config)
    schedule = layout.pipeline(recipe) if layout.pp > 1 else None
    counts = []
    for rank in range(layout.pp):
        parts = stages_of_rank(model, rank, schedule)
        experts = {p for part in parts for m in part.modules() if isinstance(m, Experts) for p in m.parameters()}
        others = {p for part in parts for p in part.parameters()} - experts
        sizes = (sum(p.numel() for p in group) for group in (experts, others))
        counts.append(dict(zip(("experts", "others"), sizes, strict=True)))
    fullest = max(counts, key=lambda count: count["experts"] / layout.ep + count["others"])
    return {"experts": fullest["experts"] // layout.ep, "others": fullest["others"]}


@functools.lru_cache(maxsize=4)
def _on_meta(config: ModelConfig) -> MiniDS:
    """Build the model without memory; it is only read, and takes seconds for a large one."""
    with torch.device("meta"):
        return MiniDS(config)
