"""ModelConfig: every rule says in one line which field is wrong and why; dictionaries and Hugging Face configs."""

import dataclasses
import json

import pytest

from minids.config import PRESETS, ModelConfig, YaRN

SMALL = dict(  # the sizes that the rules below are broken from
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_group=4,
    topk_group=2, num_experts_per_tok=2, moe_intermediate_size=32, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
NANO = ModelConfig.preset("nano", **SMALL)
V3 = ModelConfig.preset("v3")
WHOLE = [f.name for f in dataclasses.fields(ModelConfig) if f.type is int]
NUMBERS = [f.name for f in dataclasses.fields(ModelConfig) if f.type is float]
MAY_BE_ZERO = {"num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts", "hc_sinkhorn_iters"}


def complaint(make, field, value):
    """The ValueError of `make()`: one line that names the field and its value, then a rule."""
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(f"{field}={value!r}: ") and "\n" not in message
    return message


# The rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", WHOLE)
def test_counts_and_widths_are_whole_numbers_from_1_or_0_on(field):
    for value in (1.5, "4", None, True, -1, float("nan"), *([] if field in MAY_BE_ZERO else [0])):
        complaint(lambda value=value: NANO.replace(**{field: value}), field, value)


@pytest.mark.parametrize("field", NUMBERS)
def test_factors_are_finite_numbers_from_0_on(field):
    for value in ("1", None, True, -0.1, float("inf"), float("nan")):
        complaint(lambda value=value: NANO.replace(**{field: value}), field, value)


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("attention", "mha", "mla, gqa"),
        ("scoring_func", "tanh", "sigmoid, softmax, sqrtsoftplus"),
        ("topk_method", "gready", "noaux_tc, group_limited_greedy, greedy"),
        ("norm_topk_prob", "no", "must be a bool"),
        ("q_lora_rank", 0, "at least 1"),
        ("q_lora_rank", -1, "at least 1"),
        ("q_lora_rank", 1.5, "whole number"),
        ("q_lora_rank", "32", "whole number"),
        ("initializer_range", 0.0, "above 0"),
        ("initializer_range", "small", "above 0"),
        ("initializer_range", float("nan"), "above 0"),
        ("initializer_range", float("inf"), "above 0"),
        ("rope_scaling", {"factor": 40.0}, "must be a YaRN"),
        ("rope_theta", 1.0, "must exceed 1"),
        ("rms_norm_eps", 0.0, "above 0"),
        ("routed_scaling_factor", 0.0, "above 0"),
        ("num_key_value_heads", 3, "num_attention_heads=4"),
        ("qk_rope_head_dim", 7, "even"),
        ("first_k_dense_replace", 4, "num_hidden_layers=3"),
        ("n_group", 3, "n_routed_experts=8"),
        ("n_group", 8, "at least 2"),
        ("topk_group", 5, "n_group=4"),
        ("num_experts_per_tok", 5, "the 4 experts kept"),
        ("topk_method", "greedy", "topk_group = n_group"),
        ("index_topk", 0, "at least 1"),
        ("index_topk", 1.5, "whole number"),
    ],
)
def test_each_rule_names_field_value_and_rule(field, value, rule):
    assert rule in complaint(lambda: NANO.replace(**{field: value}), field, value)


def test_the_baseline_rotates_whole_heads_so_they_must_be_even():
    assert "even" in complaint(lambda: NANO.replace(attention="gqa", v_head_dim=15), "v_head_dim", 15)
    assert NANO.replace(v_head_dim=15).v_head_dim == 15  # MLA does not rotate values
    assert NANO.replace(attention="gqa", qk_rope_head_dim=7).qk_rope_head_dim == 7  # nor the baseline this part


def test_sparse_attention_needs_mla_a_query_latent_and_an_index_head_that_can_be_rotated():
    sparse = NANO.replace(index_topk=8, index_head_dim=8)
    assert "attention=mla" in complaint(lambda: sparse.replace(attention="gqa"), "index_topk", 8)
    assert "q_lora_rank" in complaint(lambda: sparse.replace(q_lora_rank=None), "index_topk", 8)
    assert "qk_rope_head_dim=8" in complaint(lambda: sparse.replace(index_head_dim=7), "index_head_dim", 7)
    assert NANO.replace(index_head_dim=7, q_lora_rank=None).index_topk is None  # unused without a choice


