"""Hugging Face's `config.json` of DeepSeek-V2, V3 and V3.2, read into and written from the fields of a `ModelConfig`.

Notable choices:
- a field that changes nothing here (dtype, token ids, cache) is ignored; a field that changes the arithmetic is a field
  of `ModelConfig`, or must have the value of DeepSeek's models (`FIXED`), else a one-line `ValueError` names it;
- what DeepSeek's code and transformers compute differently from the same fields is refused, not guessed.
"""

import math
from typing import Any

from minids.validation import check_value, require

DENSE_TYPES = ("llama", "mistral", "qwen2")  # other architectures, whose cost alone can be computed
ARCHITECTURES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "DeepseekV2ForCausalLM": "deepseek_v2",
}
SHARED = (  # fields with the same name and meaning in `ModelConfig`
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_nextn_predict_layers",
    "max_position_embeddings", "rms_norm_eps", "initializer_range", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace", "moe_intermediate_size",
    "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "scoring_func", "topk_method",
    "norm_topk_prob", "routed_scaling_factor", "aux_loss_alpha",
)  # fmt: skip
INDEXER = ("index_topk", "index_n_heads", "index_head_dim")  # only V3.2 has these, with the same names and meanings
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
    "num_experts_per_tok",
)  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": dict(num_nextn_predict_layers=0, first_k_dense_replace=3, max_position_embeddings=4096),
    "deepseek_v32": dict(num_nextn_predict_layers=0, first_k_dense_replace=3, max_position_embeddings=163840),
    "deepseek_v2": dict(
        num_nextn_predict_layers=0, first_k_dense_replace=0, max_position_embeddings=2048, scoring_func="softmax",
        norm_topk_prob=False, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0,
    ),
}  # fmt: skip
# Fields that would change the arithmetic, with the values that can be read; null where it means the same.
FIXED: dict[str, tuple[Any, ...]] = dict(
    hidden_act=("silu",), moe_layer_freq=(1,), rope_interleave=(True,), tie_word_embeddings=(False, None),
    attention_bias=(False, None), mlp_bias=(False, None), attention_dropout=(0, None), partial_rotary_factor=(1, None),
    sliding_window=(None,),
)  # fmt: skip
# What each family computes, whatever these fields say: transformers ignores them, DeepSeek's code refuses others.
FIXED_IN: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v3": dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",)) | dict.fromkeys(INDEXER, (None,)),
    "deepseek_v32": dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",)),
    "deepseek_v2": dict(
        scoring_func=("softmax", None), topk_method=("greedy", "group_limited_greedy", None),
        norm_topk_prob=(False, None),
    ) | dict.fromkeys(INDEXER, (None,)),
}  # fmt: skip
YARN_FIXED: dict[str, tuple[Any, ...]] = dict(
    truncate=(True, None), partial_rotary_factor=(1, None), extrapolation_factor=(1, None), attn_factor=(1, None)
)


def read_fields(fields: Any) -> dict[str, Any]:
    """Return the fields of a `ModelConfig`, `rope_scaling` as a dictionary, that a parsed `config.json` describes.

    The names are checked here, the values by `ModelConfig`. Raises `ValueError` for models other than DeepSeek-V2, V3
    and V3.2, for missing fields, and for values that mean another arithmetic.
    """
    require(isinstance(fields, dict), "config.json", fields, "must hold a JSON object")
    family = _family(fields)
    indexer = INDEXER if family == "deepseek_v32" else ()
    missing = sorted(name for name in (*REQUIRED, *indexer) if fields.get(name) is None)
    missing += [name for name in ("q_lora_rank", "n_shared_experts") if name not in fields]  # readers disagree on them
    if missing:
        raise ValueError(f"config.json lacks {missing[0]!r}, which a {family} model needs")
    _check_fixed(fields, FIXED | FIXED_IN[family])
    own = dict(DEFAULTS[family])
    nullable = own.keys() if family == "deepseek_v2" else ("num_nextn_predict_layers",)
    own |= {
        name: fields[name] for name in SHARED if name in fields and (fields[name] is not None or name not in nullable)
    }
    own["q_lora_rank"] = None if fields["q_lora_rank"] == 0 else fields["q_lora_rank"]
    own["n_shared_experts"] = 0 if fields["n_shared_experts"] is None else fields["n_shared_experts"]
    own |= {name: fields[name] for name in indexer}
    own["num_key_value_heads"] = fields["num_attention_heads"]  # unused by MLA, and null in some configs
    if own.get("topk_method") == "greedy":
        own |= dict(n_group=1, topk_group=1)  # greedy selection has no groups
    for name in ("first_k_dense_replace", "num_hidden_layers"):
        check_value(name, own[name], int, may_be_zero=name == "first_k_dense_replace")
    own["first_k_dense_replace"] = min(own["first_k_dense_replace"], own["num_hidden_layers"])
    if family == "deepseek_v32":
        _check_layer_types(fields, own["first_k_dense_replace"], own["num_hidden_layers"])
    return own | _read_rope(fields)


