"""Model configuration: one frozen dataclass with Hugging Face's field names, and the presets.

Notable choices: every field has the name and the meaning of a field of DeepSeek's `config.json`, except those
marked "minids only"; a config is validated once, on construction; the published models are presets like the small ones.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from minids.engram_config import EngramConfig as EngramConfig
from minids.hf_config import read_fields, write_fields
from minids.validation import Fraction as Fraction
from minids.validation import check_fields as check_fields
from minids.validation import check_value as check_value
from minids.validation import require as require

V4_KINDS = ("window", "csa", "hca")  # attention to the last tokens, and to no, to chosen, to all entries of blocks


@dataclass(frozen=True)
class YaRN:
    """Context extension of the rotary embedding (FACTS.md section 2.2; Hugging Face `rope_scaling`)."""

    factor: float = 40.0
    """Ratio of the extended to the original context length; interpolated frequencies are divided by it."""
    original_max_position_embeddings: int = 4096
    """Context length before the extension, in tokens."""
    beta_fast: float = 32.0
    """Turns over the original context from which a frequency is kept unchanged."""
    beta_slow: float = 1.0
    """Turns over the original context below which a frequency is divided by the factor."""
    mscale: float = 1.0
    """Coefficient of the temperature by which the amplitude of the rotation is multiplied."""
    mscale_all_dim: float = 1.0
    """Coefficient of the temperature of the softmax scale; the amplitude of the rotation is divided by it."""

    def __post_init__(self):
        check_fields(self, may_be_zero=("mscale", "mscale_all_dim"))
        require(self.factor >= 1, "factor", self.factor, "must be at least 1")
        rule = f"must be at least beta_slow={self.beta_slow}"
        require(self.beta_fast >= self.beta_slow, "beta_fast", self.beta_fast, rule)


@dataclass(frozen=True)
class ModelConfig:
    """All settings that determine the shape and the arithmetic of a `MiniDS`; the defaults are DeepSeek-V3's.

    Raises `ValueError` naming the field, its value and the rule if the values are not consistent.
    Source: FACTS.md section 1 (the released `config.json` files).
    """

    # Main model.
    vocab_size: int = 129280
    """Number of tokens in the vocabulary; at least that of the tokenizer."""
    hidden_size: int = 7168
    """Width of the residual stream, in channels; multiples of 8 are fast, as experts are one grouped matmul."""
    intermediate_size: int = 18432
    """Inner width of the feed-forward in the dense layers, in channels."""
    num_hidden_layers: int = 61
    """Number of layers, without the MTP modules."""
    num_nextn_predict_layers: int = 1
    """Number of MTP modules, each of which predicts one more token; 0 trains without multi-token prediction."""
    max_position_embeddings: int = 163840
    """Context length, in tokens; the longest sequence in training and generation."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm, against division by zero."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies; a larger base gives slower rotations, for longer contexts."""
    rope_scaling: YaRN | None = None
    """YaRN context extension; None for none."""
    initializer_range: float | None = 0.006
    """Standard deviation of the initial weights; None scales each matrix by its fan-in, as small models need."""

    # Attention.
    attention: Literal["mla", "gqa", "window", "csa", "hca"] = "mla"
    """mla; gqa, the dense baseline (MHA, MQA), without latent sizes; window, csa and hca are V4's. minids only."""
    num_attention_heads: int = 128
    """Number of query heads."""
    num_key_value_heads: int = 128
    """Number of key and value heads of gqa: that of the query heads for MHA, 1 for MQA; unused by mla."""
    q_lora_rank: int | None = 1536
    """Width of the query latent, in channels; None projects queries directly, as V2-Lite does. Unused by gqa."""
    kv_lora_rank: int = 512
    """Width of the key-value latent of mla, in channels; it is cached, so a smaller one saves memory."""
    qk_nope_head_dim: int = 128
    """Width per head of the unrotated part of queries and keys (mla), in channels."""
    qk_rope_head_dim: int = 64
    """Width of the rotated part of queries and keys, in channels; even. All heads share one. Unused by gqa."""
    v_head_dim: int = 128
    """Width of a value head, in channels; but for mla also that of a query and key head."""
    index_topk: int | None = None
    """Tokens that a query of mla attends to (V3.2: 2048; None for all), or entries of csa, chosen by an indexer."""
    index_n_heads: int = 64
    """Number of heads of the indexer; with few of them many scores are 0. Unused without index_topk."""
    index_head_dim: int = 128
    """Width of an index query and of the cached index key, at least that of the rotated part; unused as above."""

    # Mixture of experts.
    first_k_dense_replace: int = 3
    """Number of dense layers before the first MoE layer; the number of layers makes a dense model."""
    moe_intermediate_size: int = 2048
    """Inner width of one expert, in channels; multiples of 8 are fast, as for hidden_size."""
    n_routed_experts: int = 256
    """Number of routed experts in an MoE layer."""
    n_shared_experts: int = 1
    """Number of shared experts, which process every token; 0 for none."""
    num_experts_per_tok: int = 8
    """Number of routed experts that process each token; the FLOPs per token grow with it."""
    n_group: int = 8
    """Number of groups that the routed experts are divided into; V3 has one group per node."""
    topk_group: int = 4
    """Number of groups that the experts of one token may come from; fewer limit communication between nodes."""
    scoring_func: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "sigmoid"
    """Affinity of a token to the experts: sigmoid (V3), softmax over all experts (V2), sqrt of softplus (V4)."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """Selection of experts: noaux_tc with a balancing bias (V3), group_limited_greedy (V2), greedy (V2-Lite)."""
    norm_topk_prob: bool = True
    """Divide the gate weights of a token by their sum, as V3 does; off for V2."""
    routed_scaling_factor: float = 2.5
    """Factor of the gate weights of routed experts."""

    # Load balance: V3's sequence-wise loss, then V2's three auxiliary losses.
    aux_loss_alpha: float = 0.0001
    """Weight of V3's sequence-wise balance loss; 0 turns it off."""
    expert_balance_alpha: float = 0.0
    """Weight of V2's expert-level balance loss; 0 turns it off. minids only."""
    device_balance_alpha: float = 0.0
    """Weight of V2's device-level balance loss; 0 turns it off. minids only."""
    communication_balance_alpha: float = 0.0
    """Weight of V2's communication balance loss; 0 turns it off. minids only."""

    # After V3 (FACTS.md section 10).
    hc_mult: int = 1
    """Number of residual streams of hyper-connections (V4 has 4); 1 is the plain residual connection of V3."""
    hc_sinkhorn_iters: int = 20
    """Sinkhorn iterations that constrain the mixing of the streams; 0 leaves it free, as before mHC (minids only)."""
    hc_eps: float = 1e-6
    """Added in the Sinkhorn iterations, against division by zero, and to the weights that read the streams."""
    engram: EngramConfig | None = None
    """Hashed n-gram memory; None for none. minids only."""

    # V4, unused by mla and gqa (FACTS.md section 10); the sizes are V4-Flash's, YaRN is that of csa and hca.
    layer_types: tuple[str, ...] | None = None
    """Kind of each layer's attention: window, csa or hca; None for that of `attention` in all of them."""
    sliding_window: int = 128
    """Number of last tokens that every layer attends to one by one."""
    csa_block: int = 4
    """Tokens per entry of csa; an entry also mixes in the block before."""
    hca_block: int = 128
    """Tokens per entry of hca."""
    compress_rope_theta: float = 160000.0
    """Base of the rotary frequencies in csa and hca; that of window is `rope_theta`."""
    o_groups: int = 8
    """Groups of heads that have an output projection each."""
    o_lora_rank: int = 1024
    """Width to which the output of a group of heads is projected, in channels."""
    num_hash_layers: int | None = None
    """Number of first MoE layers in which a token's experts are looked up by its id (3); None for none."""

    def __post_init__(self):
        _check(self)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the unrotated plus the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Number of layers of the main model whose feed-forward is a mixture of experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def selects_with_bias(self) -> bool:
        """Whether experts are selected with a balancing bias: true for V3's method, false for V2's."""
        return self.topk_method == "noaux_tc"

    def of_layer(self, index: int) -> "ModelConfig":
        """Return the config of one layer, whose `attention` is that of `layer_types`."""
        return self if self.layer_types is None else self.replace(attention=self.layer_types[index])

    def replace(self, **changes: Any) -> "ModelConfig":
        """Return a copy with some fields changed; it is validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of this class as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """Invert `to_dict`. Raises `ValueError` for an unknown field."""
        if isinstance(rope := fields.get("rope_scaling"), dict):
            fields = fields | {"rope_scaling": _make(YaRN, "rope_scaling", rope)}
        if isinstance(engram := fields.get("engram"), dict):
            listed = {name: tuple(value) for name, value in engram.items() if isinstance(value, list)}  # JSON's tuples
            fields = fields | {"engram": _make(EngramConfig, "engram", engram | listed)}
        if isinstance(types := fields.get("layer_types"), list):
            fields = fields | {"layer_types": tuple(types)}
        return _make(cls, "config", fields)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """Return a preset: nano, tiny, small, medium, v2_lite, v2, v3 or v3_2, with `changes` to its fields."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | changes)

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> "ModelConfig":
        """Read a Hugging Face `config.json` of a DeepSeek-V2, V3 or V3.2 model (`minids.hf_config`).

        Raises `ValueError` for other models, and for fields whose values mean another arithmetic.
        """
        return cls.from_dict(read_fields(fields))

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json` of a DeepSeek-V3 model, or with `index_topk` of a V3.2 model.

        Raises `ValueError` if it cannot express this config.
        """
        return write_fields(self.to_dict())


def _check(c: ModelConfig) -> None:
    check_fields(c, _MAY_BE_ZERO + _BALANCE_ONLY)
    heads, layers = c.num_attention_heads, c.num_hidden_layers
    experts, groups, kept = c.n_routed_experts, c.n_group, c.topk_group
    reachable = experts // groups * kept
    scored_by_two = c.topk_method == "noaux_tc" and groups > 1
    rotated = "v_head_dim" if c.attention == "gqa" else "qk_rope_head_dim"
    rules = [
        (c.rope_theta > 1, "rope_theta", "must exceed 1"),
        (c.index_topk is None or c.attention != "gqa", "index_topk", "needs attention=mla, or csa"),
        (c.index_topk is None or c.q_lora_rank is not None, "index_topk", "needs a query latent, so a q_lora_rank"),
        (
            c.index_topk is None or c.index_head_dim >= c.qk_rope_head_dim,
            "index_head_dim",
            f"must be at least qk_rope_head_dim={c.qk_rope_head_dim}",
        ),
        (heads % c.num_key_value_heads == 0, "num_key_value_heads", f"must divide num_attention_heads={heads}"),
        (getattr(c, rotated) % 2 == 0, rotated, "must be even, because RoPE rotates pairs of channels"),
        (c.first_k_dense_replace <= layers, "first_k_dense_replace", f"must not exceed num_hidden_layers={layers}"),
        (experts % groups == 0, "n_group", f"must divide n_routed_experts={experts}"),
        (kept <= groups, "topk_group", f"must not exceed n_group={groups}"),
        (
            c.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            f"must not exceed the {reachable} experts kept",
        ),
        (
            not scored_by_two or experts >= 2 * groups,
            "n_group",
            "must leave at least 2 experts per group",
        ),
        (c.topk_method != "greedy" or groups == kept, "topk_method", "greedy needs topk_group = n_group"),
        *_engram_rules(c),
        *_v4_rules(c),
    ]
    for holds, field, rule in rules:
        require(holds, field, getattr(c, field), rule)


def _engram_rules(c: ModelConfig) -> list[tuple[bool, str, str]]:
    if c.engram is None:
        return []
    layers, vocab = c.num_hidden_layers, c.vocab_size
    special = max(c.engram.pad_token, c.engram.bos_token or 0)
    return [
        (max(c.engram.layers) < layers, "engram", f"layers must be below num_hidden_layers={layers}"),
        (special < vocab, "engram", f"pad_token and bos_token must be below vocab_size={vocab}"),
    ]


def _v4_rules(c: ModelConfig) -> list[tuple[bool, str, str]]:
    types, heads, yarn, known = c.layer_types, c.num_attention_heads, c.rope_scaling, ", ".join(V4_KINDS)
    if c.attention not in V4_KINDS:
        rule = f"needs attention to be one of {known}"
        return [(types is None, "layer_types", rule), (c.num_hash_layers is None, "num_hash_layers", rule)]
    kinds = (c.attention,) if types is None else types if isinstance(types, tuple) else ()
    each = types is None or len(kinds) == c.num_hidden_layers
    return [
        (each and set(kinds) <= set(V4_KINDS), "layer_types", f"must be a tuple with {known} for each layer"),
        ("csa" not in kinds or c.index_topk is not None, "index_topk", "must be a number for csa"),
        (c.q_lora_rank is not None, "q_lora_rank", "must be a number for V4's attention"),
        (c.qk_rope_head_dim <= c.v_head_dim, "qk_rope_head_dim", f"must be at most v_head_dim={c.v_head_dim}"),
        (heads % c.o_groups == 0, "o_groups", f"must divide num_attention_heads={heads}"),
        ((c.num_hash_layers or 0) <= c.num_moe_layers, "num_hash_layers", "must be at most the MoE layers"),
        (yarn is None or yarn.mscale == yarn.mscale_all_dim, "rope_scaling", "V4 has no mscale: both must be equal"),
        (c.num_nextn_predict_layers == 0, "num_nextn_predict_layers", "must be 0 with V4's attention"),
    ]


_BALANCE_ONLY = ("expert_balance_alpha", "device_balance_alpha", "communication_balance_alpha")
_MAY_BE_ZERO = (
    "num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts", "aux_loss_alpha", "hc_sinkhorn_iters",
)  # fmt: skip


def _make(cls: type, what: str, fields: dict[str, Any]) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(names))
    if unknown:
        raise ValueError(f"unknown {what} field {unknown[0]!r}; {cls.__name__} has {', '.join(names)}")
    return cls(**fields)


def _latent(hidden: int, layers: int, heads: int, q_rank: int, kv_rank: int, head: int, rope: int) -> dict[str, Any]:
    """Fields of a small V3-like model: MLA with value heads as wide as unrotated keys, and one dense layer."""
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
        rope_scaling=dict(),  # mscale 1: its default in the released code, named in config.json (FACTS.md section 2.2)
    ),
    "v3": dict(rope_scaling=dict()),
    "v3_2": dict(rope_scaling=dict(), index_topk=2048),
}  # fmt: skip
