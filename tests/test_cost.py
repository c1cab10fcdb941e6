"""What a config costs: every figure of FACTS.md that a config determines, the module tree, and torch's FLOP counter."""

import inspect
import json
from collections import Counter
from typing import Literal, get_args, get_origin

import pytest
import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minids import cost
from minids.config import PRESETS, ModelConfig
from minids.model.layers import softmax_scale, yarn_ramp_bounds
from minids.model.moe import sequence_balance_loss
from minids.model.transformer import MiniDS

V3, V2, V2_LITE = (ModelConfig.preset(name) for name in ("v3", "v2", "v2_lite"))
NANO = ModelConfig.preset("nano")
QWEN_72B = dict(
    model_type="qwen2", vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, sliding_window=131072, use_sliding_window=False,
    tie_word_embeddings=False,
)  # fmt: skip
LLAMA_405B = dict(
    model_type="llama", vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
    num_attention_heads=128, num_key_value_heads=8,
)  # fmt: skip
QWEN, LLAMA = cost.dense_config(QWEN_72B), cost.dense_config(LLAMA_405B)
LLM_67B = LLAMA.replace(num_hidden_layers=95, first_k_dense_replace=95)  # the cache alone: 8 key heads of 128


def gqa(config, kv_heads):
    return config.replace(attention="gqa", num_key_value_heads=kv_heads)


# FACTS.md section 12, row by row -----------------------------------------------------------------------------------

# ISCA rounds 7168 channels to 7K. One copy is dispatched with 1 byte and combined with 2 bytes per channel.
LINK_SECONDS = cost.expert_link_seconds(32, 9, 3 * 7000, 50e9)
TOKENS_PER_STEP, SECONDS_PER_STEP = 15360 * 4096, 19.926
TOKENS_PER_DAY = cost.tokens_per_day(TOKENS_PER_STEP, SECONDS_PER_STEP)
TOKENS_PER_SECOND = TOKENS_PER_DAY / 86400 / 2048  # of one GPU
DAY_6_USD = cost.rent_usd(226.75 * 8 * 24)


def balanced_loss():
    """32 tokens that share 256 experts equally: token t prefers the experts 8t to 8t+7."""
    scores = torch.full((1, 32, 256), 0.1, dtype=torch.float64)
    for token in range(32):
        scores[0, token, 8 * token : 8 * token + 8] = 0.9
    return V3.aux_loss_alpha * sequence_balance_loss(scores, V3.num_experts_per_tok).item()


def mfu(causal):
    return 100 * cost.mfu(TOKENS_PER_SECOND, cost.training_flops_per_token(V3, 4096, causal=causal))


def makespan(stages, micro_batches):
    """Where an overlapped pair takes as long as its two parts, a rank is busy for all its chunks, or in the bubble."""
    return micro_batches * (1 + 2) + cost.pipeline_bubble("dualpipe", stages)