def write_fields(own: dict[str, Any]) -> dict[str, Any]:
    """Return the `config.json` for the fields of a `ModelConfig`, as `to_dict` gives them.

    It is that of `DeepseekV3ForCausalLM`, or with `index_topk` of `DeepseekV32ForCausalLM`.
    Raises `ValueError` for what transformers' DeepSeek-V3 cannot express.
    """
    kept = dict(attention="mla", topk_method="noaux_tc", scoring_func="sigmoid", hc_mult=1, engram=None)
    for name, value in kept.items():
        require(own[name] == value, name, own[name], f"transformers' DeepSeek-V3 has {value} only")
    sparse, experts = own["first_k_dense_replace"] < own["num_hidden_layers"], own["n_routed_experts"]
    require(experts > 1 or not sparse, "n_routed_experts", experts, "transformers' DeepSeek-V3 needs at least 2")
    rope: dict[str, Any] = {"rope_theta": float(own["rope_theta"]), "rope_type": "default"}
    yarn = own["rope_scaling"]
    if yarn is not None:
        rope |= yarn | {"rope_type": "yarn"}
        amplitude = _amplitude(yarn)
        if amplitude != _amplitude_of_transformers(yarn):
            rope["attention_factor"] = amplitude
    if own["index_topk"] is None:
        kind = dict(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", rope_interleave=True)
    else:
        kind = dict(architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32")
        kind |= {name: own[name] for name in INDEXER}
    floats = {name: float(own[name]) for name in ("rms_norm_eps", "routed_scaling_factor")}
    return {name: own[name] for name in (*SHARED, "q_lora_rank", "n_shared_experts")} | floats | kind | dict(
        hidden_act="silu", attention_bias=False, tie_word_embeddings=False,
        num_key_value_heads=own["num_attention_heads"],
        initializer_range=float(own["initializer_range"] or 0.02),  # None cannot be expressed; transformers' default
        rope_theta=float(own["rope_theta"]), rope_scaling=None if yarn is None else rope, rope_parameters=rope,
    )  # fmt: skip


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _amplitude(yarn: dict[str, Any]) -> float:
    """Return the factor of the rotation's amplitude in DeepSeek's code and in `minids.model.rope`."""
    return _temperature(yarn["factor"], yarn["mscale"]) / _temperature(yarn["factor"], yarn["mscale_all_dim"])


def _amplitude_of_transformers(yarn: dict[str, Any]) -> float:
    """As `_amplitude`, but transformers takes mscale = 1 and mscale_all_dim = 0 unless both are above 0."""
    both = yarn["mscale"] and yarn["mscale_all_dim"]
    return _amplitude(yarn if both else yarn | dict(mscale=1.0, mscale_all_dim=0.0))


def _family(fields: dict[str, Any]) -> str:
    """Return deepseek_v3, _v32 or _v2: `model_type`, or the architecture of a type of another name (kimi_k2)."""
    kind, named = fields.get("model_type"), fields.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    families = {ARCHITECTURES.get(name) for name in names}
    if kind not in ARCHITECTURES.values() and isinstance(kind, str) and kind not in DENSE_TYPES and len(families) == 1:
        (kind,) = families
    fits = kind in ARCHITECTURES.values() and None not in families
    rule = f"only deepseek_v3, deepseek_v32 and deepseek_v2 configs can be read (this one's architectures: {named!r})"
    require(fits, "model_type", fields.get("model_type"), rule)
    return str(kind)


def _check_fixed(fields: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> None:
    for name, values in fixed.items():
        if name in fields:
            readable = " and ".join(repr(value) for value in values if value is not None)
            require(fields[name] in values, name, fields[name], f"only {readable or 'null'} can be read")


def _check_layer_types(fields: dict[str, Any], dense: int, layers: int) -> None:
    """Check the lists in which transformers' DeepSeek-V3.2 repeats what the numbers say, or says something else."""
    wanted = dict(
        mlp_layer_types=["dense"] * dense + ["sparse"] * (layers - dense), layer_types=["indexed_attention"] * layers
    )
    for name, value in wanted.items():
        rule = "must be null, or what first_k_dense_replace and num_hidden_layers say"
        require(fields.get(name) in (None, value), name, fields.get(name), rule)


def _read_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling`. As in transformers, `rope_scaling` precedes `rope_parameters`."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    require(isinstance(rope, dict), "rope_scaling", rope, "must be an object")
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    kind = rope.get("rope_type") or rope.get("type") or ("default" if rope.keys() <= {"rope_theta"} else None)
    require(kind in ("default", "yarn"), "rope_type", kind, "only default and yarn are known")
    yarn = None if kind == "default" else _read_yarn({name: value for name, value in rope.items() if value is not None})
    if "original_max_position_embeddings" in fields and yarn is not None:  # in transformers it precedes the inner one
        require(
            fields["original_max_position_embeddings"] == yarn["original_max_position_embeddings"],
            "original_max_position_embeddings", fields["original_max_position_embeddings"],
            f"differs from rope_scaling's {yarn['original_max_position_embeddings']}",
        )  # fmt: skip
    return {"rope_theta": theta, "rope_scaling": yarn}


def _read_yarn(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `YaRN`: absent ones get DeepSeek's defaults, `attention_factor` becomes `mscale`."""
    _check_fixed(rope, YARN_FIXED)
    for name in ("factor", "original_max_position_embeddings"):
        require(name in rope, "rope_scaling", rope, f"must name {name}")
    ignored = ("rope_type", "type", "rope_theta", "attention_factor", *YARN_FIXED)
    yarn = dict(mscale=1.0, mscale_all_dim=0.0) | {name: rope[name] for name in rope if name not in ignored}
    for name in ("factor", "mscale", "mscale_all_dim"):
        check_value(name, yarn[name], float, may_be_zero=name != "factor")
    require(yarn["factor"] >= 1, "factor", yarn["factor"], "must be at least 1")
    ours, theirs = _amplitude(yarn), _amplitude_of_transformers(yarn)
    if "attention_factor" not in rope:
        rule = f"DeepSeek's code scales by {ours:.6g}, transformers by {theirs:.6g}: name the one in attention_factor"
        require(math.isclose(ours, theirs), "rope_scaling", rope, rule)
        return yarn
    wanted = rope["attention_factor"]
    check_value("attention_factor", wanted, float)
    if not math.isclose(wanted, ours):  # solve wanted = _temperature(factor, mscale) / _temperature(factor, all_dim)
        least = 1 / _temperature(yarn["factor"], yarn["mscale_all_dim"])
        rule = f"must be 1, or at least {least:.6g} with a factor above 1"
        require(yarn["factor"] > 1 and wanted >= least, "attention_factor", wanted, rule)
        yarn["mscale"] = (wanted / least - 1) / (0.1 * math.log(yarn["factor"]))
    return yarn
