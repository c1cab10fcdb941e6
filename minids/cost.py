"""Costs of a model: parameters, FLOPs, KV cache, GPU-hours, dollars, memory, communication time.

Notable choices:
- each function is one formula; its unit is in its name or docstring, its source in the heading of its section;
- `formula` validates inputs by their annotations: a negative, zero or impossible value raises a one-line `ValueError`;
- a dense model of the Llama or Qwen kind is a `ModelConfig` too, so every formula applies to both kinds;
- a multiply-add is 2 FLOPs; K, M, G, T are powers of ten; a year has 365 days.
"""

import functools
import inspect
import math
from collections.abc import Callable
from json import loads
from pathlib import Path
from typing import Any, Literal

from minids.config import PRESETS, ModelConfig
from minids.hf_config import DENSE_TYPES
from minids.validation import Fraction, check_value, require

Schedule = Literal["one_f_one_b", "zb1p", "dualpipe"]

H800_PEAK_FLOPS = 989.5e12  # per second, dense BF16 (FACTS.md section 12)
V3_GPU_HOURS = {"pre-training": 2664e3, "context extension": 119e3, "post-training": 5e3}  # on H800; V3 Table 1
R1_GPU_HOURS = {"R1-Zero": 101e3, "SFT data": 5e3, "R1": 41e3}  # on H800; R1, arXiv v2 Table 7


def formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """Validate inputs: `float` finite and above 0, `int` also whole, `Fraction` also at most 1, `Literal` a choice."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            check_value(name, value, signature.parameters[name].annotation)
            if isinstance(value, ModelConfig):
                require(value.attention in ("mla", "gqa"), "attention", value.attention, "only mla and gqa are counted")
        return function(*args, **kwargs)

    return checked


# Parameters (FACTS.md section 1.1) ---------------------------------------------------------------------------------


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of one layer's attention, without norms; with sparse attention also the indexer's."""
    d, heads, value_dim = config.hidden_size, config.num_attention_heads, config.v_head_dim
    if config.attention == "gqa":
        return 2 * d * (heads + config.num_key_value_heads) * value_dim
    query_width, q_rank, kv_rank = heads * config.qk_head_dim, config.q_lora_rank, config.kv_lora_rank
    query = d * query_width if q_rank is None else q_rank * (d + query_width)
    key_value = d * (kv_rank + config.qk_rope_head_dim) + kv_rank * heads * (config.qk_nope_head_dim + value_dim)
    return query + key_value + heads * value_dim * d + indexer_parameters(config)


def indexer_parameters(config: ModelConfig, *, norm: bool = False) -> int:
    """Parameters of one layer's indexer (V3.2), with `norm` also those of the LayerNorm of its key; 0 without one."""
    heads, dim = config.index_n_heads, config.index_head_dim
    count = (config.q_lora_rank or 0) * heads * dim + config.hidden_size * (dim + heads) + norm * 2 * dim
    return count if config.index_topk else 0


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one expert, routed or shared."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def parameters(config: ModelConfig, *, active: bool = False) -> dict[str, int]:
    """Parameters of the main model by part; with `active`, only the routed experts that one token uses are counted."""
    d, layers, moe_layers = config.hidden_size, config.num_hidden_layers, config.num_moe_layers
    experts = config.num_experts_per_tok if active else config.n_routed_experts
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank if config.attention == "mla" else 0
    latents += indexer_parameters(config, norm=True) - indexer_parameters(config)
    return {
        "embedding": config.vocab_size * d,
        "attention": layers * attention_parameters(config),
        "dense_ffn": config.first_k_dense_replace * 3 * d * config.intermediate_size,
        "router": moe_layers * config.n_routed_experts * d,
        "balance_bias": moe_layers * config.n_routed_experts * config.selects_with_bias,
        "shared_experts": moe_layers * config.n_shared_experts * expert_parameters(config),
        "routed_experts": moe_layers * experts * expert_parameters(config),
        "norms": layers * (2 * d + latents) + d,
        "head": config.vocab_size * d,
    }