SECTION_12 = [  # row, quantity, computed, expected, by how much rounding may move it
    (1, "V3 total", cost.num_parameters(V3), 671_026_419_200, 0),
    (2, "V3 active", cost.num_parameters(V3, active=True), 37_552_297_472, 0),
    (2, "V3 matmul", cost.matmul_parameters(V3), 36_624_596_992, 0),
    (3, "one expert", cost.expert_parameters(V3), 44_040_192, 0),
    (3, "% in routed experts", 100 * cost.parameters(V3)["routed_experts"] / cost.num_parameters(V3), 97.4, 0.05),
    (4, "attention with its norms", cost.attention_parameters(V3) + V3.q_lora_rank + V3.kv_lora_rank, 187_107_328, 0),
    (5, "V2 total", cost.num_parameters(V2), 235_741_434_880, 0),
    (5, "V2-Lite total", cost.num_parameters(V2_LITE), 15_706_484_224, 0),
    (6, "MLA values", cost.kv_values_per_layer(V3), 576, 0),
    (6, "MLA bytes", cost.kv_bytes_per_token(V3), 70_272, 0),
    (7, "Qwen2.5-72B bytes", cost.kv_bytes_per_token(QWEN), 327_680, 0),
    (7, "Llama-3.1-405B bytes", cost.kv_bytes_per_token(LLAMA), 516_096, 0),
    (8, "MHA / MLA", cost.kv_bytes_per_token(gqa(V3, 128)) / cost.kv_bytes_per_token(V3), 56.9, 0.05),
    (9, "% less, 6 bits", 100 * (1 - cost.kv_bytes_per_token(V2, 6) / cost.kv_bytes_per_token(LLM_67B)), 93.34, 0.005),
    (9, "% less, equal", 100 * (1 - cost.kv_bytes_per_token(V2) / cost.kv_bytes_per_token(LLM_67B)), 82.24, 0.005),
    (10, "softmax scale", softmax_scale(V3.qk_head_dim, V3.rope_scaling), 0.1352338, 5e-8),
    (11, "YaRN low pair", yarn_ramp_bounds(V3.qk_rope_head_dim, V3.rope_theta, V3.rope_scaling)[0], 10, 0),
    (11, "YaRN high pair", yarn_ramp_bounds(V3.qk_rope_head_dim, V3.rope_theta, V3.rope_scaling)[1], 23, 0),
    (12, "V3 training GFLOPs", cost.training_flops_per_token(V3, 4096) / 1e9, 250.45, 0.005),
    (12, "V2 training GFLOPs", cost.training_flops_per_token(V2, 4096) / 1e9, 155.30, 0.005),
    (13, "tokens per step", TOKENS_PER_STEP, 62_914_560, 0),
    (13, "billion tokens per day", TOKENS_PER_DAY / 1e9, 272.8, 0.05),
    (14, "% MFU causal", mfu(causal=True), 39.0, 0.05),
    (14, "% MFU non-causal", mfu(causal=False), 43.8, 0.05),
    (15, "thousand GPU-hours per T tokens", cost.V3_GPU_HOURS["pre-training"] / 14.8 / 1e3, 180, 0.5),
    (15, "days per T tokens", 180e3 / 24 / 2048, 3.66, 0.005),
    (16, "V3's bill", sum(map(cost.rent_usd, cost.V3_GPU_HOURS.values())), 5_576_000, 0),
    (17, "experts", cost.expert_link_seconds(1, 4, 1, 50e9) / cost.expert_link_seconds(1, 1, 1, 160e9), 12.8, 1e-9),
    (18, "ms on links", 2 * 61 * LINK_SECONDS * 1e3, 14.76, 0.005),
    (18, "tokens per second", cost.decode_bound(LINK_SECONDS, 61), 67.8, 0.05),
    (19, "bubble", cost.pipeline_bubble("dualpipe", 8), 6, 0),
    (19, "makespan", makespan(8, 20), 66, 0),
    (20, "R1's GPU-hours", sum(cost.R1_GPU_HOURS.values()), 147e3, 0),
    (20, "R1's bill", sum(map(cost.rent_usd, cost.R1_GPU_HOURS.values())), 294e3, 0),
    (21, "day 6", DAY_6_USD, 87_072, 0),
    (21, "% margin", 100 * cost.margin(562_027, DAY_6_USD), 545, 0.5),
    (22, "billion tokens at 32K", 1000 * 1920 * 32768 / 1e9, 62.9, 0.05),
    (22, "billion tokens at 128K", 1000 * 480 * 131072 / 1e9, 62.9, 0.05),
    (24, "balance loss", balanced_loss(), 1e-4, 1e-12),
]


@pytest.mark.parametrize("row, quantity, computed, expected, rounding", SECTION_12)
def test_the_published_numbers_follow_from_the_configs(row, quantity, computed, expected, rounding):
    assert abs(computed - expected) <= rounding, f"row {row}, {quantity}: {computed}, expected {expected}"


