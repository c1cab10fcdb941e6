"""Attention in all its forms: per-head loops = expanded = absorbed = chunk by chunk = token by token."""

import dataclasses

import plain_model as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import NANO, build, random_stream, random_tokens, through_cache, without_cache

from minids.config import ModelConfig, YaRN
from minids.model.attention import GroupedQueryAttention
from minids.model.block import Block
from minids.model.kv_cache import KVCache
from minids.model.mla import MultiHeadLatentAttention
from minids.model.transformer import MiniDS

SHAPES = {
    "as V3": NANO,
    "no query compression": NANO.replace(q_lora_rank=None),
    "values wider than keys": NANO.replace(v_head_dim=40),
    "odd widths": NANO.replace(v_head_dim=5, qk_nope_head_dim=3, kv_lora_rank=7, q_lora_rank=9),
    "one head": NANO.replace(num_attention_heads=1, num_key_value_heads=1),
    "YaRN": NANO.replace(rope_scaling=YaRN(original_max_position_embeddings=64, factor=8.0)),
    "YaRN, mscale apart": NANO.replace(rope_scaling=YaRN(original_max_position_embeddings=64, mscale=0.3)),
}
BASELINES = {
    "MHA": NANO.replace(attention="gqa"),
    "GQA": NANO.replace(attention="gqa", num_key_value_heads=2),
    "MQA": NANO.replace(attention="gqa", num_key_value_heads=1),
    "GQA, YaRN": NANO.replace(
        attention="gqa", num_key_value_heads=2, rope_scaling=YaRN(original_max_position_embeddings=64)
    ),
}
ALL = SHAPES | BASELINES
MODELS = {}


def model_of(name, dtype=torch.float64):
    if (name, dtype) not in MODELS:
        MODELS[name, dtype] = build(ALL[name], dtype)
    return MODELS[name, dtype]


def reference(model, x):
    """Outputs and cache entries of the first layer's attention, for a batch, by the plain loops."""
    config, w = model.config, dict(model.layers[0].attention.named_parameters())
    attention = plain.latent_attention if config.attention == "mla" else plain.grouped_attention
    outs, entries = zip(*(attention(w, config, xs) for xs in x), strict=True)
    return torch.stack(outs), torch.stack(entries)


@pytest.mark.parametrize("name", ALL)
def test_attention_and_its_cache_equal_the_loops_over_heads(name):
    model, x = model_of(name), random_stream(2, 7, 64)
    want, entries = reference(model, x)
    torch.testing.assert_close(without_cache(model, x), want, atol=1e-10, rtol=0)
    out, cached = through_cache(model, x, [7])
    torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(cached, entries, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["as V3", "no query compression", "GQA"])