def num_parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters of the main model, with embedding and head, without MTP modules."""
    return sum(parameters(config, active=active).values())


def matmul_parameters(config: ModelConfig) -> int:
    """Active parameters in matrix products of one token; the embedding is a lookup and not counted."""
    part = parameters(config, active=True)
    return sum(part.values()) - part["embedding"] - part["norms"] - part["balance_bias"]


def mtp_parameters(config: ModelConfig) -> int:
    """Parameters of the MTP modules: each has one layer, a projection from 2 * hidden_size, and three norms."""
    d, dense_layers = config.hidden_size, config.first_k_dense_replace + (config.num_moe_layers == 0)
    deeper = config.replace(num_hidden_layers=config.num_hidden_layers + 1, first_k_dense_replace=dense_layers)
    layer = num_parameters(deeper) - num_parameters(config)
    return config.num_nextn_predict_layers * (layer + 2 * d * d + 3 * d)


# FLOPs per token (FACTS.md sections 2 and 7.2), and the cache (section 2.1) ----------------------------------------


def attention_flops_per_key(config: ModelConfig, *, absorbed: bool = False) -> int:
    """FLOPs per query and key in one layer, all heads: the score, and the term of the weighted sum of values."""
    if config.attention == "gqa":
        widths = 2 * config.v_head_dim
    elif absorbed:
        widths = (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
    else:
        widths = config.qk_head_dim + config.v_head_dim
    return 2 * config.num_attention_heads * widths


def indexer_flops_per_key(config: ModelConfig) -> int:
    """FLOPs per query and key of one layer's indexer: the products of its heads, without their weighted sum."""
    return 0 if config.index_topk is None else 2 * config.index_n_heads * config.index_head_dim


@formula
def prefill_flops_per_token(config: ModelConfig, seq_len: float, *, causal: bool = True) -> float:
    """Mean FLOPs per token of a forward pass with logits at all positions.

    A causal query attends to half of the sequence on average; `causal=False` counts all of it. Sparse attention takes
    the cheaper of two forms: absorbed over the chosen keys, or expanded over all of them with a mask.
    """
    keys = seq_len / 2 if causal else seq_len
    attention = attention_flops_per_key(config) * keys
    if config.index_topk is not None:
        chosen = min(config.index_topk, seq_len)
        chosen -= chosen**2 / (2 * seq_len) if causal else 0  # the first queries see fewer
        absorbed = attention_flops_per_key(config, absorbed=True) * chosen
        attention = indexer_flops_per_key(config) * keys + min(attention, absorbed)
    return 2 * matmul_parameters(config) + config.num_hidden_layers * attention


@formula
def decode_flops_per_token(config: ModelConfig, keys: float) -> float:
    """FLOPs of one token with `keys` cached tokens.

    MLA is in the absorbed form: the same FLOPs per token as expanded, more per key.
    """
    attention = attention_flops_per_key(config, absorbed=True) * min(keys, config.index_topk or math.inf)
    attention += indexer_flops_per_key(config) * keys
    return 2 * matmul_parameters(config) + config.num_hidden_layers * attention


def sparse_break_even_tokens(config: ModelConfig, *, prefill: bool = False) -> float:
    """Context length from which sparse attention takes fewer FLOPs than dense attention, without the projections.

    Decoding compares both in the absorbed form. `prefill` compares absorbed attention over `index_topk` keys per query
    with the expanded form over half of the keys on average. Raises `ValueError` for dense attention.
    """
    require(config.index_topk is not None, "index_topk", None, "dense attention has no break-even length")
    chosen = attention_flops_per_key(config, absorbed=True) * (config.index_topk or 0)
    saved = attention_flops_per_key(config, absorbed=not prefill) - indexer_flops_per_key(config)  # per key
    return chosen / (saved / 2 if prefill else saved)


def training_flops_per_token(config: ModelConfig, seq_len: float, *, causal: bool = True) -> float:
    """FLOPs per token of a forward and a backward pass of the main model; backward counts as two forward passes."""
    return 3 * prefill_flops_per_token(config, seq_len, causal=causal)


def kv_values_per_layer(config: ModelConfig) -> int:
    """Values cached per token and layer (V2 Table 1). MHA is GQA with one key per head, MQA with one key for all."""
    if config.attention == "gqa":
        return 2 * config.num_key_value_heads * config.v_head_dim
    return config.kv_lora_rank + config.qk_rope_head_dim + (config.index_head_dim if config.index_topk else 0)


