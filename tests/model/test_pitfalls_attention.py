"""Multi-head latent attention: planted mistakes in keys, norms, scale and absorbed form, caught (PITFALLS 1-3, 7)."""

import plain_model as plain
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from pitfalls import after_init, assert_caught, attention_reference, close, each_mistake
from plain_model import NANO, build, random_stream, random_tokens, through_cache, without_cache
from torch import nn

from minids.model import attention, mla, rope
from minids.model.mla import MultiHeadLatentAttention

# 1. One rotary key per token, shared by all heads ------------------------------------------------------------------


def check_01_rotary_key_is_one_vector_per_token():
    model, x = build(), random_stream(1, 5, 64)
    cached = through_cache(model, x, [5])[1]
    assert cached.shape[-1] == NANO.kv_lora_rank + NANO.qk_rope_head_dim
    w_kr = model.layers[0].attention.kv_down_proj.weight[NANO.kv_lora_rank :]
    for t in range(5):  # from the input by W_KR, rotated before it is cached
        close(cached[0, t, NANO.kv_lora_rank :], plain.turn(w_kr @ x[0, t], t, 10000.0, None))


def query_of(self, x, context):
    """The query as the package makes it, for planted versions of `query_and_entry`."""
    query = rearrange(self.query(x), "b t (h d) -> b t h d", h=self.heads)
    nope, rotary = query.split((self.nope_dim, self.rope_dim), -1)
    return torch.cat((nope, rope.rotate(rotary, context.rotation)), -1)


def plant_rotary_key_per_head(mp):
    def widen(self):
        self.cache_width = self.kv_rank + self.heads * self.rope_dim
        self.kv_down_proj = nn.Linear(self.kv_down_proj.in_features, self.cache_width, bias=False)

    def query_and_entry(self, x, context):
        latent, keys = self.kv_down_proj(x).split((self.kv_rank, self.heads * self.rope_dim), -1)
        keys = rope.rotate(keys.unflatten(-1, (self.heads, -1)), context.rotation)
        return query_of(self, x, context), torch.cat((self.kv_norm(latent), keys.flatten(-2)), -1)

    def expanded(self, query, entries, mask):
        latent, keys = entries.split((self.kv_rank, self.heads * self.rope_dim), -1)
        keys = rearrange(keys, "b s (h d) -> b h s d", h=self.heads)
        key_value = rearrange(self.kv_up_proj(latent), "b s (h d) -> b h s d", h=self.heads)
        key_nope, value = key_value.split((self.nope_dim, self.value_dim), -1)
        key = torch.cat((key_nope, keys), -1)
        return attention.attend(query.transpose(1, 2), key, value, mask, self.scale).flatten(-2)

    after_init(mp, MultiHeadLatentAttention, widen)
    mp.setattr(MultiHeadLatentAttention, "query_and_entry", query_and_entry)
    mp.setattr(MultiHeadLatentAttention, "expanded", expanded)
    mp.setattr(MultiHeadLatentAttention, "absorbed", expanded)


def plant_entry(mp, entry):
    """Cache `entry(self, x, context, latent, key_rope)` instead of the normalised latent and the rotated key."""

    def query_and_entry(self, x, context):
        latent, key_rope = self.kv_down_proj(x).split((self.kv_rank, self.rope_dim), -1)
        return query_of(self, x, context), torch.cat(entry(self, context, latent, key_rope), -1)

    mp.setattr(MultiHeadLatentAttention, "query_and_entry", query_and_entry)


def rotated(key, context):
    return rope.rotate(key[:, :, None], context.rotation)[:, :, 0]


def plant_rotary_key_from_the_latent(mp):
    def entry(self, context, c, k):
        return self.kv_norm(c), rotated(self.kv_norm(c)[..., : self.rope_dim], context)

    plant_entry(mp, entry)


