"""The cache: planted mistakes in the mask of a chunk and in the bytes per token, caught (PITFALLS 8, 9)."""

import dataclasses

import pytest
import torch
from pitfalls import V3, after_init, assert_caught, close, each_mistake
from plain_model import NANO, build, random_tokens

from minids.model.attention import GroupedQueryAttention
from minids.model.block import Block
from minids.model.kv_cache import KVCache
from minids.model.mla import MultiHeadLatentAttention
from minids.model.transformer import MiniDS

# 8. The mask of a chunk --------------------------------------------------------------------------------------------


def check_08_chunks_see_their_past_and_not_their_future():
    for config in (NANO, NANO.replace(attention="gqa")):
        model, tokens = build(config), random_tokens(2, 7)
        with torch.no_grad():
            want = model(tokens).logits
            for sizes in ([7], [4, 3], [1, 6], [2, 2, 3], [1] * 7):
                cache = model.new_cache(2, 7)
                close(torch.cat([model(part, cache=cache).logits for part in tokens.split(sizes, 1)], 1), want)
            # Two prompts of different length, the shorter one padded, then two tokens more for each.
            cache, more = model.new_cache(2, 9), random_tokens(2, 2, seed=9)
            model(tokens, cache=cache)
            cache.truncate(torch.tensor([3, 7]))
            got = model(more, cache=cache).logits
            for row, length in enumerate([3, 7]):
                alone = model(torch.cat((tokens[row, :length], more[row]))[None]).logits
                close(got[row], alone[0, length:])


def plant_mask(mp, visible):
    """`visible(query positions in the chunk [seq, 1], start [batch, 1, 1], slots [longest])`: who sees what."""
    context = MiniDS.attention_context

    def masked(self, tokens, cache=None, indexer=None):
        right = context(self, tokens, cache, indexer)
        if cache is None:
            return right
        query, slots = torch.arange(tokens.shape[1])[:, None], torch.arange(cache.longest + tokens.shape[1])
        seen = visible(query, cache.lengths[:, None, None], slots).expand(len(tokens), len(query), len(slots))
        mask = torch.zeros(seen[:, None].shape, dtype=self.head.weight.dtype).masked_fill(~seen[:, None], -torch.inf)
        return dataclasses.replace(right, mask=mask)

    mp.setattr(MiniDS, "attention_context", masked)


def plant_square_mask(mp):
    """The official demonstration code: a lower triangle that forgets the past, and no mask at all for one token."""
    plant_mask(mp, lambda query, start, slots: (slots <= query) | torch.tensor(len(query) == 1))


def plant_chunk_that_sees_its_own_future(mp):
    plant_mask(mp, lambda query, start, slots: slots < start + len(query))


def plant_one_length_for_the_whole_batch(mp):
    plant_mask(mp, lambda query, start, slots: slots <= start.max() + query)


# 9. What the cache costs -------------------------------------------------------------------------------------------


def check_09_v3_caches_70272_bytes_per_token():
    def bytes_per_token(config):
        with torch.device("meta"):
            block = Block(config, dense=True).bfloat16()
        widths = [block.attention.cache_width] * config.num_hidden_layers
        return KVCache(widths, batch=1, slots=1, like=block.attention.o_proj.weight).num_bytes()

    latent, mha = bytes_per_token(V3), bytes_per_token(V3.replace(attention="gqa"))
    assert latent == 61 * (512 + 64) * 2 == 70_272
    assert mha == 61 * 2 * 128 * 128 * 2
    assert mha / latent == pytest.approx(56.9, abs=0.05)
    assert 128 * 1024 * latent / 2**30 == pytest.approx(8.6, abs=0.05)  # GiB at 128K: all layers, not one


def plant_bytes_of_one_layer(mp):
    mp.setattr(KVCache, "num_bytes", lambda self: self.layers[0].nbytes)


def plant_cache_without_the_rotary_part(mp):
    after_init(mp, MultiHeadLatentAttention, lambda self: setattr(self, "cache_width", self.kv_rank))


def plant_cache_of_expanded_keys_and_values(mp):
    def widen(self):
        self.cache_width = self.heads * (self.nope_dim + self.rope_dim + self.value_dim)

    after_init(mp, MultiHeadLatentAttention, widen)


def plant_baseline_that_caches_keys_only(mp):
    after_init(mp, GroupedQueryAttention, lambda self: setattr(self, "cache_width", self.kv_heads * self.head_dim))


# The table ---------------------------------------------------------------------------------------------------------

PITFALLS = [
    (8, check_08_chunks_see_their_past_and_not_their_future, {
        "square mask": plant_square_mask,
        "chunk sees its future": plant_chunk_that_sees_its_own_future,
        "one length for the batch": plant_one_length_for_the_whole_batch,
    }),
    (9, check_09_v3_caches_70272_bytes_per_token, {
        "bytes of one layer": plant_bytes_of_one_layer,
        "rotary part not cached": plant_cache_without_the_rotary_part,
        "expanded keys and values cached": plant_cache_of_expanded_keys_and_values,
        "MHA counted without values": plant_baseline_that_caches_keys_only,
    }),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
