"""Rotary positions: planted mistakes in the rotation and in YaRN, caught (PITFALLS 4-6)."""

import plain_model as plain
import pytest
import torch
from pitfalls import V3, assert_caught, attention_reference, close, each_mistake
from plain_model import NANO, build, random_stream, through_cache, without_cache

from minids.config import YaRN
from minids.model import attention, mla, rope, transformer

LONG = NANO.replace(rope_scaling=YaRN(original_max_position_embeddings=64))
MSCALE = NANO.replace(rope_scaling=YaRN(original_max_position_embeddings=64, mscale=0.2, mscale_all_dim=0.7))


# 4. The rotation turns neighbouring pairs --------------------------------------------------------------------------


def rotary_keys(model, x):
    """Cached keys of the first layer and what they should be: W_KR x with the pairs (2i, 2i+1) turned."""
    rank = model.config.kv_lora_rank
    w_kr = model.layers[0].attention.kv_down_proj.weight[rank:]
    want = [plain.turn(w_kr @ v, t, model.config.rope_theta, model.config.rope_scaling) for t, v in enumerate(x[0])]
    return through_cache(model, x, [x.shape[1]])[1][0, :, rank:], torch.stack(want)


def check_04_rotation_turns_neighbouring_pairs():
    got, want = rotary_keys(build(), random_stream(1, 4, 64))
    close(got, want)
    grouped, x = build(NANO.replace(attention="gqa", num_key_value_heads=2)), random_stream(1, 4, 64)
    weights = dict(grouped.layers[0].attention.named_parameters())
    close(through_cache(grouped, x, [4])[1][0], plain.grouped_attention(weights, grouped.config, x[0])[1])


def plant_rotation(mp, rotate):
    for module in (rope, attention, mla):
        mp.setattr(module, "rotate", rotate)


def plant_half_split_rotation(mp):
    def rotate(x, rotation):
        pairs = torch.complex(*x.chunk(2, -1)) * rotation
        return torch.cat((pairs.real, pairs.imag), -1)

    plant_rotation(mp, rotate)


def plant_rotation_the_other_way_for_keys_and_queries(mp):
    rotate = rope.rotate
    plant_rotation(mp, lambda x, rotation: rotate(x, rotation.conj()))


def plant_no_rotation(mp):
    plant_rotation(mp, lambda x, rotation: x)


# 5. YaRN's temperature belongs into the softmax scale, squared -----------------------------------------------------


def check_05_softmax_scale_holds_the_squared_temperature():
    assert rope.softmax_scale(V3.qk_head_dim, V3.rope_scaling) == pytest.approx(0.1352338, abs=5e-8)
    assert rope.softmax_scale(V3.qk_head_dim, None) == pytest.approx(0.0721688, abs=5e-8)
    for config in (LONG, MSCALE):
        model, x = build(config), random_stream(1, 6, 64)
        want, entries = attention_reference(model, x)
        close(without_cache(model, x), want)
        got, cached = through_cache(model, x, [1] * 6)
        close(got, want)
        close(cached, entries)
    rotation = rope.rotations(LONG, torch.tensor([[0, 5]]), 8, torch.float64)
    close(rotation.abs(), torch.ones(1, 2, 1, 4, dtype=torch.float64))


def plant_scale_from(mp, scale):
    for module in (rope, attention, mla):
        mp.setattr(module, "softmax_scale", scale)


def plant_temperature_not_squared(mp):
    def scale(dim, yarn):
        return dim**-0.5 * (1.0 if yarn is None else plain.temperature(yarn, yarn.mscale_all_dim))

    plant_scale_from(mp, scale)


def plant_no_temperature(mp):
    plant_scale_from(mp, lambda dim, yarn: dim**-0.5)


def plant_temperature_on_the_rotated_part_only(mp):
    rotations = rope.rotations

    def scaled(config, positions, dim, dtype):
        yarn = config.rope_scaling
        return rotations(config, positions, dim, dtype) * (1 if yarn is None else plain.temperature(yarn, yarn.mscale))

    plant_no_temperature(mp)
    for module in (rope, transformer):
        mp.setattr(module, "rotations", scaled)