@pytest.mark.parametrize(
    "field, value",
    [
        ("factor", 0.5),
        ("factor", "40"),
        ("factor", None),
        ("factor", True),
        ("factor", float("inf")),
        ("original_max_position_embeddings", 0),
        ("beta_fast", 0.9),
        ("beta_fast", float("inf")),
        ("beta_slow", float("nan")),
        ("mscale", -1.0),
        ("mscale_all_dim", "1"),
    ],
)
def test_yarn_checks_itself(field, value):
    complaint(lambda: YaRN(**{field: value}), field, value)


def test_yarn_may_be_a_step_as_kimi_k2_is():
    assert YaRN(beta_fast=1.0, beta_slow=1.0).beta_fast == 1


@pytest.mark.parametrize("field, largest", [("vocab_size", 2**63 - 1), ("rope_theta", 1.7976931348623157e308)])
def test_numbers_that_no_computation_can_hold_are_refused(field, largest):
    assert getattr(NANO.replace(**{field: largest}), field) == largest
    assert str(largest) in complaint(lambda: NANO.replace(**{field: 10**400}), field, 10**400)


def test_yarn_needs_a_positive_slow_rate():
    complaint(lambda: YaRN(beta_slow=0.0), "beta_slow", 0.0)


def test_a_config_cannot_be_changed_but_by_replace_which_checks_again():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NANO.hidden_size = 128
    assert NANO.replace(hidden_size=128).hidden_size == 128 and NANO.hidden_size == 64
    complaint(lambda: NANO.replace(hidden_size=0), "hidden_size", 0)
    with pytest.raises(TypeError, match="hidden"):
        NANO.replace(hidden=128)
    assert hash(NANO) == hash(ModelConfig.preset("nano", **SMALL))


def test_derived_sizes():
    assert (V3.qk_head_dim, V3.num_moe_layers, V3.selects_with_bias) == (192, 58, True)
    assert not ModelConfig.preset("v2").selects_with_bias


# In and out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_through_json_and_back(name):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {f.name for f in dataclasses.fields(ModelConfig)}


def test_preset_takes_changes_and_an_unknown_one_names_those_there_are():
    assert ModelConfig.preset("nano", **SMALL | {"num_hidden_layers": 5}) == NANO.replace(num_hidden_layers=5)
    with pytest.raises(ValueError, match="unknown preset 'huge'; the presets are nano, tiny, small, medium, v2_lite"):
        ModelConfig.preset("huge")
    complaint(lambda: ModelConfig.preset("nano", hidden_size=-7), "hidden_size", -7)


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="unknown config field 'hidden'; ModelConfig has vocab_size, hidden_size"):
        ModelConfig.from_dict({"hidden": 64})
    with pytest.raises(ValueError, match="unknown rope_scaling field 'betafast'; YaRN has factor"):
        ModelConfig.from_dict({"rope_scaling": {"betafast": 64}})
    complaint(lambda: ModelConfig.from_dict({"rope_scaling": 3}), "rope_scaling", 3)


def shape(config):
    """A row of the table of FACTS.md section 1."""
    return [getattr(config, name) for name in (
        "hidden_size", "num_hidden_layers", "first_k_dense_replace", "num_attention_heads", "q_lora_rank",
        "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size",
        "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
        "routed_scaling_factor", "vocab_size", "num_nextn_predict_layers", "scoring_func", "norm_topk_prob",
    )]  # fmt: skip


def test_published_presets_have_the_published_shape():
    assert shape(V3) == [7168, 61, 3, 128, 1536, 512, 128, 64, 128, 18432, 2048, 256, 1, 8, 8, 4, 2.5, 129280, 1] + [
        "sigmoid", True,
    ]  # fmt: skip
    assert shape(ModelConfig.preset("v2")) == [
        5120, 60, 1, 128, 1536, 512, 128, 64, 128, 12288, 1536, 160, 2, 6, 8, 3, 16.0, 102400, 0, "softmax", False,
    ]  # fmt: skip
    assert shape(ModelConfig.preset("v2_lite")) == [
        2048, 27, 1, 16, None, 512, 128, 64, 128, 10944, 1408, 64, 2, 6, 1, 1, 1.0, 102400, 0, "softmax", False,
    ]  # fmt: skip
    v3_2 = ModelConfig.preset("v3_2")
    assert v3_2 == V3.replace(index_topk=2048, index_n_heads=64, index_head_dim=128)
    for name in ("v3", "v2", "v2_lite"):
        config = ModelConfig.preset(name)
        assert (config.rope_theta, config.rms_norm_eps, config.initializer_range) == (10000.0, 1e-6, 0.006)
        yarn = config.rope_scaling
        assert (yarn.factor, yarn.original_max_position_embeddings) == (40, 4096)
        assert (yarn.beta_fast, yarn.beta_slow, yarn.mscale) == (32, 1, 0.707 if name == "v2_lite" else 1)
        assert config.max_position_embeddings == 163840
    v2 = ModelConfig.preset("v2")
    assert (v2.expert_balance_alpha, v2.device_balance_alpha, v2.communication_balance_alpha) == (0.003, 0.05, 0.02)
    assert V3.aux_loss_alpha == 1e-4 and v2.aux_loss_alpha == 0


