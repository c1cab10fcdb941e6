"""Engram: a memory read by the hash of the last tokens, not by attention (arXiv 2601.07372; FACTS.md section 10).

For each position and each length n = 2 .. `max_ngram`, the last n tokens are hashed to one row in each of several
tables. The rows side by side are the memory's answer e; a gate compares its key with the residual stream h and decides
how much of its value is added:

    h += sigmoid(sign(a) sqrt(|a|)) W_v e,        a = RMSNorm(W_k e) . RMSNorm(h) / sqrt(dim).

Notable choices:
- which rows are read depends on the tokens alone, so they can be fetched before the forward pass reaches the layer;
- the hash is that of DeepSeek's demonstration code, integer for integer: exclusive or of (token * odd multiplier),
  modulo a prime, a different one per table, so that two n-grams that collide in one table differ in the others;
- tokens of the same normal form (case, accents, spaces) count as one: `merged_tokens`;
- with several residual streams each has a gate of its own, and all get the same value.

Not covered: the convolution after the gate (kernel 4, dilation 3), which the paper has and V4.1 left out.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import EngramConfig, ModelConfig
from minids.model.kv_cache import AttentionContext
from minids.model.layers import KeptInFloat32, ModuleList, RMSNorm

History = Int[Tensor, "batch slots 1"]
LEAST_AGREEMENT = 1e-6  # the square root has no finite slope at 0


def multipliers(vocab: int, layer: int, max_ngram: int, seed: int) -> list[int]:
    """Draw a layer's odd multipliers, one per place in an n-gram, so small that no product exceeds 63 bits.

    The bound depends on the number of token ids: another vocabulary draws other multipliers, and so other rows.
    """
    bound = max(1, np.iinfo(np.int64).max // vocab // 2)
    drawn = np.random.default_rng(seed + 10007 * layer).integers(0, bound, size=max_ngram, dtype=np.int64)
    return [2 * int(number) + 1 for number in drawn]


def hash_ngrams(
    ngrams: Int[Tensor, "*tokens places"], multipliers: Int[Tensor, "places"], rows: Int[Tensor, "lengths heads"]
) -> Int[Tensor, "*tokens lengths heads"]:
    """Return each table's row for the n-grams of lengths 2, 3, ...; place k is the token k positions ago."""
    products = ngrams * multipliers
    mixed, hashes = products[..., 0], []
    for place, sizes in enumerate(rows, start=1):
        mixed = mixed ^ products[..., place]
        hashes.append(mixed[..., None] % sizes)
    return torch.stack(hashes, -2)


def last_tokens(
    tokens: Int[Tensor, "batch seq"],
    positions: Int[Tensor, "batch seq"],
    config: EngramConfig,
    history: History | None = None,
) -> Int[Tensor, "batch seq places"]:
    """Return for each position its token and the ones before it, the newest first: the n-grams.

    `history` holds the tokens of all positions of the sequence, the given ones too; without it `tokens` start at
    position 0. What lies before a sequence or before its document is `pad_token`.
    """
    seen = tokens if history is None else history[..., 0]
    places, outside = [tokens], torch.zeros_like(tokens, dtype=torch.bool)
    for place in range(1, config.max_ngram):
        if config.bos_token is not None:
            outside = outside | (places[-1] == config.bos_token)
        outside = outside | (positions < place)
        earlier = seen.gather(1, (positions - place).clamp_min(0))
        places.append(earlier.masked_fill(outside, config.pad_token))
    return torch.stack(places, -1)


def merged_tokens(texts: Sequence[str]) -> list[int]:
    """Number the tokens of a vocabulary so that texts of one normal form share a number.

    The normal form has compatibility forms resolved (NFKC), no accents, lower case, runs of white space as one space
    and none at the ends. Text of which nothing is left keeps its own form; a token that is no valid UTF-8 (U+FFFD) has
    a number of its own.
    """
    number_of: dict[str | int, int] = {}
    keys = (token if "\ufffd" in text else normal_form(text) or text for token, text in enumerate(texts))
    return [number_of.setdefault(key, len(number_of)) for key in keys]


def normal_form(text: str) -> str:
    """Return the form that tokens of equal meaning share, as in Engram's demonstration code."""
    decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(character for character in decomposed if unicodedata.category(character) != "Mn")
    spaced = re.sub("[ \t\r\n]+", " ", "".join(map(str.lower, bare)))
    return " " if spaced == " " else spaced.strip()


