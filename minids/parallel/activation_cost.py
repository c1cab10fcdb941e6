"""Formula of the activations that a layer keeps for its backward pass: everything in BF16, or what V3 keeps.

Notable choices:
- V3 recomputes every RMSNorm, the up-projections of MLA and the output of SwiGLU (V3 section 3.2.3), keeps the inputs
  of experts and of SwiGLU in FP8, and attention's output in 12 bits (V3 section 3.3.3; FACTS.md section 5);
- only the large tensors are counted: no scales of FP8, softmax statistics, routing, embedding, output head or MTP.

`activations.py` counts what this package's own code keeps, which recomputes nothing.
"""

from minids.config import ModelConfig, require
from minids.parallel.schedule import Schedule, peak_activations

BF16, E5M6, FP8 = 2.0, 1.5, 1.0  # bytes per value


def kept_bytes_per_token(config: ModelConfig, *, dense: bool = False, as_v3: bool = False) -> dict[str, float]:
    """Return the bytes per token that a layer keeps, by tensor: all of it in BF16, or as V3 does.

    A `dense` layer has a dense feed-forward instead of experts. Raises `ValueError` for attention other than MLA.
    """
    require(config.attention == "mla", "attention", config.attention, "the formula is that of mla")
    d, heads, value_dim = config.hidden_size, config.num_attention_heads, config.v_head_dim
    ranks, experts = (config.q_lora_rank or 0) + config.kv_lora_rank, config.num_experts_per_tok
    inner = (experts + config.n_shared_experts) * config.moe_intermediate_size
    if dense:
        experts, inner = 0, config.intermediate_size
    recomputed, in_fp8, in_12_bits = (0.0, FP8, E5M6) if as_v3 else (BF16, BF16, BF16)
    return {
        "residual stream": 2 * d * BF16,
        "RMSNorm outputs": (2 * d + ranks) * recomputed,
        "latents": (ranks + config.qk_rope_head_dim) * BF16,
        "queries, keys, values": heads * (2 * config.qk_head_dim + value_dim) * recomputed,
        "attention output": heads * value_dim * in_12_bits,
        "expert inputs": experts * d * in_fp8,
        "gate and up": 2 * inner * in_fp8,
        "SwiGLU output": inner * recomputed,
    }


def kept_bytes(config: ModelConfig, tokens: int, schedule: Schedule | None, *, as_v3: bool = False) -> float:
    """Return the peak bytes of the fullest rank in a step with micro-batches of `tokens` tokens."""
    dense, moe = (sum(kept_bytes_per_token(config, dense=kind, as_v3=as_v3).values()) for kind in (True, False))
    layers = [dense] * config.first_k_dense_replace + [moe] * config.num_moe_layers
    if schedule is None:
        return tokens * sum(layers)
    ends = [len(layers) * i // schedule.stages for i in range(schedule.stages + 1)]
    stages = [round(tokens * sum(layers[ends[i] : ends[i + 1]])) for i in range(schedule.stages)]
    return max(peak_activations(actions, lambda stage: stages[stage]) for actions in schedule.actions)