def test_every_row_is_there_but_the_expert_placement():
    assert {row for row, *_ in SECTION_12} == set(range(1, 25)) - {23}


# Parameters against the module tree --------------------------------------------------------------------------------

PARTS = {  # by a word in the name of a parameter; the first that fits
    "router.weight": "router", "router.bias": "balance_bias", ".attention.": "attention",
    ".shared.": "shared_experts", ".experts.": "routed_experts", ".ffn.": "dense_ffn", "embedding": "embedding",
    "head": "head",
}  # fmt: skip
SHAPES = {name: ModelConfig.preset(name) for name in PRESETS} | {
    "two prediction modules": NANO.replace(num_nextn_predict_layers=2),
    "dense, with a prediction module": NANO.replace(first_k_dense_replace=3),
    "GQA": gqa(NANO, 2).replace(v_head_dim=24),
    "MQA": gqa(NANO, 1),
    "no shared expert, greedy": NANO.replace(n_shared_experts=0, topk_method="greedy", topk_group=4),
    "Llama-3.1-405B": LLAMA,
}


def on_meta(config):
    with torch.device("meta"):
        return MiniDS(config)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_of_the_module_tree(config):
    model = on_meta(config)
    found = Counter()
    for name, weight in model.named_parameters():
        if not name.startswith("mtp."):
            norm = weight.ndim == 1 and not name.endswith("bias")
            found["norms" if norm else next(part for word, part in PARTS.items() if word in name)] += weight.numel()
    assert {part: count for part, count in cost.parameters(config).items() if count} == found
    assert cost.num_parameters(config) == model.num_parameters()
    assert cost.num_parameters(config, active=True) == model.num_active_parameters()
    assert cost.mtp_parameters(config) == model.num_parameters(mtp=True) - model.num_parameters()
    caches = model.new_cache(1, 1)
    assert cost.kv_bytes_per_token(config, 32) == caches.num_bytes()


# FLOPs against a count of what torch multiplies --------------------------------------------------------------------