class Gate(nn.Module):
    """How much of the memory's value one residual stream gets."""

    def __init__(self, width: int, dim: int, eps: float):
        super().__init__()
        self.key_proj = nn.Linear(width, dim, bias=False)
        self.key_norm, self.query_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(
        self, memory: Float[Tensor, "batch seq width"], x: Float[Tensor, "batch seq dim"]
    ) -> Float[Tensor, "batch seq 1"]:
        key, query = self.key_norm(self.key_proj(memory)), self.query_norm(x)
        agreement = (key * query).sum(-1, keepdim=True) * x.shape[-1] ** -0.5
        return (agreement.sign() * agreement.abs().clamp_min(LEAST_AGREEMENT).sqrt()).sigmoid()


class Engram(nn.Module):
    """The memory of one layer: its tables, stacked along the rows, a gate per residual stream, and the value."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        assert config.engram is not None
        engram, dim = config.engram, config.hidden_size
        self.multipliers = multipliers(config.vocab_size, layer, engram.max_ngram, engram.seed)
        self.table_rows = engram.table_rows()[layer]
        self.table = nn.Embedding(sum(map(sum, self.table_rows)), engram.dim // engram.heads)
        width = (engram.max_ngram - 1) * engram.dim
        self.value_proj = nn.Linear(width, dim, bias=False)
        self.gates: ModuleList[Gate] = ModuleList(Gate(width, dim, config.rms_norm_eps) for _ in range(config.hc_mult))

    def rows_read(self, ngrams: Int[Tensor, "batch seq places"]) -> Int[Tensor, "batch seq lengths heads"]:
        """Return the rows of `table` that hold the n-grams; they depend on nothing but the tokens."""
        factors, sizes = (torch.tensor(each, device=ngrams.device) for each in (self.multipliers, self.table_rows))
        first = sizes.flatten().cumsum(0).view_as(sizes) - sizes
        return hash_ngrams(ngrams, factors, sizes) + first

    def forward(
        self, x: Float[Tensor, "batch seq *streams dim"], ngrams: Int[Tensor, "batch seq places"]
    ) -> Float[Tensor, "batch seq *streams dim"]:
        """Add the gated value to every residual stream."""
        memory = self.table(self.rows_read(ngrams)).flatten(2)  # [batch, seq, lengths * dim of a length]
        value = self.value_proj(memory)
        if x.ndim == 3:
            return x + self.gates[0](memory, x) * value
        gates = torch.stack([gate(memory, x[:, :, i]) for i, gate in enumerate(self.gates)], 2)  # [batch, seq, n, 1]
        return x + gates * value[:, :, None]


class EngramLayers(KeptInFloat32):
    """The memories of all layers that have one, and the numbering of tokens by normal form that they share."""

    token_numbers: Float[Tensor, "vocab"]
    """A float32 tensor, which holds these integers exactly: torch writes no integers to a checkpoint of shards."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.engram is not None
        self.config = config.engram
        self.register_buffer("token_numbers", torch.arange(config.vocab_size, dtype=torch.float32))
        self.layers: ModuleList[Engram] = ModuleList(Engram(config, i) for i in config.engram.layers)

    def merge(self, numbers: Sequence[int]) -> None:
        """Number the tokens anew, as `merged_tokens` does; ids that no text has keep a number of their own."""
        own = range(len(numbers), len(self.token_numbers))
        self.token_numbers.copy_(torch.tensor([*numbers, *own], dtype=torch.float32))

    def ngrams(
        self, tokens: Int[Tensor, "batch seq"], context: AttentionContext, history: History | None
    ) -> Int[Tensor, "batch seq places"]:
        """Store the tokens in the cache's `history`, if there is one, and return the n-grams that end at each."""
        if history is not None:
            history[context.sequence, context.positions] = tokens[..., None]
        return self.token_numbers.long()[last_tokens(tokens, context.positions, self.config, history)]

    def forward(
        self, layer: int, x: Float[Tensor, "batch seq *streams dim"], ngrams: Int[Tensor, "batch seq places"]
    ) -> Float[Tensor, "batch seq *streams dim"]:
        """Add the memory of layer number `layer` to the residual stream, if that layer has one."""
        return self.layers[self.config.layers.index(layer)](x, ngrams) if layer in self.config.layers else x

    def num_idle_parameters(self) -> int:
        """Count the parameters that one token does not use: all rows but one of each table."""
        read = sum(map(len, self.layers[0].table_rows))
        return sum((m.table.num_embeddings - read) * m.table.embedding_dim for m in self.layers)


def new_history(batch: int, slots: int, device: torch.device) -> History:
    """Allocate the tokens of a cache's sequences, by position."""
    return torch.zeros(batch, slots, 1, dtype=torch.int64, device=device)
