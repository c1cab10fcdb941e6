"""The model's shape as one frozen dataclass with Hugging Face's field names, and the presets.

Notable choices: every field is a number or a word that a DeepSeek `config.json` also uses, except the four marked
"minids only"; a config is checked once, when it is made; the published models are presets like the small ones.
"""

import dataclasses
import math
from collections.abc import Container
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

Share = Annotated[float, "above 0 and at most 1"]


@dataclass(frozen=True)
class YaRN:
    """Context extension of the rotary embedding (FACTS.md section 2.2; Hugging Face `rope_scaling`)."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        check_fields(self, may_be_zero=("mscale", "mscale_all_dim"))
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")
        require(self.beta_fast > self.beta_slow, "beta_fast", self.beta_fast, f"must exceed beta_slow={self.beta_slow}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the shape and the arithmetic of a `MiniDS`; the defaults are DeepSeek-V3's.

    Raises `ValueError` naming the field, its value and the rule when the numbers do not fit together.
    Source: FACTS.md section 1 (the released `config.json` files).
    """

    # The trunk.
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 163840
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YaRN | None = None
    # Standard deviation of every initial weight; None scales each matrix by its fan-in (small models need it).
    initializer_range: float | None = 0.006

    # Attention. "gqa" is the dense baseline (MHA and MQA are its extremes) and ignores the latent sizes. minids only.
    attention: Literal["mla", "gqa"] = "mla"
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    # Mixture of experts. first_k_dense_replace = num_hidden_layers makes a dense model.
    first_k_dense_replace: int = 3
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    # Load balance: V3's sequence-wise loss, then V2's three auxiliary losses (all minids only but the first).
    aux_loss_alpha: float = 0.0001
    expert_balance_alpha: float = 0.0
    device_balance_alpha: float = 0.0
    communication_balance_alpha: float = 0.0

    def __post_init__(self):
        _check(self)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key: the part without position plus the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers of the trunk whose feed-forward is a mixture of experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def selects_with_bias(self) -> bool:
        """V3 balances with a selection bias; V2's methods have none."""
        return self.topk_method == "noaux_tc"

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, exactly the fields of this class."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; an unknown field is a `ValueError`."""
        if isinstance(rope := fields.get("rope_scaling"), dict):
            fields = fields | {"rope_scaling": _make(YaRN, "rope_scaling", rope)}
        return _make(cls, "config", fields)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """A named size: nano, tiny, small, medium, v2_lite, v2 or v3, with some fields changed if wanted."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | changes)

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> "ModelConfig":
        """Read a Hugging Face `config.json` of a DeepSeek-V2 or V3 model; other architectures are a `ValueError`."""
        model_type = fields.get("model_type")
        if model_type not in ("deepseek_v3", "deepseek_v2"):
            raise ValueError(f"model_type={model_type!r}: only deepseek_v3 and deepseek_v2 configs can be read")
        for name, value in _HF_FIXED.items():
            require(fields.get(name, value) == value, name, fields.get(name), f"only {value!r} can be read")
        known = {f.name for f in dataclasses.fields(cls)}
        missing = sorted(name for name in _HF_REQUIRED if fields.get(name) is None)
        if missing:
            raise ValueError(f"config.json lacks {missing[0]!r}, which a {model_type} model needs")
        defaults = {"num_nextn_predict_layers": 0, "n_shared_experts": 0}
        if model_type == "deepseek_v2":
            defaults |= _HF_V2_DEFAULTS
        own = defaults | {name: value for name, value in fields.items() if name in known and value is not None}
        own["q_lora_rank"] = fields.get("q_lora_rank") or None
        own["num_key_value_heads"] = fields["num_attention_heads"]  # MLA has no use for it; some configs say null
        rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        require(isinstance(rope, dict), "rope_scaling", rope, "must be an object")
        own["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", cls.rope_theta))
        own["rope_scaling"] = _yarn_from_hf(rope)
        own["attention"] = "mla"
        return cls(**own)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of `DeepseekV3ForCausalLM`; `ValueError` if it cannot express this. None becomes 0.02."""
        require(self.attention == "mla", "attention", self.attention, "Hugging Face's DeepSeek-V3 has MLA only")
        require(self.selects_with_bias, "topk_method", self.topk_method, "only noaux_tc routing can be exported")
        require(self.scoring_func == "sigmoid", "scoring_func", self.scoring_func, "only sigmoid can be exported")
        fields = self.to_dict()
        for name in ("attention", *_BALANCE_ONLY):
            del fields[name]
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.rope_scaling is not None:
            rope |= dataclasses.asdict(self.rope_scaling) | {"rope_type": "yarn"}
        return fields | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "num_key_value_heads": self.num_attention_heads,
            "initializer_range": self.initializer_range or 0.02,
            "rope_interleave": True,
            "rope_scaling": None if self.rope_scaling is None else rope,
            "rope_parameters": rope,
        }