def counted(function):
    """FLOPs of all matrix products, attention's too: the fused kernels for a CPU are not counted, so not these."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


UNPADDED = NANO.replace(v_head_dim=24)  # values as wide as keys, which the fused kernels make them anyway
COUNTED = {
    "MLA, experts": UNPADDED,
    "MLA, one W_Q": UNPADDED.replace(q_lora_rank=None),
    "no shared expert": UNPADDED.replace(n_shared_experts=0),
    "GQA, dense": gqa(NANO, 2).replace(first_k_dense_replace=3),
}


@pytest.mark.parametrize("config", COUNTED.values(), ids=COUNTED)
def test_prefill_flops_are_what_torch_counts(config):
    tokens = torch.zeros(1, 3, dtype=torch.int64)  # so few that experts are read token by token, without padding
    flops = counted(torch.no_grad()(lambda: MiniDS(config)(tokens)))
    assert flops == 3 * cost.prefill_flops_per_token(config, 3, causal=False)


@pytest.mark.parametrize("config", COUNTED.values(), ids=COUNTED)
def test_decode_flops_are_what_torch_counts(config):
    model, keys = MiniDS(config), 40
    cache = model.new_cache(1, keys)
    cache.advance(keys - 1)
    flops = counted(torch.no_grad()(lambda: model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)))
    # Values are the cache entries themselves; the model multiplies their rotated part too and cuts it off.
    cut_off = config.qk_rope_head_dim if config.attention == "mla" else 0
    cut_off_flops = config.num_hidden_layers * 2 * config.num_attention_heads * cut_off * keys
    assert flops == cost.decode_flops_per_token(config, keys) + cut_off_flops


def test_training_flops_are_what_torch_counts():
    config = COUNTED["GQA, dense"]
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    flops = counted(lambda: MiniDS(config)(tokens).logits.sum().backward())
    assert flops == 8 * cost.training_flops_per_token(config, 8, causal=False)


def test_causal_attention_is_half_of_all():
    attention, keys = 3 * 4 * 2 * (24 + 24), 1024  # layers, heads, multiply-adds, widths of key and value
    all_keys = cost.prefill_flops_per_token(UNPADDED, keys, causal=False)
    assert all_keys - cost.prefill_flops_per_token(UNPADDED, keys) == attention * keys / 2


def test_flops_of_other_published_models():
    """FACTS.md section 7.2, in GFLOPs per training token; section 2 for the absorbed decode."""
    assert cost.training_flops_per_token(V3, 4096, causal=False) / 1e9 == pytest.approx(281.15, abs=0.005)
    assert cost.training_flops_per_token(QWEN, 4096) / 1e9 == pytest.approx(444.9, abs=0.05)
    assert cost.training_flops_per_token(LLAMA, 4096) / 1e9 == pytest.approx(2473.2, abs=0.05)
    assert cost.attention_flops_per_key(V3, absorbed=True) == 278_528
    by_byte = cost.attention_flops_per_key(V3, absorbed=True) / (2 * cost.kv_values_per_layer(V3))
    assert by_byte == pytest.approx(241.8, abs=0.05)


# Cache, hours, memory, bubbles, links ------------------------------------------------------------------------------


def test_caches_of_section_2_1():
    assert cost.kv_bytes_per_token(gqa(V3, 128)) == 3_997_696
    assert cost.kv_bytes_per_token(LLM_67B) == 389_120
    assert cost.kv_bytes_per_token(V2) == 69_120
    assert cost.kv_bytes_per_token(V2_LITE) == 31_104
    assert cost.kv_bytes_per_token(gqa(V2_LITE, 16)) == 2 * 110_592
    assert cost.kv_bytes_per_token(gqa(V3, 1)) == 61 * 2 * 128 * 2
    assert cost.kv_bytes_per_token(V3, 8) == 35_136
    for config, ratio in ((QWEN, 4.66), (LLAMA, 7.34)):
        assert cost.kv_bytes_per_token(config) / cost.kv_bytes_per_token(V3) == pytest.approx(ratio, abs=0.005)


def test_hours_by_throughput_and_by_utilisation_agree_with_the_reported_ones():
    flops = cost.training_flops_per_token(V3, 4096)
    by_throughput = cost.gpu_hours_by_throughput(14.8e12, TOKENS_PER_SECOND)
    by_mfu = cost.gpu_hours_by_mfu(14.8e12 * flops, cost.mfu(TOKENS_PER_SECOND, flops))
    assert by_mfu == pytest.approx(by_throughput, rel=1e-12)
    assert by_throughput == pytest.approx(cost.V3_GPU_HOURS["pre-training"], rel=0.002)
    assert by_throughput / 24 / 2048 == pytest.approx(54.2, abs=0.1)
    assert cost.gpu_hours_by_mfu(3600e12, 0.5, peak_flops=1e12) == 2


def test_zero_shards_one_thing_more_at_each_stage():
    at = [cost.zero_bytes_per_gpu(100, 10, stage, weight=1, gradient=4, optimizer=12) for stage in range(4)]
    assert [list(sizes.values()) for sizes in at] == [[100, 400, 1200], [100, 400, 120], [100, 40, 120], [10, 40, 120]]
    v3 = cost.num_parameters(V3)
    assert cost.zero_bytes_per_gpu(v3, 2048, 0)["optimizer"] / 1e12 == pytest.approx(5.37, abs=0.005)
    assert cost.zero_bytes_per_gpu(v3, 1, 1, optimizer=12)["optimizer"] / 1e12 == pytest.approx(8.05, abs=0.005)
    assert cost.zero_bytes_per_gpu(v3, 2048, 1)["optimizer"] / 1e9 == pytest.approx(2.62, abs=0.005)


@pytest.mark.parametrize(
    "stages, times, dualpipe, one_f_one_b, zb1p",
    [
        (4, (1, 2, 1, 3), 2, 9, 3),
        (8, (1, 2, 1, 3), 6, 21, 7),
        (16, (1, 2, 1, 3), 14, 45, 15),
        (8, (1, 2, 1, 2.5), 4.5, 21, 7),
        (8, (1, 2, 0.5, 3), 10.5, 21, 14),
        (8, (1, 1.5, 1, 2.5), 3, 17.5, 3.5),
    ],
)
def test_bubbles_of_section_6_1(stages, times, dualpipe, one_f_one_b, zb1p):
    assert cost.pipeline_bubble("dualpipe", stages, *times) == dualpipe
    assert cost.pipeline_bubble("one_f_one_b", stages, *times) == one_f_one_b
    assert cost.pipeline_bubble("zb1p", stages, *times) == zb1p


def test_links_ten_times_faster_and_the_width_unrounded():
    assert cost.expert_link_seconds(32, 9, 3 * 7000, 50e9) * 1e6 == pytest.approx(120.96, abs=0.005)
    faster = cost.expert_link_seconds(32, 9, 3 * 7000, 900e9)
    assert faster * 1e6 == pytest.approx(6.72, abs=0.005)
    assert cost.decode_bound(faster, 61) == pytest.approx(1200, rel=0.02)  # printed as about 1200
    exact = cost.expert_link_seconds(32, 9, 3 * V3.hidden_size, 50e9)
    assert cost.decode_bound(exact, 61) == pytest.approx(67.76 * 7000 / 7168, abs=0.01)


def test_owning_costs_more_the_less_it_is_used():
    """10 USD of capital a day and 2 kW at 0.25 USD: 22 USD a day, over 24 hours of use or over 12."""
    fully = cost.owned_usd_per_gpu_hour(365 * 4 * 10, 4, 2, 0.25, 1)
    assert fully == pytest.approx(22 / 24)
    assert cost.owned_usd_per_gpu_hour(365 * 4 * 10, 4, 2, 0.25, 0.5) == pytest.approx(22 / 12)
    assert cost.margin(3, 2) == 0.5 and cost.margin(1, 2) == -0.5


# What is refused ---------------------------------------------------------------------------------------------------

VALID = {
    cost.prefill_flops_per_token: dict(config=NANO, seq_len=8),
    cost.decode_flops_per_token: dict(config=NANO, keys=8),
    cost.training_flops_per_token: dict(config=NANO, seq_len=8),
    cost.kv_bytes_per_token: dict(config=NANO, bits=16),
    cost.tokens_per_day: dict(tokens_per_step=8, seconds_per_step=1.5),
    cost.mfu: dict(tokens_per_second=8.0, flops_per_token=2, peak_flops=1e3),
    cost.gpu_hours_by_throughput: dict(tokens=8, tokens_per_second=2),
    cost.gpu_hours_by_mfu: dict(total_flops=8, utilisation=0.5, peak_flops=1e3),
    cost.rent_usd: dict(gpu_hours=8, usd_per_gpu_hour=2),
    cost.owned_usd_per_gpu_hour: dict(
        capital_usd=8, years=4, kilowatts=1, usd_per_kilowatt_hour=0.1, utilisation=0.5
    ),
    cost.margin: dict(revenue_usd=8, cost_usd=2),
    cost.zero_bytes_per_gpu: dict(count=8, gpus=2, stage=1, weight=2, gradient=4, optimizer=8),
    cost.pipeline_bubble: dict(schedule="dualpipe", stages=4, F=1, B=2, W=1, FB=3),
    cost.expert_link_seconds: dict(tokens=8, copies=2, bytes_per_copy=3, bytes_per_second=1e3),
    cost.decode_bound: dict(link_seconds=1e-3, layers=2),
    cost.figures: dict(config=NANO, context=8, utilisation=0.5, usd=2),
}  # fmt: skip
CASES = [(f, name) for f, valid in VALID.items() for name in valid if name != "config"]


def refused(function, name, value):
    with pytest.raises(ValueError) as caught:
        function(**VALID[function] | {name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: ") and "\n" not in str(caught.value)


def test_every_formula_is_tested_with_bad_inputs():
    own = {f for f in vars(cost).values() if inspect.isfunction(f) and f.__module__ == cost.__name__}
    assert VALID.keys() >= {f for f in own if hasattr(f, "__wrapped__")}
    for function in own:
        kinds = [p.annotation for p in inspect.signature(function).parameters.values()]
        takes_numbers = any(kind in (int, float, cost.Share) for kind in kinds)
        assert not takes_numbers or function in VALID, f"{function.__name__} takes a number that nobody checks"
    for function, valid in VALID.items():
        assert valid.keys() == inspect.signature(function).parameters.keys() - {"causal"}


@pytest.mark.parametrize("function, name", CASES, ids=[f"{f.__name__}-{name}" for f, name in CASES])
def test_negative_zero_and_impossible_inputs_are_refused_in_one_line(function, name):
    assert function(**VALID[function])
    kind = inspect.signature(function).parameters[name].annotation
    bad = [-1, float("nan"), float("inf"), -float("inf"), "8", None]
    if get_origin(kind) is Literal:
        bad += [max(get_args(kind)) * 2]
    else:
        bad += [0, 0.0, True]
    if kind is int:
        bad += [1.5]
    if kind is cost.Share:
        bad += [1.01]
    for value in bad:
        refused(function, name, value)


def test_inputs_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="^mfu=2.0: no GPU exceeds its peak$"):
        cost.mfu(1e3, 2, peak_flops=1e3)
    with pytest.raises(ValueError, match="^stages=7: must be even for dualpipe$"):
        cost.pipeline_bubble("dualpipe", 7)
    assert cost.pipeline_bubble("zb1p", 7) == 6
    with pytest.raises(ValueError, match=r"^W=2: must be less than the backward B=2"):
        cost.pipeline_bubble("one_f_one_b", 8, W=2)
    with pytest.raises(ValueError, match=r"^W=1.9: is so long that the bubble would be negative$"):
        cost.pipeline_bubble("dualpipe", 8, W=1.9)


# Reading configs ---------------------------------------------------------------------------------------------------


def written(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_config_json_is_the_config_it_describes(tmp_path):
    assert cost.read_config("v3") == V3
    read = cost.read_config(written(tmp_path, V3.to_hf()))
    assert cost.figures(read) == cost.figures(V3)
    assert cost.read_config(written(tmp_path, QWEN_72B)) == QWEN
    wide_heads = cost.read_config(written(tmp_path, LLAMA_405B | {"model_type": "mistral", "head_dim": 256}))
    assert cost.attention_parameters(wide_heads) == 2 * cost.attention_parameters(LLAMA)
    mha = cost.dense_config(LLAMA_405B | {"num_key_value_heads": None})
    assert cost.kv_values_per_layer(mha) == 2 * 16384


def test_dense_models_count_as_transformers_builds_them():
    transformers = pytest.importorskip("transformers")
    shape = dict(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    for kind, sizes in (("llama", {}), ("mistral", {"head_dim": 32, "sliding_window": None}), ("qwen2", {})):
        fields = transformers.AutoConfig.for_model(kind, **shape, **sizes)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(fields)
        weights = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
        config = cost.dense_config(fields.to_dict())
        assert cost.num_parameters(config) == cost.num_parameters(config, active=True) == weights
        assert cost.mtp_parameters(config) == 0


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "neither a preset (nano, tiny, small, medium, v2_lite, v2, v3) nor a config.json"),
        ("[1]", "must hold an object"),
        ({"model_type": "gpt2"}, "model_type='gpt2': must be one of deepseek_v2, deepseek_v3, llama, mistral, qwen2"),
        ({}, "model_type=None: must be one of"),
        (LLAMA_405B | {"hidden_size": None}, "hidden_size=None: must be a whole number, at least 1"),
        (LLAMA_405B | {"num_attention_heads": 0}, "num_attention_heads=0: must be a whole number, at least 1"),
        (LLAMA_405B | {"num_hidden_layers": -1}, "num_hidden_layers=-1: must be"),
        (LLAMA_405B | {"num_key_value_heads": 7}, "num_key_value_heads=7: must divide"),
        (LLAMA_405B | {"head_dim": "128"}, "v_head_dim='128': must be a whole number"),
        (LLAMA_405B | {"tie_word_embeddings": True}, "tie_word_embeddings=True: only separate ones"),
        (QWEN_72B | {"use_sliding_window": True}, "sliding_window=131072: only attention to the whole"),
        (QWEN_72B | {"model_type": "deepseek_v3"}, "config.json lacks 'kv_lora_rank'"),
    ],
)
def test_a_config_json_that_cannot_be_costed_gets_one_line(tmp_path, content, complaint):
    with pytest.raises(ValueError) as caught:
        cost.read_config(written(tmp_path, content))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


# The command -------------------------------------------------------------------------------------------------------


def report(capsys, *arguments):
    tyro.cli(cost.cost_report, args=list(arguments))
    return capsys.readouterr().out


def test_the_report_is_a_table_of_v3(capsys):
    rows = dict(line.rsplit(maxsplit=1) for line in report(capsys).splitlines()[1:])
    assert rows["total parameters"] == "671,026,419,200"
    assert rows["training flops per token"] == "250,449,887,232"
    assert rows["kv bytes per token"] == "70,272"
    assert int(rows["gpu hours per trillion tokens"].replace(",", "")) == pytest.approx(180e3, rel=0.005)


def test_the_figures_are_those_of_the_formulas():
    figures = cost.figures(V3, context=1024, utilisation=0.5, usd=3)
    assert figures["active_parameters"] == 37_552_297_472 and figures["mtp_parameters"] == 11_610_068_224
    assert figures["training_bytes_unsharded"] == 14 * figures["total_parameters"]
    assert figures["kv_bytes_per_token_as_mha"] == 3_997_696
    assert figures["training_flops_per_token"] == cost.training_flops_per_token(V3, 1024)
    assert figures["decode_flops_per_token"] == cost.decode_flops_per_token(V3, 1024)
    hours = 1e12 * figures["training_flops_per_token"] / (0.5 * 989.5e12) / 3600
    assert figures["gpu_hours_per_trillion_tokens"] == pytest.approx(hours)
    assert figures["usd_per_trillion_tokens"] == pytest.approx(3 * hours)


def test_several_stand_side_by_side(capsys, tmp_path):
    path = written(tmp_path, LLAMA_405B)
    out = report(capsys, "v3", "v2", "--compare", "nano", path)
    header, *rows = out.splitlines()
    assert header.split() == ["v3", "v2", "nano", path]
    assert len({len(row) for row in (header, *rows)}) == 1
    (cache,) = (row for row in rows if row.startswith("kv bytes per token  "))
    assert cache.split()[-4:] == ["70,272", "69,120", "240", "516,096"]


def test_json_holds_the_figures(capsys):
    models = json.loads(report(capsys, "v2_lite", "--compare", "v3", "--json"))
    assert list(models) == ["v2_lite", "v3"]
    assert models["v3"] == cost.figures(V3)
    parts = [count for name, count in models["v3"].items() if name.removesuffix("_parameters") in cost.parameters(V3)]
    assert sum(parts) == models["v3"]["total_parameters"] == 671_026_419_200


@pytest.mark.parametrize("name", ["v4", "", "no/such/config.json", "."])
def test_an_unknown_name_gets_one_line(name):
    with pytest.raises(ValueError) as caught:
        cost.cost_report("v3", name)
    message = str(caught.value)
    assert message.startswith(f"{name!r}: neither a preset (nano, tiny") and "\n" not in message