def plant_key_cached_before_its_rotation(mp):
    plant_entry(mp, lambda self, context, c, k: (self.kv_norm(c), k))


# 2. Norms on both latents, none on the rotary key; the cache holds the latent after its norm -----------------------


def check_02_norms_stand_on_the_latents_only():
    model, x = build(), random_stream(1, 5, 64)
    module = model.layers[0].attention
    out, cached = through_cache(model, x, [5])
    want, entries = attention_reference(model, x)
    close(cached, entries)
    close(out, want)
    with torch.no_grad():  # a norm forgets the size of what it is given
        module.q_down_proj.weight.mul_(1000)
        close(through_cache(model, x, [5])[0], out, 1e-4)
        module.kv_down_proj.weight[: NANO.kv_lora_rank].mul_(1000)
        close(through_cache(model, x, [5])[0], out, 1e-4)
        module.kv_down_proj.weight[NANO.kv_lora_rank :].mul_(3)
        close(through_cache(model, x, [5])[1][..., NANO.kv_lora_rank :], 3 * cached[..., NANO.kv_lora_rank :])


def plant_latent_cached_before_its_norm(mp):
    """Right outputs, wrong cache: the norm comes only when the latent is read."""

    def normalise_first(form):
        def read(self, query, entries, mask):
            latent, key = entries.split((self.kv_rank, self.rope_dim), -1)
            return form(self, query, torch.cat((self.kv_norm(latent), key), -1), mask)

        return read

    plant_entry(mp, lambda self, context, c, k: (c, rotated(k, context)))
    for form in ("expanded", "absorbed"):
        mp.setattr(MultiHeadLatentAttention, form, normalise_first(getattr(MultiHeadLatentAttention, form)))


def plant_no_norm_on_the_key_value_latent(mp):
    plant_entry(mp, lambda self, context, c, k: (c, rotated(k, context)))


def plant_norm_on_the_rotary_key(mp):
    plant_entry(mp, lambda self, context, c, k: (self.kv_norm(c), rotated(F.rms_norm(k, k.shape[-1:]), context)))


def plant_one_norm_over_latent_and_key(mp):
    def entry(self, context, latent, key):
        both = F.rms_norm(torch.cat((latent, key), -1), (self.cache_width,))
        latent, key = both.split((self.kv_rank, self.rope_dim), -1)
        return latent * self.kv_norm.weight, rotated(key, context)

    plant_entry(mp, entry)


def plant_no_norm_on_the_query_latent(mp):
    def drop(self):
        self.q_norm = nn.Identity()
        self.q_norm.weight = nn.Parameter(torch.ones(self.q_down_proj.out_features))

    after_init(mp, MultiHeadLatentAttention, drop)


# 3. One scale for both parts of the score --------------------------------------------------------------------------


def check_03_one_scale_for_both_parts_of_the_score():
    model, x = build(), random_stream(1, 6, 64)
    assert model.layers[0].attention.scale == pytest.approx((16 + 8) ** -0.5)
    want = attention_reference(model, x)[0]
    close(without_cache(model, x), want)
    close(through_cache(model, x, [1] * 6)[0], want)


def plant_separate_scales(mp):
    query_and_entry = MultiHeadLatentAttention.query_and_entry

    def scaled_apart(self, x, context):
        query, entry = query_and_entry(self, x, context)
        nope, rope = query.split((self.nope_dim, self.rope_dim), -1)
        whole = self.nope_dim + self.rope_dim
        return torch.cat((nope * (whole / self.nope_dim) ** 0.5, rope * (whole / self.rope_dim) ** 0.5), -1), entry

    mp.setattr(MultiHeadLatentAttention, "query_and_entry", scaled_apart)


def plant_scale_of_the_unrotated_width(mp):
    mp.setattr(mla, "softmax_scale", lambda dim, yarn: (dim * 16 / 24) ** -0.5)


# 7. The absorbed form is the same function -------------------------------------------------------------------------