EXPORTED = [
    V3,
    NANO.replace(initializer_range=0.01),
    NANO.replace(initializer_range=0.01, q_lora_rank=None, num_nextn_predict_layers=0, n_shared_experts=2),
    NANO.replace(initializer_range=0.01, rope_scaling=YaRN(factor=8.0, mscale=0.7, mscale_all_dim=0.5)),
    NANO.replace(initializer_range=0.01, rope_theta=5e5, norm_topk_prob=False, aux_loss_alpha=0.0, n_shared_experts=0),
]


@pytest.mark.parametrize("config", EXPORTED, ids=["v3", "nano", "no q compression", "YaRN", "others"])
def test_hugging_face_config_goes_out_and_comes_back(config):
    fields = json.loads(json.dumps(config.to_hf()))
    assert fields["model_type"] == "deepseek_v3" and fields["architectures"] == ["DeepseekV3ForCausalLM"]
    assert ModelConfig.from_hf(fields) == config


def test_scaled_initialisation_is_not_expressible_in_a_hugging_face_config():
    back = ModelConfig.from_hf(NANO.to_hf())
    assert back == NANO.replace(initializer_range=0.02)


@pytest.mark.parametrize(
    "field, value, change",
    [
        ("attention", "gqa", {"attention": "gqa"}),
        ("topk_method", "group_limited_greedy", {"topk_method": "group_limited_greedy"}),
        ("scoring_func", "softmax", {"scoring_func": "softmax"}),
    ],
)
def test_what_hugging_face_cannot_express_is_not_exported(field, value, change):
    complaint(lambda: NANO.replace(**change).to_hf(), field, value)


# The shape fields of the released V3 and V2-Lite config.json.
RELEASED_V3 = dict(
    model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, num_nextn_predict_layers=1, num_attention_heads=128, num_key_value_heads=128,
    n_shared_experts=1, n_routed_experts=256, routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536,
    qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, topk_method="noaux_tc", n_group=8, topk_group=4,
    num_experts_per_tok=8, moe_layer_freq=1, first_k_dense_replace=3, norm_topk_prob=True, scoring_func="sigmoid",
    hidden_act="silu", max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=10000, attention_bias=False,
    tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, initializer_range=0.006, aux_loss_alpha=0.0001,
    rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
                      mscale=1.0, mscale_all_dim=1.0),
)  # fmt: skip
RELEASED_V2_LITE = RELEASED_V3 | dict(
    model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
    num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64,
    routed_scaling_factor=1.0, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, num_experts_per_tok=6,
    first_k_dense_replace=1, norm_topk_prob=False, scoring_func="softmax", aux_loss_alpha=0.0,
    rope_scaling=RELEASED_V3["rope_scaling"] | dict(mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip
del RELEASED_V2_LITE["num_nextn_predict_layers"]


def test_released_configs_are_the_presets():
    assert ModelConfig.from_hf(RELEASED_V3) == V3
    lite = ModelConfig.preset("v2_lite", expert_balance_alpha=0.0)
    assert ModelConfig.from_hf(RELEASED_V2_LITE) == lite


def test_hugging_face_configs_of_other_models_are_refused_in_one_line():
    complaint(lambda: ModelConfig.from_hf(RELEASED_V3 | {"model_type": "llama"}), "model_type", "llama")
    complaint(lambda: ModelConfig.from_hf({}), "model_type", None)
    for field, value in (
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("hidden_size", 0),
        ("rope_scaling", "yarn"),
    ):
        complaint(lambda f=field, v=value: ModelConfig.from_hf(RELEASED_V3 | {f: v}), field, value)
    with pytest.raises(ValueError, match="config.json lacks 'kv_lora_rank', which a deepseek_v3 model needs"):
        ModelConfig.from_hf({name: value for name, value in RELEASED_V3.items() if name != "kv_lora_rank"})
    linear = RELEASED_V3 | {"rope_scaling": {"type": "linear", "factor": 2}}
    complaint(lambda: ModelConfig.from_hf(linear), "rope_type", "linear")
