"""The config.json files of released models are read and counted; every other one is read, or refused in one line."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minids import cost
from minids.config import ModelConfig, YaRN
from minids.model.rope import rotary_frequencies

CONFIGS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "configs").glob("*.json")}
V3, V2, V2_LITE, KIMI = (CONFIGS[name] for name in ("v3_0324", "v2", "v2_lite", "kimi_k2"))
YARN = V3["rope_scaling"]
TOTALS = {  # total and active parameters, with embedding and output head
    "v3_0324": (671_026_419_200, 37_552_297_472),  # "671B, 37B activated"
    "v3_1": (671_026_419_200, 37_552_297_472),
    "v2": (235_741_434_880, 21_375_800_320),  # "236B, 21B"
    "v2_lite": (15_706_484_224, 2_661_150_208),  # "15.7B, 2.4B" without the input embedding
    "moonlight": (15_960_110_208, 2_914_776_192),  # "15.29B, 2.24B" without embedding and head
    "v3_2_exp": (671_877_944_064, 38_403_822_336),  # V3's and 61 indexers of 13,959,424 parameters
    "kimi_k2": (1_026_408_232_448, 32_861_500_928),  # "1T, 32B"
    "kimi_k2_as_v3": (1_026_408_232_448, 32_861_500_928),
    "kimi_k2_as_v3_beta32": (1_026_408_232_448, 32_861_500_928),
}


def refusal(fields):
    """The ValueError of reading `fields`: one line."""
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf(fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", TOTALS)
def test_released_config_counts_the_published_parameters(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    config = cost.read_config(str(tmp_path))
    assert (cost.num_parameters(config), cost.num_parameters(config, active=True)) == TOTALS[name]


def test_moonlight_counts_as_its_paper_does():
    config = ModelConfig.from_hf(CONFIGS["moonlight"])
    tables = 2 * config.vocab_size * config.hidden_size
    assert round((cost.num_parameters(config) - tables) / 1e9, 2) == 15.29
    assert round((cost.num_parameters(config, active=True) - tables) / 1e9, 2) == 2.24


V32 = CONFIGS["v3_2_exp"]


def test_v32_is_v3_with_an_indexer():
    config = ModelConfig.from_hf(V32)
    assert (config.index_topk, config.index_n_heads, config.index_head_dim) == (2048, 64, 128)
    assert config.replace(index_topk=None) == ModelConfig.from_hf(CONFIGS["v3_1"])
    # config.json repeats transformers' defaults here; the preset has the paper's values of V3 (FACTS.md section 1)
    assert config.replace(initializer_range=0.006) == ModelConfig.preset("v3_2")
    written = json.loads(json.dumps(config.to_hf()))
    assert written["architectures"] == V32["architectures"] and written["model_type"] == V32["model_type"]
    assert ModelConfig.from_hf(written) == config


def test_an_indexer_is_read_in_v32_only_and_must_be_named_there():
    assert refusal(V3 | {"index_topk": 2048}) == "index_topk=2048: only null can be read"
    assert refusal(V2 | {"index_n_heads": 64}) == "index_n_heads=64: only null can be read"
    for name in ("index_topk", "index_n_heads", "index_head_dim"):
        lacks = f"config.json lacks {name!r}, which a deepseek_v32 model needs"
        assert refusal({key: value for key, value in V32.items() if key != name}) == lacks
    glm = {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"]}  # its indexer rotates pairs
    assert refusal(V32 | glm).startswith("model_type='glm_moe_dsa': ")
    assert not any(name.startswith("index_") for name in ModelConfig.from_hf(V3).to_hf())


def test_the_layers_that_transformers_lists_for_v32_must_be_those_of_the_numbers():
    dense, layers = 3, 61
    listed = {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense)}
    listed |= {"layer_types": ["indexed_attention"] * layers}
    assert ModelConfig.from_hf(V32 | listed) == ModelConfig.from_hf(V32)
    for name, value in (("mlp_layer_types", ["sparse"] * layers), ("layer_types", ["full_attention"] * layers)):
        assert refusal(V32 | {name: value}).startswith(f"{name}=")


def test_kimi_k2_keeps_pairs_to_19_and_interpolates_from_20():
    yarn = ModelConfig.from_hf(KIMI).rope_scaling
    plain, scaled = (rotary_frequencies(64, 50000.0, y, torch.device("cpu")) for y in (None, yarn))
    assert torch.equal((plain / scaled).round(decimals=9), torch.tensor([1.0] * 20 + [32.0] * 12, dtype=torch.float64))


def test_type_of_another_name_is_read_by_its_architecture():
    read = ModelConfig.from_hf(KIMI | {"model_type": "deepseek_v3"})
    assert ModelConfig.from_hf(KIMI) == read
    for fields in ({"architectures": ["LlamaForCausalLM"]}, {"architectures": None}, {"model_type": "llama"}):
        assert refusal(KIMI | fields).startswith("model_type=")
    assert refusal(V3 | {"architectures": ["DeepseekV4ForCausalLM"]}).startswith("model_type='deepseek_v3': only")


def test_v3_cut_to_fewer_layers_has_dense_layers_only():
    config = ModelConfig.from_hf(V3 | {"num_hidden_layers": 2})
    assert (config.num_hidden_layers, config.first_k_dense_replace, config.num_moe_layers) == (2, 2, 0)


def test_widths_that_are_no_multiple_of_8_are_counted():
    config = ModelConfig.from_hf(V2_LITE | {"hidden_size": 2047, "moe_intermediate_size": 1409})
    assert cost.expert_parameters(config) == 3 * 2047 * 1409


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "float32", "eos_token_id": [1, 2], "use_cache": False, "ep_size": 8, "pretraining_tp": 2},
        {"num_key_value_heads": 1, "attention_dropout": None, "seq_aux": False, "auto_map": {}, "new_field": {"a": []}},
        {"rope_scaling": YARN | {"beta_fast": None, "truncate": True, "attention_factor": 1.0, "rope_theta": 10000}},
        {"rope_scaling": None, "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000.0}},
    ],
)
def test_fields_that_change_nothing_are_accepted(changes):
    assert ModelConfig.from_hf(V3 | changes) == ModelConfig.from_hf(V3)


def test_greedy_selection_has_no_groups():
    assert ModelConfig.from_hf(V2_LITE | {"n_group": 8, "topk_group": 3}) == ModelConfig.from_hf(V2_LITE)


@pytest.mark.parametrize(
    "model, field, value",
    [
        (V3, "scoring_func", "softmax"),
        (V3, "topk_method", "greedy"),
        (V3, "norm_topk_prob", None),
        (V3, "n_group", None),
        (V3, "attention_dropout", 0.1),
        (V3, "sliding_window", 4096),
        (V3, "partial_rotary_factor", 0.5),
        (V3, "rope_interleave", None),
        (V3, "original_max_position_embeddings", 8192),
        (V2, "norm_topk_prob", True),
        (V2, "scoring_func", "sigmoid"),
        (V2, "topk_method", "noaux_tc"),
        (V2, "mlp_bias", True),
    ],
)
def test_fields_that_change_the_arithmetic_are_refused_by_name(model, field, value):
    assert refusal(model | {field: value}).startswith(f"{field}={value!r}: ")


@pytest.mark.parametrize("field", ["q_lora_rank", "n_shared_experts", "n_routed_experts"])
def test_fields_that_readers_fill_in_differently_must_be_named(field):
    fields = {name: value for name, value in V3.items() if name != field}
    assert refusal(fields) == f"config.json lacks {field!r}, which a deepseek_v3 model needs"


@pytest.mark.parametrize(
    "change, field",
    [
        ({"truncate": False}, "truncate"),
        ({"attn_factor": 2}, "attn_factor"),
        ({"type": None}, "rope_type"),
        ({"type": "linear"}, "rope_type"),
        ({"factor": None}, "rope_scaling"),
        ({"attention_factor": 0.5}, "attention_factor"),
        ({"factor": 1, "attention_factor": 1.5}, "attention_factor"),
        ({"mscale_all_dim": None, "mscale": 0.707}, "rope_scaling"),
        ({"mscale": 0.0}, "rope_scaling"),
    ],
)
def test_yarn_that_readers_compute_differently_is_refused(change, field):
    assert refusal(V3 | {"rope_scaling": YARN | change}).startswith(f"{field}=")


def test_an_attention_factor_is_honoured_as_mscale():
    scaling = YARN | {"attention_factor": 1.2}
    assert ModelConfig.from_hf(V3 | {"rope_scaling": scaling | {"mscale_all_dim": 0.0}}).rope_scaling.mscale == (
        pytest.approx(0.2 / (0.1 * math.log(40)))
    )
    for yarn in (YaRN(mscale=0.707, mscale_all_dim=0.0), YaRN(mscale=0.0), YaRN(factor=1.0, mscale=0.0)):
        config = ModelConfig.preset("v3", rope_scaling=yarn)
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))).rope_scaling == yarn
    assert "attention_factor" not in ModelConfig.from_hf(V3).to_hf()["rope_scaling"]  # written as released


def test_a_mixture_of_one_expert_is_not_exported():
    one = ModelConfig.preset("v3", n_routed_experts=1, num_experts_per_tok=1, n_group=1, topk_group=1)
    with pytest.raises(ValueError, match="^n_routed_experts=1: transformers' DeepSeek-V3 needs at least 2$"):
        one.to_hf()


# Mutated configs.

HUGE = 10**400
LEAVES = st.none() | st.integers() | st.floats() | st.text()
VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 7, 0.5, 1e400, float("nan"), HUGE, 2**62, "", "yarn", "llama"]),
    st.sampled_from([[], {}, [None], [[]], {"type": "yarn"}, {"type": []}, {"rope_type": {}}, {"a": 1}]),
    st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4),
)
NAMES = sorted({name for config in CONFIGS.values() for name in config} | {"rope_parameters", "mlp_bias", "head_dim"})
ROPE_NAMES = [*YARN, "rope_type", "rope_theta", "truncate", "attention_factor", "partial_rotary_factor"]


@settings(deadline=None, max_examples=300)
@given(
    model=st.sampled_from(sorted(CONFIGS)),
    changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
    removed=st.sets(st.sampled_from(NAMES), max_size=2),
    in_rope=st.dictionaries(st.sampled_from(ROPE_NAMES), VALUES, max_size=2),
)
@example(model="v3_1", changes={"architectures": [[]]}, removed=set(), in_rope={})
@example(model="v3_1", changes={"vocab_size": HUGE}, removed=set(), in_rope={})
@example(model="v2", changes={}, removed=set(), in_rope={"factor": HUGE})
@example(model="v2", changes={"model_type": "llama", "intermediate_size": HUGE}, removed=set(), in_rope={})
@example(model="v2", changes={"first_k_dense_replace": "1"}, removed=set(), in_rope={})
def test_a_mutated_config_is_counted_or_refused_in_one_line(tmp_path_factory, model, changes, removed, in_rope):
    fields = {name: value for name, value in (CONFIGS[model] | changes).items() if name not in removed}
    if in_rope and isinstance(fields.get("rope_scaling"), dict):
        fields["rope_scaling"] = fields["rope_scaling"] | in_rope
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(fields))
    try:
        config = cost.read_config(str(path))
        figures = cost.figures(config)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["total_parameters"] >= figures["active_parameters"] > 0
