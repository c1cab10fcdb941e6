"""QK-Clip: the logits observed, the heads that are scaled, and a run whose logits would grow."""

import dataclasses
import math

import pytest
import torch
from training.helpers import RECIPE, counting_data, nano

from minids.training.pretrain import Trainer, train
from minids.training.qk_clip import QKClip, clip_query_and_key, max_logits


def attention_and_input(q_lora_rank, factor=4.0):
    model = nano(q_lora_rank=q_lora_rank).double()
    attention = model.layers[0].attention
    for weight in (attention.kv_up_proj.weight, attention.kv_down_proj.weight):
        weight.data.mul_(factor)
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    return attention, x, model.attention_context(torch.zeros(2, 9, dtype=torch.int64))


def logits_by_loops(attention, x, context):
    """Logits [batch, heads, seq, seq] of the definition, from queries and keys of every head."""
    query, entries = attention.query_and_entry(x, context)
    logits = torch.full((2, attention.heads, 9, 9), -math.inf, dtype=torch.float64)
    for h in range(attention.heads):
        rows = slice(h * (attention.nope_dim + attention.value_dim), None)
        key_up = attention.kv_up_proj.weight[rows][: attention.nope_dim]
        for b in range(2):
            for s in range(9):
                latent, rotated = entries[b, s].split((attention.kv_rank, attention.rope_dim))
                key = torch.cat((key_up @ latent, rotated))
                for t in range(s, 9):
                    logits[b, h, t, s] = query[b, t, h] @ key * attention.scale
    return logits


@pytest.mark.parametrize("q_lora_rank", [32, None])
@torch.no_grad()
def test_clipped_heads_have_the_threshold_as_largest_logit(q_lora_rank):
    attention, x, context = attention_and_input(q_lora_rank)
    logits = logits_by_loops(attention, x, context)
    largest = max_logits(attention, x, context)
    torch.testing.assert_close(largest, logits.amax((0, 2, 3)).float(), atol=1e-5, rtol=1e-5)
    threshold = float(largest.sort().values[1:3].mean())  # two heads above, two below
    before = {name: weight.clone() for name, weight in attention.named_parameters()}
    clip_query_and_key(attention, largest, threshold)
    clipped = logits_by_loops(attention, x, context)
    factor = (threshold / largest.double()).clamp_max(1.0)[None, :, None, None]
    torch.testing.assert_close(clipped.tril(), (logits * factor).tril(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(clipped.amax((0, 2, 3)).float(), largest.clamp_max(threshold), atol=1e-5, rtol=1e-5)
    for name in ("kv_down_proj.weight", "o_proj.weight"):
        assert torch.equal(before[name], dict(attention.named_parameters())[name])
    value = attention.kv_up_proj.weight.unflatten(0, (attention.heads, -1))[:, attention.nope_dim :]
    was = before["kv_up_proj.weight"].unflatten(0, (attention.heads, -1))[:, attention.nope_dim :]
    assert torch.equal(value, was)


def test_clip_of_negative_logits_changes_nothing():
    attention, x, context = attention_and_input(32)
    before = attention.kv_up_proj.weight.clone()
    clip_query_and_key(attention, torch.full((4,), -5.0), threshold=1.0)
    assert torch.equal(attention.kv_up_proj.weight, before)


def test_only_training_passes_are_watched_and_every_micro_batch_counts():
    model = nano()
    clip = QKClip(model, threshold=1e9)
    tokens = torch.randint(272, (2, 8))
    with torch.no_grad():
        model(tokens)
    model.eval()(tokens)
    assert clip.step() == -math.inf
    model.train()
    alone = []
    for row in tokens.split(1):
        model(row)
        alone.append(clip.step())
    model(tokens[:1])
    model(tokens[1:])
    assert clip.step() == max(alone)


def test_clip_holds_the_logits_of_a_run_whose_logits_grow():
    """A learning rate that is too high lets them grow to some multiple of the threshold; with the clip they stay."""
    recipe = dataclasses.replace(RECIPE, steps=25, learning_rate=0.05, evaluate_every=25)
    largest = {}
    for threshold in (1e9, 5.0):
        torch.manual_seed(0)
        run = train(nano(), counting_data(), dataclasses.replace(recipe, qk_clip=threshold), progress=False)
        largest[threshold] = max(m["max_attention_logit"] for m in run[5:])
    assert largest[1e9] > 50 and largest[5.0] < 30


def test_clip_needs_mla():
    with pytest.raises(ValueError, match="^qk_clip"):
        Trainer(nano(attention="gqa"), counting_data(), dataclasses.replace(RECIPE, qk_clip=100.0))


# Planted mistakes ---------------------------------------------------------------------------------------------------


def plant_clip(mp, change):
    def clip(attention, largest, threshold):
        factor = (threshold / largest).clamp_max(1.0).to(torch.float64)[:, None, None]
        queries = attention.q_proj if attention.q_lora_rank is None else attention.q_up_proj
        query = queries.weight.unflatten(0, (attention.heads, -1))
        key = attention.kv_up_proj.weight.unflatten(0, (attention.heads, -1))
        change(attention, query, key, factor)

    mp.setitem(globals(), "clip_query_and_key", clip)


def plant_root_for_the_rotated_query(mp):
    def change(attention, query, key, factor):
        query *= factor.sqrt()
        key[:, : attention.nope_dim] *= factor.sqrt()

    plant_clip(mp, change)


def plant_shared_rotated_key_scaled(mp):
    def change(attention, query, key, factor):
        query *= factor.sqrt()
        key[:, : attention.nope_dim] *= factor.sqrt()
        attention.kv_down_proj.weight[attention.kv_rank :] *= factor.min().sqrt()

    plant_clip(mp, change)


def plant_all_heads_clipped(mp):
    def change(attention, query, key, factor):
        factor = factor.min().expand_as(factor)
        query[:, : attention.nope_dim] *= factor.sqrt()
        query[:, attention.nope_dim :] *= factor
        key[:, : attention.nope_dim] *= factor.sqrt()

    plant_clip(mp, change)


def plant_values_scaled(mp):
    def change(attention, query, key, factor):
        query[:, : attention.nope_dim] *= factor.sqrt()
        query[:, attention.nope_dim :] *= factor
        key *= factor.sqrt()

    plant_clip(mp, change)


def plant_future_keys_count(mp):
    original = torch.Tensor.masked_fill
    mp.setattr(torch.Tensor, "masked_fill", lambda self, mask, value: self if value == -math.inf else original(
        self, mask, value))  # fmt: skip


MISTAKES = [
    plant_root_for_the_rotated_query, plant_shared_rotated_key_scaled, plant_all_heads_clipped, plant_values_scaled,
    plant_future_keys_count,
]  # fmt: skip


@pytest.mark.parametrize("plant", MISTAKES)
def test_planted_mistake_is_caught(plant, monkeypatch):
    torch.manual_seed(0)
    test_clipped_heads_have_the_threshold_as_largest_logit(32)
    plant(monkeypatch)
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        test_clipped_heads_have_the_threshold_as_largest_logit(32)
