"""V4's attention: mistakes found in ports of it, planted one by one; each is caught by the check of what it breaks.

A check passes on the package as it is and fails by its own assertion where the mistake is planted (`pitfalls.py`).
"""

import plain_compressed as plain
import pytest
import torch
from pitfalls import after_init, assert_caught, close
from plain_compressed import COMPRESSED, LAYERS, model_of
from plain_model import random_stream, random_tokens, without_cache

from minids.model import compressed_attention, compressor, rope
from minids.model.compressed_attention import CompressedAttention, Sink
from minids.model.compressor import Compressor
from minids.model.sparse_attention import rotate_halves

LENGTH = 26  # eight blocks of csa and four of hca, and an unfinished one each


def weights_of(attention):
    return {name: weight.detach() for name, weight in attention.named_parameters()}


def stream(length=LENGTH):
    return random_stream(1, length, COMPRESSED.hidden_size)


def check_output(kind):
    model, layer = model_of(), LAYERS.index(kind)
    want = plain.compressed_attention(weights_of(model.layers[layer].attention), COMPRESSED, kind, stream()[0])
    with torch.no_grad():
        close(without_cache(model, stream(), layer)[0], want)


def check_window():
    check_output("window")


def check_csa():
    check_output("csa")


def check_hca():
    check_output("hca")


# Rotation ------------------------------------------------------------------------------------------------------------


def check_only_distances_matter():
    """A window of tokens, all of them 100 positions later: the same output."""
    model = model_of()
    attention, context = model.layers[0].attention, model.attention_context(torch.zeros(1, LENGTH, dtype=torch.int64))
    with torch.no_grad():
        here = attention(stream(), context)
        context.positions = context.positions + 100
        close(attention(stream(), context), here)


def plant_output(mp, turn):
    rotate_last = compressed_attention.rotate_last

    def rotate(x, rotation):
        return turn(x, rotation) if rotation.is_conj() else rotate_last(x, rotation)

    mp.setattr(compressed_attention, "rotate_last", rotate)


def plant_output_not_rotated_back(mp):
    plant_output(mp, lambda x, rotation: x)


def plant_output_rotated_forward(mp):
    rotate_last = compressed_attention.rotate_last
    plant_output(mp, lambda x, rotation: rotate_last(x, rotation.conj().resolve_conj()))


def plant_half_split_pairs(mp):
    def rotate(x, rotation):
        still = x.shape[-1] - 2 * rotation.shape[-1]
        return torch.cat((x[..., :still], rotate_halves(x[..., still:], rotation)), -1)

    for module in (compressed_attention, compressor):
        mp.setattr(module, "rotate_last", rotate)


def plant_first_channels_rotated(mp):
    def rotate(x, rotation):
        width = 2 * rotation.shape[-1]
        return torch.cat((rope.rotate(x[..., :width].contiguous(), rotation), x[..., width:]), -1)

    for module in (compressed_attention, compressor):
        mp.setattr(module, "rotate_last", rotate)


def plant_entry_rotations(mp, position=lambda positions: positions, **changes):
    rotations = rope.rotations
    mp.setattr(
        compressor, "rotations",
        lambda config, positions, *sizes: rotations(config.replace(**changes), position(positions), *sizes),
    )  # fmt: skip