@formula
def kv_bytes_per_token(config: ModelConfig, bits: float = 16) -> float:
    """KV cache of all layers of the main model in bytes per token, at `bits` per value."""
    return config.num_hidden_layers * kv_values_per_layer(config) * bits / 8


def fp8_kv_bytes_per_token(config: ModelConfig) -> int:
    """KV cache of mla in bytes per token as FlashMLA has it: FP8, an FP32 scale per 128 values, rotated key in BF16."""
    require(config.attention == "mla", "attention", config.attention, "only the cache of mla has this layout")
    widths = (config.kv_lora_rank, config.index_head_dim if config.index_topk else 0)
    in_fp8 = sum(values + 4 * math.ceil(values / 128) for values in widths)
    return config.num_hidden_layers * (in_fp8 + 2 * config.qk_rope_head_dim)


# Time and money (FACTS.md sections 7, 8.5 and 11) ------------------------------------------------------------------


@formula
def tokens_per_day(tokens_per_step: float, seconds_per_step: float) -> float:
    """Tokens that a training run processes in 24 hours."""
    return tokens_per_step / seconds_per_step * 86400


@formula
def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float = H800_PEAK_FLOPS) -> float:
    """Model FLOPs utilisation of one GPU at `tokens_per_second`; `peak_flops` is per second."""
    share = tokens_per_second * flops_per_token / peak_flops
    require(share <= 1, "mfu", share, "no GPU exceeds its peak")
    return share


@formula
def gpu_hours_by_throughput(tokens: float, tokens_per_second: float) -> float:
    """GPU-hours to train on `tokens` at `tokens_per_second` per GPU."""
    return tokens / tokens_per_second / 3600


@formula
def gpu_hours_by_mfu(total_flops: float, utilisation: Fraction, peak_flops: float = H800_PEAK_FLOPS) -> float:
    """GPU-hours for `total_flops` (tokens * FLOPs per token) at `utilisation` of `peak_flops` per second."""
    return total_flops / (utilisation * peak_flops) / 3600


@formula
def rent_usd(gpu_hours: float, usd_per_gpu_hour: float = 2) -> float:
    """Rental cost in US dollars."""
    return gpu_hours * usd_per_gpu_hour


@formula
def owned_usd_per_gpu_hour(
    capital_usd: float, years: float, kilowatts: float, usd_per_kilowatt_hour: float, utilisation: Fraction
) -> float:
    """Cost of an hour of use of an owned GPU in US dollars: linear depreciation, and power, drawn also when idle."""
    return (capital_usd / (years * 365 * 24) + kilowatts * usd_per_kilowatt_hour) / utilisation


@formula
def margin(revenue_usd: float, cost_usd: float) -> float:
    """Profit divided by cost."""
    return revenue_usd / cost_usd - 1


# Memory, pipeline and links (FACTS.md sections 5, 6 and 7.4) -------------------------------------------------------


@formula
def zero_bytes_per_gpu(
    count: float, gpus: int, stage: Literal[0, 1, 2, 3], weight: float = 2, gradient: float = 4, optimizer: float = 8
) -> dict[str, float]:
    """Bytes per GPU of `count` parameters. ZeRO stage 1 shards optimizer states, 2 also gradients, 3 also weights.

    The defaults are bytes per parameter: BF16 weight 2, FP32 gradient 4, and as in V3 FP32 master weight 4 plus BF16
    moments 4.
    """
    bytes_and_stage = {"weights": (weight, 3), "gradients": (gradient, 2), "optimizer": (optimizer, 1)}
    return {k: count * size / (gpus if stage >= first else 1) for k, (size, first) in bytes_and_stage.items()}


BUBBLES: dict[Schedule, Callable[..., float]] = {  # V3 Table 2
    "one_f_one_b": lambda stages, F, B, W, FB: (stages - 1) * (F + B),
    "zb1p": lambda stages, F, B, W, FB: (stages - 1) * (F + B - 2 * W),
    "dualpipe": lambda stages, F, B, W, FB: (stages / 2 - 1) * (FB + B - 3 * W),
}