def plant_temperature_from_mscale(mp):
    def scale(dim, yarn):
        return dim**-0.5 * (1.0 if yarn is None else plain.temperature(yarn, yarn.mscale) ** 2)

    plant_scale_from(mp, scale)


# 6. YaRN's ramp ----------------------------------------------------------------------------------------------------


def check_06_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    got = rope.rotations(V3, torch.tensor([[1]]), 64, torch.float64).angle().flatten()
    plain_frequencies = torch.tensor([10000 ** (-i / 32) for i in range(32)], dtype=torch.float64)
    close(got[:11], plain_frequencies[:11], 1e-12)  # pairs up to 10 keep their frequency
    assert got[11] < plain_frequencies[11]
    assert got[22] > plain_frequencies[22] / 40
    close(got[23:], plain_frequencies[23:] / 40, 1e-12)  # pairs from 23 on are divided by 40
    close(got, torch.tensor(plain.frequencies(64, 10000.0, V3.rope_scaling), dtype=torch.float64), 1e-12)
    keys, want = rotary_keys(build(LONG), random_stream(1, 4, 64))
    close(keys, want)


def plant_ramp(mp, bounds=None, swap=False, length=None):
    """YaRN with other bounds, with fast and slow pairs exchanged, or measured against another length."""

    def frequencies(dim, theta, yarn, device):
        frequency = theta ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
        if yarn is None:
            return frequency
        if length:
            yarn = YaRN(factor=yarn.factor, original_max_position_embeddings=length)
        low, high = bounds(dim, theta, yarn) if bounds else rope.yarn_ramp_bounds(dim, theta, yarn)
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        ramp = 1 - ramp if swap else ramp
        return frequency * (1 - ramp) + frequency / yarn.factor * ramp

    mp.setattr(rope, "rotary_frequencies", frequencies)


def plant_ramp_bounds_rounded_inwards(mp):
    exact = rope.yarn_ramp_bounds
    plant_ramp(mp, lambda *args: (exact(*args)[0] + 1, exact(*args)[1] - 1))


def plant_fast_pairs_stretched(mp):
    plant_ramp(mp, swap=True)


def plant_all_pairs_stretched(mp):
    plant_ramp(mp, lambda *args: (-2, -1))


def plant_ramp_of_the_extended_length(mp):
    plant_ramp(mp, length=163840)


# The table ---------------------------------------------------------------------------------------------------------

PITFALLS = [
    (4, check_04_rotation_turns_neighbouring_pairs, {
        "half-split rotation": plant_half_split_rotation,
        "rotation reversed": plant_rotation_the_other_way_for_keys_and_queries,
        "no rotation": plant_no_rotation,
    }),
    (5, check_05_softmax_scale_holds_the_squared_temperature, {
        "temperature not squared": plant_temperature_not_squared,
        "no temperature": plant_no_temperature,
        "temperature on cos and sin": plant_temperature_on_the_rotated_part_only,
        "mscale for mscale_all_dim": plant_temperature_from_mscale,
    }),
    (6, check_06_yarn_keeps_fast_pairs_and_stretches_slow_ones, {
        "ramp bounds rounded inwards": plant_ramp_bounds_rounded_inwards,
        "fast pairs stretched": plant_fast_pairs_stretched,
        "all pairs stretched": plant_all_pairs_stretched,
        "ramp of the extended length": plant_ramp_of_the_extended_length,
    }),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)


@pytest.mark.parametrize("plant", [plant_half_split_rotation, plant_no_temperature, plant_no_rotation])
def test_some_mistakes_do_not_show_at_position_0(plant, monkeypatch):
    """Why the checks above read several tokens: the first one is rotated by nothing and attends to itself alone."""
    model, x = build(LONG), random_stream(1, 1, 64)
    want = attention_reference(model, x)[0]
    plant(monkeypatch)
    close(without_cache(build(LONG), x), want)
