"""The mutation test: every way to get the model wrong (PITFALLS.md) has a check, and the check catches the mistake.

For each pitfall there is a `check_*`, which asserts the right behaviour through what the package shows, and one or more
`plant_*`, which put the mistake into the package. The test at the end runs each check on the package as it is, where it
must pass, and with each mistake planted, where it must fail by its own assertion (a crash does not count).
The numbers are those of PITFALLS.md. 19 and 20 concern drafting and are tested in tests/inference.
"""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import plain_model as plain
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from plain_model import NANO, build, random_stream, random_tokens, through_cache, without_cache
from torch import nn

from minids.config import ModelConfig, YaRN
from minids.model import attention, layers, moe, transformer
from minids.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from minids.model.moe import Experts, MoE, Router
from minids.model.transformer import Block, KVCache, MiniDS, MTPModule

LONG = NANO.replace(rope_scaling=YaRN(original_max_position_embeddings=64))
MSCALE = NANO.replace(rope_scaling=YaRN(original_max_position_embeddings=64, mscale=0.2, mscale_all_dim=0.7))
V2 = NANO.replace(
    scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0
)
V3 = ModelConfig.preset("v3")


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


def after_init(mp, cls, change):
    """Let `change(module)` finish every new module of a class."""
    original = cls.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        change(self)

    mp.setattr(cls, "__init__", init)


def attention_reference(model, x):
    """Output and cache of the first layer's attention on [1, seq, dim], by the loops of `plain_model`."""
    w = dict(model.layers[0].attention.named_parameters())
    out, entries = plain.latent_attention(w, model.config, x[0])
    return out[None], entries[None]


# 1. One rotary key per token, shared by all heads ------------------------------------------------------------------


def check_01_rotary_key_is_one_vector_per_token():
    model, x = build(), random_stream(1, 5, 64)
    cached = through_cache(model, x, [5])[1]
    assert cached.shape[-1] == NANO.kv_lora_rank + NANO.qk_rope_head_dim
    w_kr = model.layers[0].attention.kv_down_proj.weight[NANO.kv_lora_rank :]
    for t in range(5):  # from the input by W_KR, rotated before it is cached
        close(cached[0, t, NANO.kv_lora_rank :], plain.turn(w_kr @ x[0, t], t, 10000.0, None))


def query_of(self, x, step):
    """The query as the package makes it, for planted versions of `query_and_entry`."""
    query = rearrange(self.q_proj(x), "b t (h d) -> b t h d", h=self.heads)
    nope, rope = query.split((self.nope_dim, self.rope_dim), -1)
    return torch.cat((nope, attention.rotate(rope, step.rotation)), -1)


def plant_rotary_key_per_head(mp):
    def widen(self):
        self.cache_width = self.kv_rank + self.heads * self.rope_dim
        self.kv_down_proj = nn.Linear(self.kv_down_proj.in_features, self.cache_width, bias=False)

    def query_and_entry(self, x, step):
        latent, keys = self.kv_down_proj(x).split((self.kv_rank, self.heads * self.rope_dim), -1)
        keys = attention.rotate(keys.unflatten(-1, (self.heads, -1)), step.rotation)
        return query_of(self, x, step), torch.cat((self.kv_norm(latent), keys.flatten(-2)), -1)

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
    """Cache `entry(self, x, step, latent, key_rope)` instead of the normalised latent and the rotated key."""

    def query_and_entry(self, x, step):
        latent, key_rope = self.kv_down_proj(x).split((self.kv_rank, self.rope_dim), -1)
        return query_of(self, x, step), torch.cat(entry(self, step, latent, key_rope), -1)

    mp.setattr(MultiHeadLatentAttention, "query_and_entry", query_and_entry)


def rotated(key, step):
    return attention.rotate(key[:, :, None], step.rotation)[:, :, 0]


def plant_rotary_key_from_the_latent(mp):
    plant_entry(mp, lambda self, step, c, k: (self.kv_norm(c), rotated(self.kv_norm(c)[..., : self.rope_dim], step)))


def plant_key_cached_before_its_rotation(mp):
    plant_entry(mp, lambda self, step, c, k: (self.kv_norm(c), k))


# 2. Norms on both latents, none on the rotary key; the cache holds the latent after its norm -----------------------


def check_02_norms_stand_on_the_latents_only():
    model, x = build(), random_stream(1, 5, 64)
    module = model.layers[0].attention
    out, cached = through_cache(model, x, [5])
    want, entries = attention_reference(model, x)
    close(cached, entries)
    close(out, want)
    with torch.no_grad():  # a norm forgets the size of what it is given
        module.q_proj[0].weight.mul_(1000)
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

    plant_entry(mp, lambda self, step, c, k: (c, rotated(k, step)))
    for form in ("expanded", "absorbed"):
        mp.setattr(MultiHeadLatentAttention, form, normalise_first(getattr(MultiHeadLatentAttention, form)))


def plant_no_norm_on_the_key_value_latent(mp):
    plant_entry(mp, lambda self, step, c, k: (c, rotated(k, step)))


def plant_norm_on_the_rotary_key(mp):
    plant_entry(mp, lambda self, step, c, k: (self.kv_norm(c), rotated(F.rms_norm(k, k.shape[-1:]), step)))


def plant_one_norm_over_latent_and_key(mp):
    def entry(self, step, latent, key):
        both = F.rms_norm(torch.cat((latent, key), -1), (self.cache_width,))
        latent, key = both.split((self.kv_rank, self.rope_dim), -1)
        return latent * self.kv_norm.weight, rotated(key, step)

    plant_entry(mp, entry)