def plant_entry_at_the_number_of_its_block(mp):
    plant_entry_rotations(mp, lambda positions: positions // COMPRESSED.hca_block)


def plant_entry_at_its_last_token(mp):
    plant_entry_rotations(mp, lambda positions: positions + COMPRESSED.hca_block - 1)


def plant_entry_with_the_base_of_the_window_layers(mp):
    plant_entry_rotations(mp, rope_theta=COMPRESSED.rope_theta)


def plant_entry_without_yarn(mp):
    plant_entry_rotations(mp, rope_scaling=None)


def plant_window_layers_with_the_base_of_the_others(mp):
    mp.setattr(plain, "MODELS", {})
    mp.setattr(
        compressed_attention, "rope_config", lambda config: config.replace(rope_theta=config.compress_rope_theta)
    )


def plant_temperature_of_yarn(mp):
    def warm(attention):
        attention.scale = rope.softmax_scale(attention.head_dim, COMPRESSED.rope_scaling)

    mp.setattr(plain, "MODELS", {})  # models that are built with the mistake, and forgotten with it
    after_init(mp, CompressedAttention, warm)


# Entries -------------------------------------------------------------------------------------------------------------


def plant_halves_swapped(mp):
    """The first half of the weights for the token's own block, as the paper numbers the two series."""

    def overlapping(self, series):
        return torch.cat((series[:, :-1, :, self.width :], series[:, 1:, :, : self.width]), 2)

    mp.setattr(Compressor, "overlapping", overlapping)


def plant_first_half_for_both(mp):
    def overlapping(self, series):
        return torch.cat((series[:, :-1, :, : self.width], series[:, 1:, :, : self.width]), 2)

    mp.setattr(Compressor, "overlapping", overlapping)


def plant_something_before_block_0(mp):
    """Zeros in place of nothing: their weights are not 0."""
    full_like = torch.Tensor.masked_fill

    def masked_fill(self, mask, value):
        return full_like(self, mask, 0.0 if mask.ndim == 4 and mask.shape[-2:] == (1, 1) else value)

    mp.setattr(torch.Tensor, "masked_fill", masked_fill)


def plant_one_softmax_for_all_channels(mp):
    softmax = torch.Tensor.softmax

    def shared(self, dim):
        return softmax(self.mean(-1, keepdim=True).expand_as(self) if dim == 2 else self, dim)

    mp.setattr(torch.Tensor, "softmax", shared)


def plant_places_in_reverse(mp):
    pool = Compressor.pool

    def reverse(self, states, first):
        self.place_bias.data = self.place_bias.data.flip(0)
        out = pool(self, states, first)
        self.place_bias.data = self.place_bias.data.flip(0)
        return out

    mp.setattr(Compressor, "pool", reverse)


# The softmax ---------------------------------------------------------------------------------------------------------


def plant_no_sink(mp):
    mp.setattr(Sink, "softmax", lambda self, logits: logits.softmax(-1))


def plant_sink_takes_the_value_of_the_first_slot(mp):
    def softmax(self, logits):
        sink = self.logit[:, None, None].expand(*logits.shape[:-1], 1)
        together = torch.cat((sink, logits), -1).softmax(-1)
        return torch.cat((together[..., :1] + together[..., 1:2], together[..., 2:]), -1)

    mp.setattr(Sink, "softmax", softmax)


# Causality -----------------------------------------------------------------------------------------------------------


def check_causality():
    """Other tokens from 14 on, in the middle of a block of csa and of hca: nothing changes before."""
    model, tokens = model_of(), random_tokens(1, LENGTH)
    other = torch.cat((tokens[:, :14], random_tokens(1, LENGTH - 14, seed=9)), 1)
    with torch.no_grad():
        close(model(other).logits[:, :14], model(tokens).logits[:, :14])


def plant_blocks(mp, rule):
    def complete(positions, block, blocks):
        return torch.arange(blocks) < rule(positions, block)[..., None]

    mp.setattr(compressed_attention, "complete_blocks", complete)


def plant_unfinished_block_seen(mp):
    plant_blocks(mp, lambda t, m: t // m + 1)


def plant_all_blocks_seen(mp):
    plant_blocks(mp, lambda t, m: torch.full_like(t, LENGTH))


def plant_own_token_does_not_complete_a_block(mp):
    plant_blocks(mp, lambda t, m: t // m)


def plant_choice_without_a_mask(mp):
    choose = compressed_attention.choose
    mp.setattr(compressed_attention, "choose", lambda scores, seen, k: choose(scores, torch.ones_like(seen), k))


def plant_mask_not_applied_after_the_choice(mp):
    def choose(scores, seen, k):
        best = scores.masked_fill(~seen, -torch.inf).topk(min(k, scores.shape[-1])).indices
        return torch.zeros_like(seen).scatter_(-1, best, True)

    mp.setattr(compressed_attention, "choose", choose)


def plant_mask_after_the_choice_only(mp):
    """The k best of all entries, of which the visible ones are kept: fewer than k."""

    def choose(scores, seen, k):
        best = scores.topk(min(k, scores.shape[-1])).indices
        return torch.zeros_like(seen).scatter_(-1, best, True) & seen

    mp.setattr(compressed_attention, "choose", choose)


MISTAKES = {
    check_only_distances_matter: (plant_output_not_rotated_back, plant_output_rotated_forward),
    check_window: (
        plant_half_split_pairs, plant_first_channels_rotated, plant_window_layers_with_the_base_of_the_others,
        plant_temperature_of_yarn, plant_no_sink, plant_sink_takes_the_value_of_the_first_slot,
    ),
    check_hca: (
        plant_output_not_rotated_back, plant_entry_at_the_number_of_its_block, plant_entry_at_its_last_token,
        plant_entry_with_the_base_of_the_window_layers, plant_entry_without_yarn, plant_one_softmax_for_all_channels,
        plant_places_in_reverse, plant_own_token_does_not_complete_a_block, plant_no_sink,
    ),
    check_csa: (
        plant_halves_swapped, plant_first_half_for_both, plant_something_before_block_0,
        plant_mask_after_the_choice_only, plant_own_token_does_not_complete_a_block,
    ),
    check_causality: (
        plant_unfinished_block_seen, plant_all_blocks_seen, plant_choice_without_a_mask,
        plant_mask_not_applied_after_the_choice,
    ),
}  # fmt: skip
ROWS = [(check, plant) for check, plants in MISTAKES.items() for plant in plants]


@pytest.mark.parametrize("check, plant", ROWS, ids=[f"{c.__name__[6:]}-{p.__name__[6:]}" for c, p in ROWS])
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)


def test_with_k_at_least_the_number_of_blocks_a_wrong_index_key_is_invisible(monkeypatch):
    """Why the checks need a k well below: the indexer only decides which entries are left out."""
    few = model_of(index_topk=LENGTH)
    with torch.no_grad():
        before = without_cache(few, stream(), 1)
        scores = compressed_attention.CompressedIndexer.scores
        monkeypatch.setattr(
            compressed_attention.CompressedIndexer, "scores", lambda self, *inputs: -scores(self, *inputs)
        )
        close(without_cache(few, stream(), 1), before, 0)
