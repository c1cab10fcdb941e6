"""Engram: planted mistakes, each caught by the comparison with the formulas or with the uncached pass."""

import plain_streams as plain
import torch
from pitfalls import assert_caught, close, each_mistake
from plain_model import NANO, build, random_stream, random_tokens

from minids.config import EngramConfig
from minids.model import engram
from minids.model.engram import Engram, EngramLayers, Gate

CONFIG = NANO.replace(hc_mult=2, engram=EngramConfig(layers=(1,), rows=40, heads=2, dim=12, pad_token=7, bos_token=4))


def check_memory_is_the_formula():
    model, tokens, x = build(CONFIG), random_tokens(1, 8), random_stream(1, 8, 2, 64)
    tokens[0, 3] = 4
    ngrams = model.engram.ngrams(tokens, model.attention_context(tokens), None)
    want = plain.memory_added(model.engram.layers[0], CONFIG, tokens[0].tolist(), x[0], 7, 4)
    close(model.engram(1, x, ngrams), x + want)


def plant_hash(mp, combine, divide=lambda mixed, sizes: mixed[..., None] % sizes):
    def hash_ngrams(ngrams, multipliers, rows):
        products = ngrams * multipliers
        mixed, hashes = products[..., 0], []
        for place, sizes in enumerate(rows, start=1):
            mixed = combine(mixed, products[..., place])
            hashes.append(divide(mixed, sizes))
        return torch.stack(hashes, -2)

    mp.setattr(engram, "hash_ngrams", hash_ngrams)


def plant_sum_instead_of_exclusive_or(mp):
    plant_hash(mp, torch.add)


def plant_one_prime_for_all_heads(mp):
    plant_hash(mp, torch.bitwise_xor, lambda mixed, sizes: (mixed[..., None] % sizes[0]).expand(*mixed.shape, 2))


def plant_places_exchanged(mp):
    original = engram.hash_ngrams
    mp.setattr(engram, "hash_ngrams", lambda ngrams, *rest: original(ngrams.flip(-1), *rest))


def plant_longest_first(mp):
    original = engram.hash_ngrams
    mp.setattr(engram, "hash_ngrams", lambda *arguments: original(*arguments).flip(-2))


def plant_tables_on_top_of_each_other(mp):
    def rows_read(self, ngrams):
        return engram.hash_ngrams(ngrams, torch.tensor(self.multipliers), torch.tensor(self.table_rows))

    mp.setattr(Engram, "rows_read", rows_read)


def plant_ngram_of_what_follows(mp):
    original = engram.last_tokens

    def last_tokens(tokens, positions, *rest):
        return original(tokens.flip(1), positions, *rest).flip(1)

    mp.setattr(engram, "last_tokens", last_tokens)


def plant_documents_crossed(mp):
    original = engram.last_tokens

    def last_tokens(tokens, positions, config, history=None):
        return original(tokens, positions, EngramConfig(**(vars(config) | {"bos_token": None})), history)

    mp.setattr(engram, "last_tokens", last_tokens)


def plant_padding_of_token_0(mp):
    original = engram.last_tokens

    def last_tokens(tokens, positions, config, history=None):
        return original(tokens, positions, EngramConfig(**(vars(config) | {"pad_token": 0})), history)

    mp.setattr(engram, "last_tokens", last_tokens)


def plant_gate(mp, gate_of, normed=True):
    def forward(self, memory, x):
        key = self.key_norm(self.key_proj(memory))
        query = self.query_norm(x) if normed else x
        return gate_of((key * query).sum(-1, keepdim=True) * x.shape[-1] ** -0.5)

    mp.setattr(Gate, "forward", forward)


def signed_root(a):
    return (a.sign() * a.abs().sqrt()).sigmoid()


def plant_gate_without_the_root(mp):
    plant_gate(mp, torch.sigmoid)


def plant_gate_without_the_sign(mp):
    plant_gate(mp, lambda a: a.abs().sqrt().sigmoid())


def plant_gate_of_the_stream_as_it_is(mp):
    plant_gate(mp, signed_root, normed=False)


def plant_gate_of_the_first_stream_for_all(mp):
    def forward(self, x, ngrams):
        memory = self.table(self.rows_read(ngrams)).flatten(2)
        return x + (self.gates[0](memory, x[:, :, 0]) * self.value_proj(memory))[:, :, None]

    mp.setattr(Engram, "forward", forward)


def check_ngrams_reach_back_into_the_cache():
    model, tokens = build(CONFIG), random_tokens(2, 7)
    cache = model.new_cache(2, 7)
    parts = [model.logits(model.trunk(part, cache)[0]) for part in tokens.split((3, 1, 1, 2), 1)]
    close(torch.cat(parts, 1), model(tokens).logits)


def plant_ngrams_of_the_chunk_alone(mp):
    original = EngramLayers.ngrams

    def ngrams(self, tokens, context, history):
        local = torch.arange(tokens.shape[1]).expand_as(tokens)
        context = type(context)(context.sequence, local, context.rotation, context.mask)
        return original(self, tokens, context, None)

    mp.setattr(EngramLayers, "ngrams", ngrams)


PITFALLS = [
    (1, check_memory_is_the_formula, {
        "sum instead of exclusive or": plant_sum_instead_of_exclusive_or,
        "one prime for all heads": plant_one_prime_for_all_heads,
        "places exchanged": plant_places_exchanged,
        "longest first": plant_longest_first,
        "tables on top of each other": plant_tables_on_top_of_each_other,
        "n-gram of what follows": plant_ngram_of_what_follows,
        "documents crossed": plant_documents_crossed,
        "padding of token 0": plant_padding_of_token_0,
        "gate without the root": plant_gate_without_the_root,
        "gate without the sign": plant_gate_without_the_sign,
        "gate of the stream as it is": plant_gate_of_the_stream_as_it_is,
        "gate of the first stream for all": plant_gate_of_the_first_stream_for_all,
    }),
    (2, check_ngrams_reach_back_into_the_cache, {"n-grams of the chunk alone": plant_ngrams_of_the_chunk_alone}),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