def require(holds: bool, field: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r}: {rule}")


def check_value(name: str, value: Any, kind: Any, may_be_zero: bool = False) -> None:
    """Raise `ValueError` unless `value` is of the annotated `kind`; a number is finite and above 0, or `may_be_zero`.

    An `int` is whole, a `Share` at most 1, a `Literal` one of its words; what is `| None` may be None.
    """
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        require(value in parts, name, value, f"must be one of {', '.join(map(str, parts))}")
    elif NoneType in parts:
        if value is not None:
            check_value(name, value, parts[0])
    elif kind in _NUMBERS:
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        fits = number and (0 < value < math.inf or may_be_zero and value == 0) and not (kind is Share and value > 1)
        require(fits, name, value, f"must be {_NUMBERS[kind]}{', or 0' if may_be_zero else ''}")
    elif isinstance(kind, type):
        require(isinstance(value, kind), name, value, f"must be a {kind.__name__}")


_NUMBERS = {int: "a whole number, at least 1", float: "a finite number above 0", Share: "above 0 and at most 1"}


def check_fields(config: Any, may_be_zero: Container[str] = ()) -> None:
    """`check_value` of every field of a dataclass."""
    for field in dataclasses.fields(config):
        check_value(field.name, getattr(config, field.name), field.type, field.name in may_be_zero)


def _check(c: ModelConfig) -> None:
    check_fields(c, _MAY_BE_ZERO + _BALANCE_ONLY)
    heads, layers = c.num_attention_heads, c.num_hidden_layers
    experts, groups, kept = c.n_routed_experts, c.n_group, c.topk_group
    reachable = experts // groups * kept
    scored_by_two = c.topk_method == "noaux_tc" and groups > 1
    rotated = "qk_rope_head_dim" if c.attention == "mla" else "v_head_dim"
    rules = [
        (c.rope_theta > 1, "rope_theta", "must exceed 1"),
        (heads % c.num_key_value_heads == 0, "num_key_value_heads", f"must divide num_attention_heads={heads}"),
        (getattr(c, rotated) % 2 == 0, rotated, "must be even: rotation needs pairs"),
        (c.first_k_dense_replace <= layers, "first_k_dense_replace", f"must not exceed num_hidden_layers={layers}"),
        (experts % groups == 0, "n_group", f"must divide n_routed_experts={experts}"),
        (kept <= groups, "topk_group", f"must not exceed n_group={groups}"),
        (c.num_experts_per_tok <= reachable, "num_experts_per_tok", f"must not exceed the {reachable} experts kept"),
        (not scored_by_two or experts >= 2 * groups, "n_group", "scored by two experts, a group needs at least 2"),
        (c.topk_method != "greedy" or groups == kept, "topk_method", "greedy needs topk_group = n_group"),
        # A float32 grouped matmul wants every row to start at a multiple of 16 bytes.
        (c.hidden_size % 8 == 0, "hidden_size", "must be a multiple of 8"),
        (c.moe_intermediate_size % 8 == 0, "moe_intermediate_size", "must be a multiple of 8"),
    ]
    for holds, field, rule in rules:
        require(holds, field, getattr(c, field), rule)


