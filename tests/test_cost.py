"""What a config costs: every figure of FACTS.md that a config determines, the module tree, and torch's FLOP counter."""

from collections import Counter

import pytest
import torch
from cost_configs import LLAMA, LLM_67B, NANO, QWEN, SPARSE, V2, V2_LITE, V3, V3_2, gqa
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minids import cost
from minids.config import PRESETS, ModelConfig
from minids.model.moe import sequence_balance_loss
from minids.model.rope import softmax_scale, yarn_ramp_bounds
from minids.model.transformer import MiniDS

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
    "router.weight": "router", "router.bias": "balance_bias", "k_norm.bias": "norms", ".attention.": "attention",
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
    "sparse attention": SPARSE,
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


@torch.no_grad()
def test_flops_of_sparse_attention_are_what_torch_counts():
    """Short of what the formula leaves out, and of the query latent, which the model computes twice."""
    config = SPARSE.replace(v_head_dim=24, first_k_dense_replace=3)
    latent = 2 * config.hidden_size * config.q_lora_rank

    def apart(tokens, pairs):
        return config.num_hidden_layers * (tokens * latent + 2 * config.index_n_heads * pairs)

    model, keys = MiniDS(config), 40
    few = torch.zeros(1, 5, dtype=torch.int64)  # more than index_topk: expanded, with a mask
    flops = counted(lambda: model(few))
    assert flops == 5 * cost.prefill_flops_per_token(config, 5, causal=False) + apart(5, 25)
    cache = model.new_cache(1, keys)
    cache.advance(keys - 1)
    flops = counted(lambda: model(few[:, :1], cache=cache))
    cut_off = 2 * config.num_attention_heads * config.qk_rope_head_dim * config.index_topk
    apart_from_formula = apart(1, keys) + config.num_hidden_layers * cut_off
    assert flops == cost.decode_flops_per_token(config, keys) + apart_from_formula


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


# Sparse attention (AFTER_V3) ----------------------------------------------------------------------------------------


def test_an_indexer_has_14_million_parameters_a_layer():
    assert cost.indexer_parameters(V3_2, norm=True) == 13_959_424 == 1536 * 8192 + 7168 * 128 + 2 * 128 + 7168 * 64
    assert cost.num_parameters(V3_2) - cost.num_parameters(V3) == 61 * 13_959_424
    assert cost.num_parameters(V3_2) - 58 * 256 == 671_877_929_216  # as transformers counts, without routing biases
    assert cost.indexer_parameters(V3) == cost.indexer_flops_per_key(V3) == 0


def test_cache_of_v3_2_is_48068_bytes_a_token():
    """FlashMLA's layout: 656 bytes a layer, and 132 of the index key."""
    assert cost.fp8_kv_bytes_per_token(V3) == 61 * 656 == 40_016
    assert cost.fp8_kv_bytes_per_token(V3_2) == 61 * (656 + 132) == 48_068
    assert cost.kv_values_per_layer(V3_2) == 576 + 128
    with pytest.raises(ValueError, match="attention='gqa'"):
        cost.fp8_kv_bytes_per_token(QWEN)


def test_flops_per_pair_and_where_sparse_attention_breaks_even():
    assert cost.indexer_flops_per_key(V3_2) == 16_384
    assert cost.attention_flops_per_key(V3_2, absorbed=True) == 278_528
    assert cost.attention_flops_per_key(V3_2) == 81_920
    assert cost.sparse_break_even_tokens(V3_2) == 2_176
    assert cost.sparse_break_even_tokens(V3_2, prefill=True) == 17_408


def attention_flops(flops_per_token, config, length):
    return flops_per_token(config, length) - 2 * cost.matmul_parameters(config)


def test_decoding_at_128k_takes_13_times_fewer_flops_in_attention():
    dense, sparse = (attention_flops(cost.decode_flops_per_token, config, 2**17) for config in (V3, V3_2))
    assert dense / sparse == pytest.approx(13.4, abs=0.05)
    for length, cheaper in ((2175, False), (2177, True)):
        both = (attention_flops(cost.decode_flops_per_token, config, length) for config in (V3_2, V3))
        assert (next(both) < next(both)) == cheaper


def test_sparse_prefill_takes_the_cheaper_form():
    """Masked MHA for short prompts, as V3.2-Exp section 3 does; then the indexer is what is added."""
    for length in (1000, 4096):
        both = [attention_flops(cost.prefill_flops_per_token, config, length) for config in (V3, V3_2)]
        assert both[1] - both[0] == 61 * 16_384 * length / 2
    for length in (17_408, 2**17):  # the first 2048 queries see fewer keys, so it breaks even a little earlier
        both = [attention_flops(cost.prefill_flops_per_token, config, length) for config in (V3, V3_2)]
        assert both[1] < both[0]
    assert both[0] / both[1] == pytest.approx(3.3, abs=0.05)


def test_tokens_of_the_two_training_stages():
    """Stage 1: 1000 steps of 16 sequences of 128K; stage 2: 15,000 steps of 480 (V3.2-Exp section 2.1)."""
    assert 1000 * 16 * 2**17 == pytest.approx(2.1e9, rel=0.005)
    assert 15_000 * 480 * 2**17 == pytest.approx(943.7e9, rel=1e-4)


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