@formula
def pipeline_bubble(schedule: Schedule, stages: int, F: float = 1, B: float = 2, W: float = 1, FB: float = 3) -> float:
    """Idle time per rank and step, in the unit of the given times (V3 Table 2; DualPipeV has DualPipe's).

    F: time of a forward; B: of a full backward; W: its part for weight gradients; FB: of an overlapped forward and
    backward.
    """
    require(W < B, "W", W, f"must be less than the backward B={B}, which includes it")
    require(schedule != "dualpipe" or stages % 2 == 0, "stages", stages, "must be even for dualpipe")
    bubble = BUBBLES[schedule](stages, F, B, W, FB)
    require(bubble >= 0, "W", W, "must be smaller: the bubble would be negative")
    return bubble


@formula
def expert_link_seconds(tokens: float, copies: float, bytes_per_copy: float, bytes_per_second: float) -> float:
    """Seconds of one layer's dispatch and combine of `tokens`; FP8 dispatch and BF16 combine: 3 bytes per channel."""
    return tokens * copies * bytes_per_copy / bytes_per_second


@formula
def decode_bound(link_seconds: float, layers: int) -> float:
    """Upper bound of tokens per second and user, if two micro-batches alternate on the links (ISCA section 2.3.2)."""
    return 1 / (2 * link_seconds * layers)


# Reading and reporting ---------------------------------------------------------------------------------------------

DENSE_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def dense_config(fields: dict[str, Any]) -> ModelConfig:
    """Read the `config.json` of a dense model of DENSE_TYPES; biases (0.001 % of Qwen2.5-72B) are ignored.

    Raises `ValueError` for tied embeddings, sliding-window attention and missing fields.
    """
    shape: dict[str, Any] = {name: fields.get(name) for name in DENSE_FIELDS}
    for name, value in shape.items():
        require(type(value) is int and value > 0, name, value, "must be a whole number, at least 1")
    require(not fields.get("tie_word_embeddings"), "tie_word_embeddings", True, "tied embeddings are not supported")
    window = fields.get("use_sliding_window", True) and fields.get("sliding_window")
    require(not window, "sliding_window", window, "sliding-window attention is not supported")
    shape["num_key_value_heads"] = fields.get("num_key_value_heads") or shape["num_attention_heads"]
    shape["v_head_dim"] = fields.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    shape["first_k_dense_replace"] = shape["num_hidden_layers"]
    return ModelConfig(attention="gqa", num_nextn_predict_layers=0, **shape)


def read_config(name: str) -> ModelConfig:
    """Read a preset, or the `config.json` (or its folder) of a DeepSeek-V2, V3, V3.2 or dense model.

    Raises `ValueError` for anything else.
    """
    if name in PRESETS:
        return ModelConfig.preset(name)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        fields = loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name!r}: neither a preset ({', '.join(PRESETS)}) nor a config.json: {error}") from None
    require(isinstance(fields, dict), "config", name, "must hold a JSON object")
    return dense_config(fields) if fields.get("model_type") in DENSE_TYPES else ModelConfig.from_hf(fields)


@formula
def figures(config: ModelConfig, context: int = 4096, utilisation: Fraction = 0.39, usd: float = 2) -> dict[str, float]:
    """All figures of `minids cost`, with units in the names; `utilisation` is the MFU, 39 % in V3."""
    as_mha = config.replace(attention="gqa", num_key_value_heads=config.num_attention_heads, index_topk=None)
    training_flops = training_flops_per_token(config, context)
    gpu_hours = gpu_hours_by_mfu(1e12 * training_flops, utilisation)
    return {f"{part}_parameters": count for part, count in parameters(config).items()} | {
        "total_parameters": num_parameters(config),
        "active_parameters": num_parameters(config, active=True),
        "multiplied_parameters": matmul_parameters(config),
        "mtp_parameters": mtp_parameters(config),
        "training_bytes_unsharded": sum(zero_bytes_per_gpu(num_parameters(config), 1, 0).values()),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "kv_bytes_per_token_as_mha": kv_bytes_per_token(as_mha),
        "context_tokens": context,
        "decode_flops_per_token": decode_flops_per_token(config, context),
        "training_flops_per_token": training_flops,
        "h800_mfu": utilisation,
        "gpu_hours_per_trillion_tokens": gpu_hours,
        "usd_per_gpu_hour": usd,
        "usd_per_trillion_tokens": rent_usd(gpu_hours, usd),
    }
