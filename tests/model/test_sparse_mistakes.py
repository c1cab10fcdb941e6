"""Sparse attention: mistakes found in ports of it, planted one by one; each is caught by the check of what it breaks.

A check passes on the package as it is and fails by its own assertion where the mistake is planted (`pitfalls.py`).
"""

import plain_indexer as plain
import pytest
import torch
import torch.nn.functional as F
from pitfalls import assert_caught, close
from plain_indexer import SPARSE, model_of, weights_of
from plain_model import random_stream, random_tokens, without_cache

from minids.model import rope, sparse_attention
from minids.model.sparse_attention import LightningIndexer, SparseLatentAttention

LENGTH = 12


def outputs(x):
    """The first layer's output by the package, and by the loops with the sets that the loops choose."""
    model = model_of()
    w = weights_of(model.layers[0].attention)
    attended = plain.chosen(plain.index_scores(w, SPARSE, x[0])[0].tolist(), SPARSE.index_topk)
    with torch.no_grad():
        return without_cache(model, x)[0], plain.sparse_attention(w, SPARSE, x[0], attended)


# The choice: only its outcome shows, and only where k is well below the length ---------------------------------------


def check_chosen_tokens():
    got, want = outputs(random_stream(1, LENGTH, 64))
    close(got, want)


def plant_pairs_rotated(mp):
    def rotate_pairs(x, rotation):
        width = 2 * rotation.shape[-1]
        return torch.cat((rope.rotate(x[..., :width], rotation), x[..., width:]), -1)

    mp.setattr(sparse_attention, "rotate_halves", rotate_pairs)


def plant_last_channels_rotated(mp):
    rotate = sparse_attention.rotate_halves
    mp.setattr(sparse_attention, "rotate_halves", lambda x, rotation: rotate(x.flip(-1), rotation).flip(-1))


def plant_no_rotation(mp):
    mp.setattr(sparse_attention, "rotate_halves", lambda x, rotation: x)


def plant_scores(mp, weigh=lambda weights: weights, relu=torch.relu):
    def scores(self, x, query_latent, keys, context):
        query = self.q_proj(query_latent).unflatten(-1, (self.heads, self.dim))
        query = sparse_attention.rotate_halves(query, context.rotation)
        weights = weigh(F.linear(x, self.head_weights))
        return torch.einsum("bth,bths->bts", weights, relu(torch.einsum("bthd,bsd->bths", query, keys)))

    mp.setattr(LightningIndexer, "scores", scores)


def plant_softmax_over_heads(mp):
    plant_scores(mp, weigh=lambda weights: weights.softmax(-1))


def plant_weights_that_cannot_be_negative(mp):
    plant_scores(mp, weigh=torch.relu)


def plant_no_relu(mp):
    plant_scores(mp, relu=lambda products: products)


def plant_rms_norm_of_the_key(mp):
    def key(self, x, context):
        normalised = F.rms_norm(self.k_proj(x), (self.dim,), self.k_norm.weight, 1e-6)
        return sparse_attention.rotate_halves(normalised[:, :, None], context.rotation)[:, :, 0]

    mp.setattr(LightningIndexer, "key", key)


def plant_query_before_the_norm(mp):
    """The norm has weights, so this is more than a factor of each row's scores."""
    mp.setattr(SparseLatentAttention, "query_latent", lambda self, x: self.q_down_proj(x))


def plant_lowest_scores(mp):
    choose = sparse_attention.choose
    mp.setattr(sparse_attention, "choose", lambda scores, visible, k: choose(-scores, visible, k))


def plant_choice_before_the_mask(mp):
    """The k best of all tokens, of which the visible ones are kept: fewer than k."""

    def choose(scores, visible, k):
        return torch.zeros_like(visible).scatter_(-1, scores.topk(k).indices, True) & visible

    mp.setattr(sparse_attention, "choose", choose)
    mp.setattr(sparse_attention, "additive", finite_mask)


def finite_mask(attended, like):
    """-1e30 in place of -inf: a row without any token gives no NaN, which would be caught too easily."""
    return torch.zeros_like(attended, dtype=like.dtype).masked_fill(~attended, -1e30)[:, None]


# Causality: early rows have fewer than k visible tokens --------------------------------------------------------------


def check_causality():
    model, tokens = model_of(), random_tokens(1, LENGTH)
    other = torch.cat((tokens[:, :6], random_tokens(1, LENGTH - 6, seed=9)), 1)
    with torch.no_grad():
        close(model(other).logits[:, :6], model(tokens).logits[:, :6])