_BALANCE_ONLY = ("expert_balance_alpha", "device_balance_alpha", "communication_balance_alpha")
_MAY_BE_ZERO = ("num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts", "aux_loss_alpha")
_HF_REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"} | {
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
}


# What a DeepSeek config may say but never says otherwise, and what an absent field of a V2 config means.
_HF_FIXED = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_HF_V2_DEFAULTS = {
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}


def _make(cls: type, what: str, fields: dict[str, Any]) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(names))
    if unknown:
        raise ValueError(f"unknown {what} field {unknown[0]!r}; {cls.__name__} has {', '.join(names)}")
    return cls(**fields)


def _yarn_from_hf(rope: dict[str, Any]) -> YaRN | None:
    """Hugging Face's `rope_scaling`; where it names no mscale_all_dim, the softmax scale is left alone."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    require(kind == "yarn", "rope_type", kind, "only default and yarn are known")
    fields = {name: value for name, value in rope.items() if name not in ("rope_type", "type", "rope_theta")}
    for name in ("factor", "original_max_position_embeddings"):
        require(name in fields, "rope_scaling", rope, f"must name {name}")
    return _make(YaRN, "rope_scaling", {"mscale_all_dim": 0.0} | fields)


def _latent(hidden: int, layers: int, heads: int, q_rank: int, kv_rank: int, head: int, rope: int) -> dict[str, Any]:
    """The trunk of a small V3-like model: value heads as wide as the unrotated part of the keys, one dense layer."""
    return dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        q_lora_rank=q_rank, kv_lora_rank=kv_rank, qk_nope_head_dim=head, qk_rope_head_dim=rope, v_head_dim=head,
        first_k_dense_replace=1, initializer_range=None, max_position_embeddings=4096,
    )  # fmt: skip


def _experts(dense: int, inner: int, experts: int, per_token: int, groups: int, groups_kept: int) -> dict[str, Any]:
    return dict(
        intermediate_size=dense, moe_intermediate_size=inner, n_routed_experts=experts,
        num_experts_per_tok=per_token, n_group=groups, topk_group=groups_kept,
    )  # fmt: skip


_V2 = dict(
    vocab_size=102400, num_nextn_predict_layers=0, first_k_dense_replace=1, n_shared_experts=2,
    scoring_func="softmax", norm_topk_prob=False, aux_loss_alpha=0.0,
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"vocab_size": 272} | _latent(64, 3, 4, 32, 32, 16, 8) | _experts(128, 32, 8, 2, 4, 2),
    "tiny": {"vocab_size": 2048} | _latent(128, 2, 4, 64, 32, 32, 16) | _experts(384, 64, 16, 4, 4, 2),
    "small": {"vocab_size": 8192} | _latent(512, 12, 8, 256, 128, 64, 32) | _experts(1536, 256, 32, 4, 4, 2),
    "medium": {"vocab_size": 32768} | _latent(1024, 24, 16, 512, 256, 64, 32) | _experts(4096, 640, 64, 6, 8, 4),
    "v2_lite": _V2
    | _experts(10944, 1408, 64, 6, 1, 1)
    | dict(
        hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None,
        topk_method="greedy", routed_scaling_factor=1.0, expert_balance_alpha=0.001,
        rope_scaling=dict(mscale=0.707, mscale_all_dim=0.707),
    ),
    "v2": _V2
    | _experts(12288, 1536, 160, 6, 8, 3)
    | dict(
        hidden_size=5120, num_hidden_layers=60, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
        expert_balance_alpha=0.003, device_balance_alpha=0.05, communication_balance_alpha=0.02,
        rope_scaling=dict(),  # the released config names no mscale, so the code's default of 1 (FACTS.md section 2.2)
    ),
    "v3": dict(rope_scaling=dict()),
}  # fmt: skip