def plant_no_norm_on_the_query_latent(mp):
    def drop(self):
        self.q_proj[1] = nn.Identity()
        self.q_proj[1].weight = nn.Parameter(torch.ones(self.q_proj[0].out_features))

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

    def scaled_apart(self, x, step):
        query, entry = query_and_entry(self, x, step)
        nope, rope = query.split((self.nope_dim, self.rope_dim), -1)
        whole = self.nope_dim + self.rope_dim
        return torch.cat((nope * (whole / self.nope_dim) ** 0.5, rope * (whole / self.rope_dim) ** 0.5), -1), entry

    mp.setattr(MultiHeadLatentAttention, "query_and_entry", scaled_apart)


def plant_scale_of_the_unrotated_width(mp):
    mp.setattr(attention, "softmax_scale", lambda dim, yarn: (dim * 16 / 24) ** -0.5)


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
    for module in (layers, attention):
        mp.setattr(module, "rotate", rotate)


def plant_half_split_rotation(mp):
    def rotate(x, rotation):
        pairs = torch.complex(*x.chunk(2, -1)) * rotation
        return torch.cat((pairs.real, pairs.imag), -1)

    plant_rotation(mp, rotate)


def plant_rotation_the_other_way_for_keys_and_queries(mp):
    rotate = layers.rotate
    plant_rotation(mp, lambda x, rotation: rotate(x, rotation.conj()))


def plant_no_rotation(mp):
    plant_rotation(mp, lambda x, rotation: x)


# 5. YaRN's temperature belongs into the softmax scale, squared -----------------------------------------------------


def check_05_softmax_scale_holds_the_squared_temperature():
    assert layers.softmax_scale(V3.qk_head_dim, V3.rope_scaling) == pytest.approx(0.1352338, abs=5e-8)
    assert layers.softmax_scale(V3.qk_head_dim, None) == pytest.approx(0.0721688, abs=5e-8)
    for config in (LONG, MSCALE):
        model, x = build(config), random_stream(1, 6, 64)
        want, entries = attention_reference(model, x)
        close(without_cache(model, x), want)
        got, cached = through_cache(model, x, [1] * 6)
        close(got, want)
        close(cached, entries)
    rotation = layers.rotations(LONG, torch.tensor([[0, 5]]), 8, torch.float64)
    close(rotation.abs(), torch.ones(1, 2, 1, 4, dtype=torch.float64))


def plant_scale_from(mp, scale):
    for module in (layers, attention):
        mp.setattr(module, "softmax_scale", scale)


def plant_temperature_not_squared(mp):
    def scale(dim, yarn):
        return dim**-0.5 * (1.0 if yarn is None else plain.temperature(yarn, yarn.mscale_all_dim))

    plant_scale_from(mp, scale)


def plant_no_temperature(mp):
    plant_scale_from(mp, lambda dim, yarn: dim**-0.5)


def plant_temperature_on_the_rotated_part_only(mp):
    rotations = layers.rotations

    def scaled(config, positions, dim, dtype):
        yarn = config.rope_scaling
        return rotations(config, positions, dim, dtype) * (1 if yarn is None else plain.temperature(yarn, yarn.mscale))

    plant_no_temperature(mp)
    for module in (layers, transformer):
        mp.setattr(module, "rotations", scaled)


def plant_temperature_from_mscale(mp):
    def scale(dim, yarn):
        return dim**-0.5 * (1.0 if yarn is None else plain.temperature(yarn, yarn.mscale) ** 2)

    plant_scale_from(mp, scale)


# 6. YaRN's ramp ----------------------------------------------------------------------------------------------------


def check_06_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    got = layers.rotations(V3, torch.tensor([[1]]), 64, torch.float64).angle().flatten()
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
        low, high = bounds(dim, theta, yarn) if bounds else layers.yarn_ramp_bounds(dim, theta, yarn)
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        ramp = 1 - ramp if swap else ramp
        return frequency * (1 - ramp) + frequency / yarn.factor * ramp

    mp.setattr(layers, "rotary_frequencies", frequencies)


def plant_ramp_bounds_rounded_inwards(mp):
    exact = layers.yarn_ramp_bounds
    plant_ramp(mp, lambda *args: (exact(*args)[0] + 1, exact(*args)[1] - 1))


def plant_fast_pairs_stretched(mp):
    plant_ramp(mp, swap=True)


def plant_all_pairs_stretched(mp):
    plant_ramp(mp, lambda *args: (-2, -1))


def plant_ramp_of_the_extended_length(mp):
    plant_ramp(mp, length=163840)


# 7. The absorbed form is the same function -------------------------------------------------------------------------