def plant_mask_not_applied_after_the_choice(mp):
    def choose(scores, visible, k):
        best = scores.masked_fill(~visible, -torch.inf).topk(k).indices
        return torch.zeros_like(visible).scatter_(-1, best, True)

    mp.setattr(sparse_attention, "choose", choose)


def plant_no_mask(mp):
    choose = sparse_attention.choose
    mp.setattr(sparse_attention, "choose", lambda scores, visible, k: choose(scores, torch.ones_like(visible), k))


# Decoding from the cache ---------------------------------------------------------------------------------------------


def check_decoding():
    """Few index heads: scores of exactly 0 tie, and both ways to compute them must choose the same tokens."""
    model, tokens = model_of(index_n_heads=2, index_topk=3), random_tokens(1, 24)
    with torch.no_grad():
        cache = model.new_cache(1, 24)
        parts = torch.cat([model(part, cache=cache).logits for part in tokens.split([6, *[1] * 18], 1)], 1)
        close(parts, model(tokens).logits)


def plant_ties_broken_at_random(mp):
    def choose(scores, visible, k):
        order = torch.rand_like(scores).argsort(-1)  # equal scores in any order
        ranked = scores.masked_fill(~visible, -torch.inf).gather(-1, order).sort(dim=-1, descending=True, stable=True)
        best = order.gather(-1, ranked.indices)[..., :k]
        return torch.zeros_like(visible).scatter_(-1, best, True) & visible

    mp.setattr(sparse_attention, "choose", choose)


def plant_fetched_without_the_mask(mp):
    """Correct but for a sequence that has fewer than k tokens."""
    fetch = SparseLatentAttention.fetch

    def unmasked(self, entries, attended):
        fetched, mask = fetch(self, entries, attended)
        return fetched, torch.zeros_like(mask)

    mp.setattr(SparseLatentAttention, "fetch", unmasked)


def check_decoding_a_batch():
    model, following = model_of(), random_tokens(2, 1, seed=5)
    padded, cache = random_tokens(2, 9), model.new_cache(2, 10)
    with torch.no_grad():
        model(padded, cache=cache)
        cache.truncate(torch.tensor([1, 9]))
        got = model(following, cache=cache).logits[0]
        close(got, model(torch.cat((padded[:1, :1], following[:1]), 1)).logits[0, 1:])


def plant_unrotated_keys_in_the_cache(mp):
    """Correct for a whole sequence at once: the positions of a chunk are not those of the cached keys."""
    scores = LightningIndexer.scores

    def rotated_late(self, x, query_latent, keys, context):
        if keys.shape[1] == context.rotation.shape[1]:
            keys = sparse_attention.rotate_halves(keys[:, :, None], context.rotation)[:, :, 0]
        return scores(self, x, query_latent, keys, context)

    mp.setattr(LightningIndexer, "key", lambda self, x, context: self.k_norm(self.k_proj(x)))
    mp.setattr(LightningIndexer, "scores", rotated_late)


MISTAKES = {
    check_chosen_tokens: (
        plant_pairs_rotated, plant_last_channels_rotated, plant_no_rotation, plant_softmax_over_heads,
        plant_weights_that_cannot_be_negative, plant_no_relu, plant_rms_norm_of_the_key, plant_query_before_the_norm,
        plant_lowest_scores, plant_choice_before_the_mask,
    ),
    check_causality: (plant_mask_not_applied_after_the_choice, plant_no_mask),
    check_decoding: (plant_ties_broken_at_random, plant_unrotated_keys_in_the_cache),
    check_decoding_a_batch: (plant_fetched_without_the_mask,),
}  # fmt: skip
ROWS = [(check, plant) for check, plants in MISTAKES.items() for plant in plants]


@pytest.mark.parametrize("check, plant", ROWS, ids=[f"{c.__name__[6:]}-{p.__name__[6:]}" for c, p in ROWS])
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)


def test_with_k_at_least_the_length_a_wrong_rotation_is_invisible(monkeypatch):
    """Why the checks need a k well below the length: the indexer only decides which tokens are left out."""
    model, x = model_of(index_topk=LENGTH), random_stream(1, LENGTH, 64)
    with torch.no_grad():
        before = without_cache(model, x)
        plant_pairs_rotated(monkeypatch)
        close(without_cache(model, x), before, 0)
