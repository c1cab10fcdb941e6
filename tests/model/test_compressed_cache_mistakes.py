"""V4's attention in decoding: mistakes with its cache, planted one by one; each is caught by a check.

A check passes on the package as it is and fails by its own assertion where the mistake is planted (`pitfalls.py`).
"""

import pytest
import torch
from pitfalls import assert_caught, close
from plain_compressed import COMPRESSED, LAYERS, model_of
from plain_model import random_stream, random_tokens, through_cache, without_cache

from minids.model import compressed_attention, kv_cache
from minids.model.compressed_attention import CompressedAttention
from minids.model.compressor import Compressor
from minids.model.kv_cache import KVCache

LENGTH = 26  # eight blocks of csa and four of hca, and an unfinished one each


def check_decoding():
    """Each kind of layer, in parts that begin and end anywhere in a block, as in one pass."""
    model, x = model_of(), random_stream(1, LENGTH, COMPRESSED.hidden_size)
    with torch.no_grad():
        for layer in range(len(LAYERS)):
            for sizes in ([10, *[1] * 16], [1, 4, 13, 8]):
                close(through_cache(model, x, sizes, layer)[0], without_cache(model, x, layer))


def plant_own_token_counted_twice(mp):
    """The ring is written first, and read with the new token in it, beside the token itself."""
    window_entries = CompressedAttention.window_entries

    def twice(self, own, context, ring):
        if context.mask is None or own.shape[1] > 1:
            return window_entries(self, own, context, ring)
        kv_cache.write_ring(ring, context, own)
        held = torch.cat((kv_cache.ring_positions(self.window, context.positions + 1), context.positions), 1)
        return torch.cat((ring, own), 1), (held >= 0)[:, None]

    mp.setattr(CompressedAttention, "window_entries", twice)


def plant_window_one_token_too_long(mp):
    """In decoding the ring holds `window` tokens before the new one: one too many."""
    window_entries = CompressedAttention.window_entries

    def longer(self, own, context, ring):
        kv, visible = window_entries(self, own, context, ring)
        if context.mask is not None and own.shape[1] == 1:
            visible = torch.ones_like(visible)
        return kv, visible

    mp.setattr(CompressedAttention, "window_entries", longer)


def plant_ring_read_in_the_order_of_slots(mp):
    """Correct until the ring is full."""
    mp.setattr(
        compressed_attention, "ring_positions",
        lambda size, start: start - size + torch.arange(size).expand(len(start), -1),
    )  # fmt: skip


def plant_tail_lost_between_passes(mp):
    """What came before in the unfinished block is not carried over."""
    with_cached = Compressor.with_cached
    mp.setattr(
        Compressor, "with_cached",
        lambda self, states, ring, start: with_cached(self, states, torch.zeros_like(ring), start),
    )  # fmt: skip


def plant_block_before_lost_between_passes(mp):
    """Only the unfinished block is kept, not the one before, which an entry of csa also mixes."""
    with_cached = Compressor.with_cached

    def forgetful(self, states, ring, start):
        blocks = with_cached(self, states, ring, start)
        return blocks.index_fill(1, torch.arange(self.before * self.block), 0.0)

    mp.setattr(Compressor, "with_cached", forgetful)


def check_padding():
    """Two sequences of 8 and 11 tokens, padded to 11: refused, or as without padding."""
    model, padded, following = model_of(), random_tokens(2, 11), random_tokens(2, 1, seed=5)
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        model(padded, cache=cache)
        try:
            cache.truncate(torch.tensor([8, 11]))
        except ValueError:
            return
        got = model(following, cache=cache).logits[0]
        close(got, model(torch.cat((padded[:1, :8], following[:1]), 1)).logits[0, 8:])


def plant_padding_pooled_and_kept(mp):
    """Padding is mixed into entries, and takes the places of tokens in the rings."""

    def truncate(self, lengths):
        self.lengths, self.longest = lengths, int(lengths.max())

    mp.setattr(KVCache, "truncate", truncate)


MISTAKES = {
    check_decoding: (
        plant_own_token_counted_twice, plant_window_one_token_too_long, plant_ring_read_in_the_order_of_slots,
        plant_tail_lost_between_passes, plant_block_before_lost_between_passes,
    ),
    check_padding: (plant_padding_pooled_and_kept,),
}  # fmt: skip
ROWS = [(check, plant) for check, plants in MISTAKES.items() for plant in plants]


@pytest.mark.parametrize("check, plant", ROWS, ids=[f"{c.__name__[6:]}-{p.__name__[6:]}" for c, p in ROWS])
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