def test_gradients_equal_those_of_the_loops(name):
    model, x = model_of(name), random_stream(1, 5, 64).requires_grad_()
    weights = [x, *model.layers[0].attention.parameters()]
    weigh = random_stream(1, 5, 64, seed=8)
    got = torch.autograd.grad((without_cache(model, x) * weigh).sum(), weights)
    want = torch.autograd.grad((reference(model, x)[0] * weigh).sum(), weights)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_expanded_equals_absorbed(name):
    model, x = model_of(name), random_stream(2, 6, 64)
    attention, cache = model.layers[0].attention, model.new_cache(2, 6)
    context = model.attention_context(random_tokens(2, 6), cache)
    query, entries = attention.query_and_entry(x, context)
    expanded = attention.expanded(query, entries, context.mask)
    torch.testing.assert_close(attention.absorbed(query, entries, context.mask), expanded, atol=1e-10, rtol=0)
    torch.testing.assert_close(attention.expanded(query, entries, None), expanded, atol=1e-10, rtol=0)
    torch.testing.assert_close(attention.o_proj(expanded), reference(model, x)[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_chunks_and_single_tokens_equal_the_whole_in_float32(name):
    model, x = model_of(name, torch.float32), random_stream(2, 9, 64, dtype=torch.float32)
    with torch.no_grad():
        want = reference(model_of(name), x.double())[0].float()
        for sizes in ([9], [4, 5], [1] * 9, [8, 1], [1, 8]):
            torch.testing.assert_close(through_cache(model, x, sizes)[0], want, atol=1e-5, rtol=0)


@st.composite
def chunkings(draw, most=12):
    total = draw(st.integers(1, most))
    cuts = sorted(draw(st.sets(st.integers(1, total - 1)))) if total > 1 else []
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


@settings(deadline=None, max_examples=30)
@given(sizes=chunkings(), name=st.sampled_from(["as V3", "no query compression", "YaRN", "MHA", "GQA", "MQA"]))
def test_chunks_of_any_size_equal_the_whole(sizes, name):
    model, x = model_of(name), random_stream(2, sum(sizes), 64)
    whole, cached = through_cache(model, x, [sum(sizes)])
    parts, cached_in_parts = through_cache(model, x, sizes)
    torch.testing.assert_close(parts, whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(cached_in_parts, cached, atol=1e-10, rtol=0)
    torch.testing.assert_close(whole, without_cache(model, x), atol=1e-10, rtol=0)


@settings(deadline=None, max_examples=15)
@given(sizes=chunkings(8), rows=st.integers(1, 3), name=st.sampled_from(["as V3", "GQA"]))
def test_whole_model_in_chunks_equals_one_pass(sizes, rows, name):
    model, tokens = model_of(name), random_tokens(rows, sum(sizes))
    with torch.no_grad():
        whole, cache = model(tokens).logits, model.new_cache(rows, sum(sizes))
        parts = torch.cat([model(part, cache=cache).logits for part in tokens.split(sizes, 1)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-9, rtol=0)
    assert cache.longest == sum(sizes) and cache.lengths.tolist() == [sum(sizes)] * rows


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    chunk=st.integers(1, 7),
    then=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    name=st.sampled_from(["as V3", "no query compression", "GQA"]),
)
def test_sequences_of_different_length_share_a_batch(lengths, chunk, then, name):
    """Right padding is read, then forgotten by `truncate`; what follows sees each sequence's own past only."""
    model, longest = model_of(name), max(lengths)
    padded, following = random_tokens(len(lengths), longest), random_tokens(len(lengths), sum(then), seed=5)
    cache = model.new_cache(len(lengths), longest + sum(then))
    with torch.no_grad():
        read = torch.cat([model(part, cache=cache).logits for part in padded.split(chunk, 1)], 1)
        cache.truncate(torch.tensor(lengths))
        went_on = torch.cat([model(part, cache=cache).logits for part in following.split(then, 1)], 1)
        for row, length in enumerate(lengths):
            alone = model(torch.cat((padded[row, :length], following[row]))[None]).logits[0]
            torch.testing.assert_close(read[row, :length], alone[:length], atol=1e-9, rtol=0)
            torch.testing.assert_close(went_on[row], alone[length:], atol=1e-9, rtol=0)


def test_truncate_rolls_back_and_keep_drops_rows():
    model, tokens, other = model_of("as V3"), random_tokens(3, 8), random_tokens(3, 4, seed=6)
    with torch.no_grad():
        cache = model.new_cache(3, 9)
        model(tokens, cache=cache)
        cache.truncate(torch.tensor([5, 5, 5]))
        assert cache.longest == 5
        want = model(torch.cat((tokens[:, :5], other), 1)).logits[:, 5:]
        torch.testing.assert_close(model(other, cache=cache).logits, want, atol=1e-9, rtol=0)
        cache.truncate(torch.tensor([6, 7, 8]))
        before = cache.layers[0].data_ptr()
        assert cache.keep(torch.tensor([2, 0])).tolist() == [1, 0]  # only the sequence beyond the new batch has moved
        assert cache.layers[0].data_ptr() == before
        assert cache.lengths.tolist() == [6, 8] and cache.layers[0].shape[0] == 2
        got = model(random_tokens(2, 1, seed=7), cache=cache).logits[:, 0]
        for row, (old, length) in enumerate([(0, 6), (2, 8)]):
            past = torch.cat((tokens[old, :5], other[old]))[:length]
            alone = torch.cat((past, random_tokens(2, 1, seed=7)[row]))[None]
            torch.testing.assert_close(got[row], model(alone).logits[0, -1], atol=1e-9, rtol=0)


def test_reading_with_a_cache_writes_only_the_slots_of_its_positions():
    model = model_of("as V3")
    cache = model.new_cache(2, 8)
    for layer in cache.layers:
        layer.fill_(7.0)
    with torch.no_grad():
        model(random_tokens(2, 3), cache=cache)
        for layer in cache.layers:
            assert (layer[:, 3:] == 7.0).all() and not (layer[:, :3] == 7.0).any()


@pytest.mark.parametrize("name", ["as V3", "MHA"])
def test_attention_is_causal(name):
    model, x = model_of(name), random_stream(1, 6, 64)
    changed = x.clone()
    changed[:, 4] += 1
    moved = (without_cache(model, changed) - without_cache(model, x)).abs().amax(-1)[0]
    assert (moved[:4] < 1e-12).all() and (moved[4:] > 1e-6).all()


def test_longer_than_the_cache_or_the_context_is_a_value_error():
    model = build(NANO.replace(max_position_embeddings=6))
    cache = model.new_cache(1, 4)
    model(random_tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="sequence of 5 tokens: the context holds 4"):
        model(random_tokens(1, 2), cache=cache)
    with pytest.raises(ValueError, match="sequence of 7 tokens: the context holds 6"):
        model(random_tokens(1, 7))
    with pytest.raises(ValueError, match="the context holds 6"):
        model(random_tokens(1, 7), cache=model.new_cache(1, 20))


def test_autocast_with_a_cache_stays_near_float32():
    model, tokens = model_of("as V3", torch.float32), random_tokens(2, 6)
    with torch.no_grad():
        want, cache = model(tokens).hidden, model.new_cache(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.cat([model(part, cache=cache).hidden for part in tokens.split((4, 1, 1), 1)], 1)
    assert cache.layers[0].dtype == torch.float32
    off = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
    assert off.median() < 0.05  # a token may flip an expert, most do not


# What a token costs, at DeepSeek's sizes (FACTS.md section 2.1) -----------------------------------------------------


def caches_of(config):
    """All layers' caches for one token in bfloat16, without the weights of 61 layers."""
    with torch.device("meta"):
        block = Block(config, dense=True).bfloat16()
    widths = [block.attention.cache_width] * config.num_hidden_layers
    return KVCache(widths, batch=1, slots=1, like=block.attention.o_proj.weight)


def test_v3_caches_576_numbers_per_layer_and_70272_bytes_per_token():
    v3 = ModelConfig.preset("v3")
    with torch.device("meta"):
        assert MultiHeadLatentAttention(v3).cache_width == 576
        assert GroupedQueryAttention(v3.replace(attention="gqa")).cache_width == 2 * 128 * 128
        assert GroupedQueryAttention(v3.replace(attention="gqa", num_key_value_heads=8)).cache_width == 2 * 8 * 128
        assert GroupedQueryAttention(v3.replace(attention="gqa", num_key_value_heads=1)).cache_width == 2 * 128
    assert caches_of(v3).num_bytes() == 70_272
    assert caches_of(v3.replace(attention="gqa")).num_bytes() == 2 * 1_998_848
    assert caches_of(ModelConfig.preset("v2")).num_bytes() == 69_120
    assert caches_of(ModelConfig.preset("v2_lite")).num_bytes() == 31_104


def test_bytes_count_every_slot_of_every_sequence():
    cache = model_of("as V3").new_cache(3, 5)
    assert cache.num_bytes() == 3 * 5 * 3 * (32 + 8) * 8 and cache.slots == 5
    assert [layer.shape for layer in cache.layers] == [(3, 5, 40)] * 3


def test_absorbing_pays_below_170_queries_in_v3():
    with torch.device("meta"):
        attention = MultiHeadLatentAttention(ModelConfig.preset("v3"))
    assert attention.absorbing_is_cheaper(170) and not attention.absorbing_is_cheaper(171)


def test_weights_of_attention_have_v3s_count():
    with torch.device("meta"):
        attention = MultiHeadLatentAttention(ModelConfig.preset("v3"))
    assert sum(p.numel() for p in attention.parameters()) == 187_107_328


@pytest.mark.parametrize("seq", [3, 40])
def test_prefill_of_an_empty_cache_needs_no_mask_and_is_bit_equal(seq, monkeypatch):
    """Causal attention without a mask against one with the mask, in the absorbed and the expanded form."""
    model, tokens = model_of("as V3").float(), random_tokens(2, seq)
    context = MiniDS.attention_context

    def masked(self, tokens, cache=None, indexer=None):
        found = context(self, tokens, cache)
        assert found.mask is None
        later = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        return dataclasses.replace(found, mask=later.expand(len(tokens), 1, -1, -1))

    with torch.no_grad():
        free = model.new_cache(2, seq)
        got = model(tokens, cache=free).logits
        monkeypatch.setattr(MiniDS, "attention_context", masked)
        cache = model.new_cache(2, seq)
        want = model(tokens, cache=cache).logits
    assert torch.equal(got, want)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(free.layers, cache.layers, strict=True))