def check_07_absorbed_equals_naive():
    model, x = build(), random_stream(2, 6, 64)
    module, cache = model.layers[0].attention, model.new_cache(2, 6)
    step = model.step(random_tokens(2, 6), cache)
    query, entries = module.query_and_entry(x, step)
    want = torch.cat([attention_reference(model, row[None])[0] for row in x])
    close(module.o_proj(module.absorbed(query, entries, step.mask)), want)
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
    step = MiniDS.step

    def masked(self, tokens, cache=None):
        right = step(self, tokens, cache)
        if cache is None:
            return right
        query, slots = torch.arange(tokens.shape[1])[:, None], torch.arange(right.mask.shape[-1])
        seen = visible(query, cache.lengths[:, None, None], slots).expand(right.mask[:, 0].shape)
        mask = torch.zeros_like(right.mask).masked_fill(~seen[:, None], -torch.inf)
        return dataclasses.replace(right, mask=mask)

    mp.setattr(MiniDS, "step", masked)


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
        return KVCache([block] * config.num_hidden_layers, batch=1, slots=1).num_bytes()

    mla, mha = bytes_per_token(V3), bytes_per_token(V3.replace(attention="gqa"))
    assert mla == 61 * (512 + 64) * 2 == 70_272
    assert mha == 61 * 2 * 128 * 128 * 2
    assert mha / mla == pytest.approx(56.9, abs=0.05)
    assert 128 * 1024 * mla / 2**30 == pytest.approx(8.6, abs=0.05)  # GiB at 128K: all layers, not one


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


# 10. The bias selects and does nothing else ------------------------------------------------------------------------


def router_with(config=NANO, bias=None):
    router = build(config).layers[1].ffn.router
    if bias is not None:
        router.bias.data.copy_(torch.as_tensor(bias))
    return router


def weights_by_expert(routing):
    dense = torch.zeros_like(routing.scores)
    return dense.scatter(-1, routing.experts, routing.weights)


def check_10_bias_selects_and_weights_are_unbiased():
    x = random_stream(1, 8, 64)
    router = router_with(bias=torch.zeros(8))
    before = weights_by_expert(router(x))
    router.bias.data.fill_(0.4)  # nobody is preferred: the same experts, so the same weights
    close(weights_by_expert(router(x)), before, 0)
    router.bias.data.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0]))  # only the first two can be chosen
    routing = router(x)
    assert routing.load.tolist() == [8, 8, 0, 0, 0, 0, 0, 0]
    s = (x @ router.weight.T).sigmoid()[..., :2]
    close(weights_by_expert(routing)[..., :2], 2.5 * s / s.sum(-1, keepdim=True))


def plant_router(mp, weigh, scores_of=lambda self, x: self.scores(x)):
    """`weigh(self, scores, experts)` makes the weights of the chosen."""

    def forward(self, x):
        scores = scores_of(self, x)
        experts = self.choose(scores.detach())
        return moe.Routing(experts, weigh(self, scores, experts), scores)

    mp.setattr(Router, "forward", forward)


def normalised(weights, scaling=2.5):
    return weights / weights.sum(-1, keepdim=True) * scaling


def plant_biased_weights(mp):
    plant_router(mp, lambda self, s, e: normalised((s + self.bias).gather(-1, e)))


def plant_bias_inside_the_sigmoid(mp):
    def scores(self, x):
        return (F.linear(x, self.weight) + self.bias).sigmoid()

    plant_router(mp, lambda self, s, e: normalised(s.gather(-1, e)), scores)


def plant_bias_ignored(mp):
    mp.setattr(Router, "choose", lambda self, s: self.within_best_groups(s).topk(2).indices)


def plant_softmax_over_the_chosen(mp):
    plant_router(mp, lambda self, s, e: 2.5 * s.gather(-1, e).logit().softmax(-1))


def plant_weights_not_normalised(mp):
    plant_router(mp, lambda self, s, e: 2.5 * s.gather(-1, e))


def plant_weights_normalised_over_all_experts(mp):
    plant_router(mp, lambda self, s, e: 2.5 * (s / s.sum(-1, keepdim=True)).gather(-1, e))


def plant_weights_without_the_scaling_factor(mp):
    plant_router(mp, lambda self, s, e: normalised(s.gather(-1, e), 1.0))


# 11. Groups are ranked by their two best experts -------------------------------------------------------------------