def check_07_absorbed_equals_naive():
    model, x = build(), random_stream(2, 6, 64)
    module, cache = model.layers[0].attention, model.new_cache(2, 6)
    context = model.attention_context(random_tokens(2, 6), cache)
    query, entries = module.query_and_entry(x, context)
    want = torch.cat([attention_reference(model, row[None])[0] for row in x])
    close(module.o_proj(module.absorbed(query, entries, context.mask)), want)
    close(through_cache(model, x, [1] * 6)[0], want)
    close(through_cache(model, x, [5, 1])[0], want)


def plant_absorbed(mp, split=lambda up, self: up.split((self.nope_dim, self.value_dim), 1), heads_first=True, scale=1):
    def absorbed(self, query, entries, mask):
        up = self.kv_up_proj.weight
        up = up.unflatten(0, (self.heads, -1)) if heads_first else rearrange(up, "(d h) r -> h d r", h=self.heads)
        key_up, value_up = split(up, self)
        nope, rope = query.split((self.nope_dim, self.rope_dim), -1)
        latent, key_rope = entries.split((self.kv_rank, self.rope_dim), -1)
        scores = torch.einsum("bthn,hnr,bsr->bhts", nope, key_up, latent)
        scores = scores + torch.einsum("bthd,bsd->bhts", rope, key_rope)
        if mask is None:  # an empty cache
            mask = torch.full_like(scores[0, 0], -torch.inf).triu(1)
        p = (scores * self.scale * scale + mask).softmax(-1)
        return torch.einsum("bhts,bsr,hvr->bthv", p, latent, value_up).flatten(-2)

    mp.setattr(MultiHeadLatentAttention, "absorbed", absorbed)


def plant_absorbed_split_values_first(mp):
    plant_absorbed(mp, lambda up, self: up.split((self.value_dim, self.nope_dim), 1)[::-1])


def plant_absorbed_split_across_heads(mp):
    plant_absorbed(mp, heads_first=False)


def plant_absorbed_scaled_by_the_latents_width(mp):
    plant_absorbed(mp, scale=((16 + 8) / (32 + 8)) ** 0.5)


def plant_absorbed_without_the_rotary_score(mp):
    absorbed = MultiHeadLatentAttention.absorbed

    def without(self, query, entries, mask):
        nope, rope = query.split((self.nope_dim, self.rope_dim), -1)
        return absorbed(self, torch.cat((nope, 0 * rope), -1), entries, mask)

    mp.setattr(MultiHeadLatentAttention, "absorbed", without)


# The table ---------------------------------------------------------------------------------------------------------

PITFALLS = [
    (1, check_01_rotary_key_is_one_vector_per_token, {
        "a rotary key per head": plant_rotary_key_per_head,
        "the rotary key from the latent": plant_rotary_key_from_the_latent,
        "key cached before its rotation": plant_key_cached_before_its_rotation,
    }),
    (2, check_02_norms_stand_on_the_latents_only, {
        "latent cached before its norm": plant_latent_cached_before_its_norm,
        "no norm on c_KV": plant_no_norm_on_the_key_value_latent,
        "no norm on c_Q": plant_no_norm_on_the_query_latent,
        "a norm on k_R": plant_norm_on_the_rotary_key,
        "one norm over c_KV and k_R": plant_one_norm_over_latent_and_key,
    }),
    (3, check_03_one_scale_for_both_parts_of_the_score, {
        "separate scales": plant_separate_scales,
        "scale of the nope width": plant_scale_of_the_unrotated_width,
    }),
    (7, check_07_absorbed_equals_naive, {
        "absorbed, values split first": plant_absorbed_split_values_first,
        "absorbed, split across heads": plant_absorbed_split_across_heads,
        "absorbed, scale of 576": plant_absorbed_scaled_by_the_latents_width,
        "absorbed, no rotary score": plant_absorbed_without_the_rotary_score,
    }),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