def check_11_groups_are_ranked_by_their_two_best():
    def chosen(config, scores, bias=None):
        router = router_with(config.replace(topk_group=1), bias)
        return set(router.choose(torch.tensor([[scores]], dtype=torch.float64)).flatten().tolist())

    one_star_or_two_good = [0.9, 0.1, 0.6, 0.5, 0.3, 0.2, 0.1, 0.1]
    assert chosen(NANO, one_star_or_two_good, torch.zeros(8)) == {2, 3}
    assert chosen(V2, one_star_or_two_good) == {0, 1}  # V2 ranks by the best one
    assert chosen(NANO, one_star_or_two_good, [0, 0, 0, 0, 0.5, 0.5, 0, 0]) == {4, 5}  # biased scores rank
    wide = NANO.replace(n_group=2, num_experts_per_tok=2)
    many_mediocre_or_two_good = [0.8, 0.7, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    assert chosen(wide, many_mediocre_or_two_good, torch.zeros(8)) == {0, 1}


def plant_group_score(mp, rank_of, mask=-torch.inf):
    def within_best_groups(self, scores):
        groups = scores.unflatten(-1, (self.config.n_group, -1))
        kept = rank_of(self, groups).topk(self.config.topk_group).indices
        outside = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
        return groups.masked_fill(outside[..., None], mask).flatten(-2)

    mp.setattr(Router, "within_best_groups", within_best_groups)


def best(count):
    return lambda self, groups: groups.topk(min(count, groups.shape[-1])).values.sum(-1)


def plant_group_score_of_the_best_one(mp):
    plant_group_score(mp, best(1))


def plant_group_score_of_all_members(mp):
    plant_group_score(mp, best(100))


def plant_v2_groups_ranked_like_v3(mp):
    plant_group_score(mp, best(2))


def plant_group_score_without_the_bias(mp):
    def rank(self, groups):
        bias = 0 if self.bias is None else self.bias.view(groups.shape[-2:])
        return (groups - bias).topk(2 if self.config.selects_with_bias else 1).values.sum(-1)

    plant_group_score(mp, rank)


# 12. What lies outside the kept groups is -inf ---------------------------------------------------------------------


def check_12_dropped_groups_cannot_win_with_negative_biases():
    router, x = router_with(bias=[-2.0, -1.5, -2.0, -1.5, -1.0, -2.0, -3.0, -1.0]), random_stream(1, 64, 64)
    w = dict(router.named_parameters())
    for token, chosen in zip(x[0], router(x).experts[0].tolist(), strict=True):
        assert set(chosen) == set(plain.route(w, NANO, token))


def right_rank(self, groups):
    return groups.topk(2 if self.config.selects_with_bias else 1).values.sum(-1)


def plant_zero_instead_of_minus_infinity(mp):
    plant_group_score(mp, right_rank, mask=0.0)


def plant_groups_not_limited(mp):
    mp.setattr(Router, "within_best_groups", lambda self, scores: scores)


# 13. The bias update -----------------------------------------------------------------------------------------------


def check_13_bias_moves_by_gamma_against_the_load():
    model = build()
    for router in model.routers():
        router.bias.data.zero_()
    loads = torch.tensor([[9, 1, 4, 2, 4, 4, 4, 4], [4, 4, 4, 4, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0, 0, 32]])
    model.update_balance_bias(loads, 0.001)
    signs = [[-1, 1, 0, 1, 0, 0, 0, 0], [0] * 8, [1, 1, 1, 1, 1, 1, 1, -1]]
    for router, sign in zip(model.routers(), signs, strict=True):
        close(router.bias.double(), 0.001 * torch.tensor(sign, dtype=torch.float64), 1e-9)


def plant_update(mp, step):
    def update(bias, load, speed):
        load = load.float()
        bias.data.add_(speed * step(load.mean() - load))

    mp.setattr(moe, "update_balance_bias", update)
    mp.setattr(transformer, "update_balance_bias", update)


def plant_update_with_the_sign_reversed(mp):
    plant_update(mp, lambda missing: -missing.sign())


def plant_update_in_proportion(mp):
    plant_update(mp, lambda missing: missing)


def plant_one_load_for_all_layers(mp):
    update = MiniDS.update_balance_bias
    mp.setattr(MiniDS, "update_balance_bias", lambda self, loads, v: update(self, loads.sum(0).expand_as(loads), v))


def check_13_bias_moves_once_per_step_whatever_the_micro_batches():
    model, tokens = build(), random_tokens(4, 6)
    before = [router.bias.clone() for router in model.routers()]
    with torch.no_grad():
        whole = model(tokens, mtp=True).loads
    parts = [model(part, mtp=True) for part in tokens.split(2)]
    sum(out.logits.sum() for out in parts).backward()
    model.eval()(tokens)  # evaluation counts for nothing
    for router, bias in zip(model.routers(), before, strict=True):
        assert torch.equal(router.bias, bias)
    model.update_balance_bias(sum(out.loads for out in parts), 0.001)
    for router, bias, load in zip(model.routers(), before, whole.tolist(), strict=True):
        missing = [sum(load) / len(load) - one for one in load]
        sign = torch.tensor([(m > 0) - (m < 0) for m in missing])
        close(router.bias, bias + 0.001 * sign, 1e-7)


def plant_update_in_every_forward_pass(mp):
    forward = Router.forward

    def counting(self, x):
        routing = forward(self, x)
        moe.update_balance_bias(self.bias, routing.load, 0.001)
        return routing

    mp.setattr(Router, "forward", counting)


def plant_update_in_training_passes_only(mp):
    forward = Router.forward

    def counting(self, x):
        routing = forward(self, x)
        if self.training and torch.is_grad_enabled():
            moe.update_balance_bias(self.bias, routing.load, 0.001)
        return routing

    mp.setattr(Router, "forward", counting)


def plant_loads_of_the_last_micro_batch(mp):
    """What a model does that keeps its own count and overwrites it."""
    update = MiniDS.update_balance_bias
    forward = MiniDS.forward

    def remembering(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if torch.is_grad_enabled() and self.training:
            self.last_loads = out.loads
        return out

    mp.setattr(MiniDS, "forward", remembering)
    mp.setattr(MiniDS, "update_balance_bias", lambda self, loads, speed: update(self, self.last_loads, speed))


def check_13_bias_is_saved_in_float32_and_not_trained():
    model, twin = build(), build(seed=5)
    twin.load_state_dict(model.state_dict())
    for router, copy in zip(model.routers(), twin.routers(), strict=True):
        assert router.bias.any() and torch.equal(copy.bias, router.bias)
        assert not router.bias.requires_grad
    low = build().bfloat16()
    for router in low.routers():
        router.bias.data.fill_(1.0)
    for _ in range(3):  # steps of 0.001 around 1 vanish in bfloat16
        low.update_balance_bias(torch.tensor([[9, 1, 1, 1, 1, 1, 1, 1]] * 3), 0.001)
    for router in low.routers():
        close(router.bias.float(), torch.tensor([0.997] + [1.003] * 7), 1e-6)


def replace_bias(make):
    def change(self):
        bias = self.bias.data
        del self._parameters["bias"]
        make(self, bias)

    return change


def plant_bias_lost_in_the_checkpoint(mp):
    def not_saved(self, bias):
        self.register_buffer("bias", bias.normal_(0, 0.05), persistent=False)

    after_init(mp, Router, replace_bias(not_saved))


def plant_bias_trained_by_gradient(mp):
    after_init(mp, Router, lambda self: self.bias.requires_grad_(True))


def plant_bias_in_bfloat16(mp):
    mp.setattr(Router, "_apply", nn.Module._apply)


# 14. The gate in float32 -------------------------------------------------------------------------------------------


def check_14_gate_is_computed_in_float32():
    for config in (NANO, V2):
        router = build(config, torch.bfloat16).layers[1].ffn.router
        x = random_stream(1, 6, 64, dtype=torch.bfloat16)
        logits = x.double() @ router.weight.double().T
        want = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        scores = [router(x).scores]
        router = router.float()
        with torch.autocast("cpu", torch.bfloat16):
            scores.append(router(x.float()).scores)
        for got in scores:
            assert got.dtype == torch.float32
            close(got.double(), want, 1e-6)


def plant_scores(mp, logits_of):
    def scores(self, x):
        logits = logits_of(self, x)
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)

    mp.setattr(Router, "scores", scores)


def plant_gate_in_bfloat16(mp):
    plant_scores(mp, lambda self, x: F.linear(x, self.weight))


def plant_gate_matmul_in_bfloat16_sigmoid_in_float32(mp):
    plant_scores(mp, lambda self, x: F.linear(x, self.weight).float())


def plant_gate_under_autocast(mp):
    """The casts are there, but autocast is left on and undoes them."""
    plant_scores(mp, lambda self, x: F.linear(x.float(), self.weight.float()).float())


# 15. The sequence-wise loss ----------------------------------------------------------------------------------------


def check_15_sequence_loss_is_the_papers():
    router = router_with(bias=[3.0, 0, 0, 0, 0, 0, 0, -3.0])
    routing = router(random_stream(3, 6, 64))
    want = sum(plain.sequence_balance_loss(rows, 2) for rows in routing.scores.tolist()) / 3
    loss = moe.balance_loss(routing, NANO.replace(aux_loss_alpha=0.5))
    assert loss.item() == pytest.approx(0.5 * want)
    assert moe.balance_loss(routing, NANO).item() == pytest.approx(1e-4 * want)  # V3's alpha where a config is silent
    assert ModelConfig.preset("v3").aux_loss_alpha == 1e-4
    even = torch.full((1, 4, 8), 0.3, dtype=torch.float64)
    for token, expert in itertools.product(range(4), range(2)):
        even[0, token, 2 * token + expert] = 0.6
    assert moe.sequence_balance_loss(even, 2).item() == pytest.approx(1.0)
    assert torch.autograd.grad(loss, router.weight)[0].any()


def plant_sequence_loss(mp, frequency_of=None, probability_of=lambda s: (s / s.sum(-1, keepdim=True)).mean(1)):
    def loss(scores, k):
        chosen = F.one_hot(scores.topk(k).indices, scores.shape[-1]).sum(-2).to(scores.dtype)
        frequency = (frequency_of or right_frequency)(chosen, k)
        return (frequency * probability_of(scores)).sum(-1).mean()

    mp.setattr(moe, "sequence_balance_loss", loss)


def right_frequency(chosen, k):
    return chosen.mean(1) * chosen.shape[-1] / k


def plant_softmax_of_the_scores(mp):
    plant_sequence_loss(mp, probability_of=lambda s: s.softmax(-1).mean(1))


def plant_softmax_of_the_logits(mp):
    plant_sequence_loss(mp, probability_of=lambda s: s.logit().softmax(-1).mean(1))


def plant_probabilities_not_normalised(mp):
    plant_sequence_loss(mp, probability_of=lambda s: s.mean(1))


def plant_frequency_per_token_only(mp):
    plant_sequence_loss(mp, lambda chosen, k: chosen.mean(1))


def plant_frequency_of_the_whole_batch(mp):
    plant_sequence_loss(mp, lambda chosen, k: right_frequency(chosen, k).mean(0, keepdim=True))


def plant_frequency_of_the_biased_choice(mp):
    def loss(routing, config):
        frequency, probability = moe._frequency_and_probability(routing.experts, routing.scores)
        return config.aux_loss_alpha * (frequency * probability).sum(-1).mean()

    mp.setattr(moe, "balance_loss", loss)


def plant_alpha_forgotten(mp):
    mp.setattr(moe, "balance_loss", lambda routing, config: routing.scores.new_zeros((), requires_grad=True))


# 16. No dropping, a plain shared expert, dense first layers, no biases ---------------------------------------------


def check_16_no_token_is_dropped():
    module = build().layers[1].ffn
    x = random_stream(1, 1, 64).expand(2, 8, 64)  # sixteen times the same token: all want the same two experts
    out, routing = module(x)
    assert routing.load.sum() == 32 and routing.load.max() == 16
    close(out, out[:1, :1].expand_as(out))
    x = random_stream(2, 8, 64)
    out, routing = module(x)
    want, load = plain.mixture(dict(module.named_parameters()), NANO, x.flatten(0, 1))
    assert routing.load.tolist() == load
    close(out.flatten(0, 1), want)


def plant_capacity(mp, factor):
    """Each expert reads its first `factor` * mean tokens; the rest get nothing from it."""
    by_expert = Experts.by_expert

    def dropping(self, x, experts, weights, load):
        chosen = F.one_hot(experts, len(load)).sum(1)
        place = (chosen.cumsum(0) - 1).gather(1, experts)
        kept = place < factor * experts.numel() / len(load)
        return by_expert(self, x, experts, weights * kept, load)

    mp.setattr(Experts, "by_expert", dropping)


def plant_capacity_factor_of_1(mp):
    plant_capacity(mp, 1.0)


def plant_capacity_factor_of_1_25(mp):
    plant_capacity(mp, 1.25)


def check_16_shared_expert_is_added_unweighted():
    for shared in (1, 2):
        module = build(NANO.replace(n_shared_experts=shared)).layers[1].ffn
        module.experts.down_proj.data.zero_()
        w = plain.part(dict(module.named_parameters()), "shared.")
        assert w["down_proj.weight"].shape == (64, shared * NANO.moe_intermediate_size)
        x = random_stream(1, 4, 64)
        close(module(x)[0][0], torch.stack([plain.swiglu(w, v) for v in x[0]]))


def plant_shared(mp, weigh):
    def forward(self, x):
        routing = self.router(x)
        return self.experts(x, routing) + weigh(self, routing, self.shared(x)), routing

    mp.setattr(MoE, "forward", forward)


def plant_shared_scaled_by_2_5(mp):
    plant_shared(mp, lambda self, routing, out: 2.5 * out)


def plant_shared_averaged_with_the_chosen(mp):
    plant_shared(mp, lambda self, routing, out: out / (1 + routing.experts.shape[-1]))


def plant_shared_weighted_by_a_gate(mp):
    plant_shared(mp, lambda self, routing, out: out * routing.scores.amax(-1, keepdim=True))


def plant_shared_left_out(mp):
    plant_shared(mp, lambda self, routing, out: 0 * out)


def check_16_first_layers_are_dense_and_nothing_has_a_bias():
    model = build(NANO.replace(num_hidden_layers=4, first_k_dense_replace=3))
    assert [isinstance(layer.ffn, MoE) for layer in model.layers] == [False, False, False, True]
    assert model(random_tokens(1, 3)).loads.shape == (1, 8)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {"layers.3.ffn.router.bias", "mtp.0.block.ffn.router.bias"}
    nothing = torch.zeros(1, 3, 64, dtype=torch.float64)
    for layer in model.layers:
        out = layer.ffn(nothing)
        assert not (out[0] if isinstance(out, tuple) else out).any()


def plant_every_layer_a_mixture(mp):
    block = transformer.Block
    mp.setattr(transformer, "Block", lambda config, dense: block(config, dense=False))


def plant_only_the_first_layer_dense(mp):
    block, made = transformer.Block, itertools.count()
    mp.setattr(transformer, "Block", lambda config, dense: block(config, dense=dense and next(made) % 3 == 0))


def plant_feed_forward_with_biases(mp):
    def add(self):
        self.down_proj.bias = nn.Parameter(torch.ones(self.down_proj.out_features))

    after_init(mp, layers.SwiGLU, add)


# 17. The order of the two halves that the MTP projection reads -----------------------------------------------------


def check_17_projection_reads_hidden_then_embedding():
    model = build()
    module, step = model.mtp[0], model.step(random_tokens(1, 4))
    hidden, embedding, other = (random_stream(1, 4, 64, seed=s) for s in (1, 2, 3))
    weight = module.proj.weight.detach().clone()
    module.proj.weight.data[:, 64:] = 0  # only the first half reads
    close(module(hidden, embedding, step)[0], module(hidden, other, step)[0], 0)
    assert (module(hidden, embedding, step)[0] - module(other, embedding, step)[0]).abs().max() > 0.01
    module.proj.weight.data.copy_(weight)[:, :64] = 0  # only the second half
    close(module(hidden, embedding, step)[0], module(other, embedding, step)[0], 0)
    assert (module(hidden, embedding, step)[0] - module(hidden, other, step)[0]).abs().max() > 0.01
    module.proj.weight.data.copy_(weight)
    check_18_equals_plain(depths=1)


def plant_module(mp, hidden=lambda self, h: self.hidden_norm(h), embedding=lambda self, e: self.embedding_norm(e),
                 join=lambda h, e: (h, e), step_of=lambda step: step):  # fmt: skip
    def forward(self, h, e, step, cache=None):
        joined = torch.cat(join(hidden(self, h), embedding(self, e)), -1)
        return self.block(self.proj(joined), step_of(step), cache)

    mp.setattr(MTPModule, "forward", forward)


def plant_embedding_before_hidden(mp):
    plant_module(mp, join=lambda h, e: (e, h))


def plant_no_norm_on_the_hidden_state(mp):
    plant_module(mp, hidden=lambda self, h: h)


def plant_no_norm_on_the_embedding(mp):
    plant_module(mp, embedding=lambda self, e: e)


# 18. Which tokens a depth reads, and what it may not see -----------------------------------------------------------


DEEP = NANO.replace(num_nextn_predict_layers=2)


def check_18_depth_k_reads_token_i_plus_k_and_not_its_label():
    model, tokens = build(DEEP), random_tokens(1, 7)
    with torch.no_grad():
        base = model(tokens, mtp=True)
        for j in range(2, 7):
            other = tokens.clone()
            other[0, j] = (tokens[0, j] + 1) % 272
            out = model(other, mtp=True)
            pairs = zip([base.logits, *base.mtp_logits], [out.logits, *out.mtp_logits], strict=True)
            for k, (x, y) in enumerate(pairs):
                moved = (x - y).abs().amax(-1)[0]
                assert (moved[: j - k] < 1e-9).all(), "an output moved that must not know this token"
                assert moved[j - k] > 1e-6, "the first output that may know this token does not"


def check_18_equals_plain(depths=2):
    model, tokens = build(NANO.replace(num_nextn_predict_layers=depths)), random_tokens(1, 6)
    with torch.no_grad():
        out = model(tokens, mtp=True)
        logits, further, _ = plain.forward(model, tokens[0].tolist())
    close(out.logits[0], logits)
    for got, want in zip(out.mtp_logits, further, strict=True):
        close(got[0], want)


def plant_block_without_a_causal_mask(mp):
    def unmasked(step):
        batch, seq = step.positions.shape
        return dataclasses.replace(step, mask=torch.zeros(batch, 1, seq, seq, dtype=torch.float64))

    plant_module(mp, step_of=unmasked)


def plant_embedding_ignored(mp):
    plant_module(mp, embedding=lambda self, e: torch.zeros_like(e))


def plant_hidden_ignored(mp):
    plant_module(mp, hidden=lambda self, h: torch.zeros_like(h))


def plant_rolled_positions(mp):
    """The rotation rolled along with the tokens, so that the last position becomes the first."""
    def rolled(step):
        return dataclasses.replace(step, positions=step.positions.roll(-1, 1), rotation=step.rotation.roll(-1, 1))

    plant_module(mp, step_of=rolled)


def plant_further(mp, following=lambda t, k: t[:, k:], before=None, logits=None):
    """Prediction modules that read other tokens, continue from another stream or end in another head."""

    def predict_further(self, tokens, out):
        hidden = out.hidden
        for k, module in enumerate(self.mtp, start=1):
            read = following(tokens, k)
            start = hidden[:, :-1] if before is None else before(self, out, k)
            hidden, routing = module(start, self.embedding(read), self.step(read))
            out.mtp_logits.append((logits or (lambda s, m, h: s.head(m.norm(h))))(self, module, hidden))
            out.routings.append(routing)

    mp.setattr(MiniDS, "_predict_further", predict_further)


def plant_embedding_of_the_label(mp):
    plant_further(mp, lambda tokens, k: tokens.roll(-k - 1, 1)[:, : tokens.shape[1] - k])


def plant_embedding_of_the_token_before(mp):
    plant_further(mp, lambda tokens, k: tokens[:, k - 1 : -1])


def plant_every_depth_reads_the_next_token(mp):
    plant_further(mp, lambda tokens, k: tokens[:, 1 : tokens.shape[1] - k + 1])


def plant_every_depth_starts_from_the_main_model(mp):
    plant_further(mp, before=lambda self, out, k: out.hidden[:, :-k])


def plant_stream_after_the_final_norm(mp):
    plant_further(mp, before=lambda self, out, k: self.norm(out.hidden)[:, :-k])


def plant_final_norm_of_the_main_model(mp):
    plant_further(mp, logits=lambda self, module, hidden: self.logits(hidden))


def check_18_embedding_and_head_are_the_main_models():
    model, tokens = build(DEEP), random_tokens(1, 6)
    shaped_by_vocabulary = [name for name, p in model.mtp.named_parameters() if 272 in p.shape]
    assert shaped_by_vocabulary == []
    before = model(tokens, mtp=True).mtp_logits
    model.head.weight.data.mul_(2)
    for old, new in zip(before, model(tokens, mtp=True).mtp_logits, strict=True):
        close(new, 2 * old)


def plant_own_head(mp):
    def add(self):
        self.own_head = nn.Linear(64, 272, bias=False)

    after_init(mp, MTPModule, add)
    plant_further(mp, logits=lambda self, module, hidden: module.own_head(module.norm(hidden)))


def plant_copied_head(mp):
    """The head's values at the start, not the head: invisible to a count of vocabulary-sized parameters."""
    after_init(mp, MiniDS, lambda self: setattr(self, "copied", SimpleNamespace(weight=self.head.weight.data.clone())))
    plant_further(
        mp, logits=lambda self, module, h: F.linear(module.norm(h), self.copied.weight.to(self.head.weight.dtype))
    )


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
    (7, check_07_absorbed_equals_naive, {
        "absorbed, values split first": plant_absorbed_split_values_first,
        "absorbed, split across heads": plant_absorbed_split_across_heads,
        "absorbed, scale of 576": plant_absorbed_scaled_by_the_latents_width,
        "absorbed, no rotary score": plant_absorbed_without_the_rotary_score,
    }),
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
    (10, check_10_bias_selects_and_weights_are_unbiased, {
        "biased weights": plant_biased_weights,
        "bias inside the sigmoid": plant_bias_inside_the_sigmoid,
        "bias ignored": plant_bias_ignored,
        "softmax over the chosen": plant_softmax_over_the_chosen,
        "weights not normalised": plant_weights_not_normalised,
        "normalised over all": plant_weights_normalised_over_all_experts,
        "no scaling factor": plant_weights_without_the_scaling_factor,
    }),
    (11, check_11_groups_are_ranked_by_their_two_best, {
        "group score of the best one": plant_group_score_of_the_best_one,
        "group score of all members": plant_group_score_of_all_members,
        "V2 ranked like V3": plant_v2_groups_ranked_like_v3,
        "group score unbiased": plant_group_score_without_the_bias,
    }),
    (12, check_12_dropped_groups_cannot_win_with_negative_biases, {
        "0 instead of -inf": plant_zero_instead_of_minus_infinity,
        "groups not limited": plant_groups_not_limited,
    }),
    (13, check_13_bias_moves_by_gamma_against_the_load, {
        "sign reversed": plant_update_with_the_sign_reversed,
        "proportional step": plant_update_in_proportion,
        "one load for all layers": plant_one_load_for_all_layers,
    }),
    (13, check_13_bias_moves_once_per_step_whatever_the_micro_batches, {
        "update per forward pass": plant_update_in_every_forward_pass,
        "update per micro-batch": plant_update_in_training_passes_only,
        "last micro-batch only": plant_loads_of_the_last_micro_batch,
    }),
    (13, check_13_bias_is_saved_in_float32_and_not_trained, {
        "not in the checkpoint": plant_bias_lost_in_the_checkpoint,
        "trained by gradient": plant_bias_trained_by_gradient,
        "bias in bfloat16": plant_bias_in_bfloat16,
    }),
    (14, check_14_gate_is_computed_in_float32, {
        "gate in bfloat16": plant_gate_in_bfloat16,
        "gate matmul in bfloat16": plant_gate_matmul_in_bfloat16_sigmoid_in_float32,
        "autocast left on": plant_gate_under_autocast,
    }),
    (15, check_15_sequence_loss_is_the_papers, {
        "softmax of the scores": plant_softmax_of_the_scores,
        "softmax of the logits": plant_softmax_of_the_logits,
        "P not normalised": plant_probabilities_not_normalised,
        "f without N/k": plant_frequency_per_token_only,
        "f over the batch": plant_frequency_of_the_whole_batch,
        "f of the biased choice": plant_frequency_of_the_biased_choice,
        "alpha forgotten": plant_alpha_forgotten,
    }),
    (16, check_16_no_token_is_dropped, {
        "capacity factor 1": plant_capacity_factor_of_1,
        "capacity factor 1.25": plant_capacity_factor_of_1_25,
    }),
    (16, check_16_shared_expert_is_added_unweighted, {
        "shared times 2.5": plant_shared_scaled_by_2_5,
        "shared averaged": plant_shared_averaged_with_the_chosen,
        "shared gated": plant_shared_weighted_by_a_gate,
        "shared left out": plant_shared_left_out,
    }),
    (16, check_16_first_layers_are_dense_and_nothing_has_a_bias, {
        "no dense layer": plant_every_layer_a_mixture,
        "one dense layer of three": plant_only_the_first_layer_dense,
        "feed-forward with biases": plant_feed_forward_with_biases,
    }),
    (17, check_17_projection_reads_hidden_then_embedding, {
        "[embedding; hidden]": plant_embedding_before_hidden,
        "hidden not normalised": plant_no_norm_on_the_hidden_state,
        "embedding not normalised": plant_no_norm_on_the_embedding,
    }),
    (18, check_18_depth_k_reads_token_i_plus_k_and_not_its_label, {
        "no causal mask": plant_block_without_a_causal_mask,
        "embedding ignored": plant_embedding_ignored,
        "reads its label": plant_embedding_of_the_label,
        "reads t_{i+k-1}": plant_embedding_of_the_token_before,
        "every depth reads t_{i+1}": plant_every_depth_reads_the_next_token,
    }),
    (18, check_18_equals_plain, {
        "hidden state ignored": plant_hidden_ignored,
        "positions rolled": plant_rolled_positions,
        "depths in parallel": plant_every_depth_starts_from_the_main_model,
        "stream after the final norm": plant_stream_after_the_final_norm,
        "the main model's final norm": plant_final_norm_of_the_main_model,
    }),
    (18, check_18_embedding_and_head_are_the_main_models, {
        "a head of its own": plant_own_head,
        "a copy of the head": plant_copied_head,
    }),
]  # fmt: skip
MISTAKES = [(n, name, check, plant) for n, check, plants in PITFALLS for name, plant in plants.items()]


@functools.cache
def passes(check):
    """Run a check on the package as it is: once, however many mistakes it is to catch."""
    check()
    return True


@pytest.mark.parametrize("number, name, check, plant", MISTAKES, ids=[f"{n:02}-{name}" for n, name, *_ in MISTAKES])
def test_check_passes_and_catches_the_planted_mistake(number, name, check, plant, monkeypatch):
    assert passes(check)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_every_pitfall_of_the_model_has_a_check_and_a_mistake():
    assert {number for number, *_ in PITFALLS} == set(range(1, 19))  # 19 and 20: tests/inference
    assert all(plants for *_, plants in PITFALLS)
    for number, check, _ in PITFALLS:
        assert check.__name__.startswith(f"check_{number:02}_")
    assert len({plant for *_, plant in MISTAKES}) == len(MISTAKES) == len({(n, name) for n, name, *_ in MISTAKES})


@pytest.mark.parametrize("plant", [plant_half_split_rotation, plant_no_temperature, plant_no_rotation])
def test_some_mistakes_do_not_show_at_position_0(plant, monkeypatch):
    """Why the checks above read several tokens: the first one is rotated by nothing and attends to itself alone."""
    model, x = build(LONG), random_stream(1, 1, 64)
    want = attention_reference(model, x)[0]
    plant(monkeypatch)
    close(without_cache(build(LONG), x), want)
