"""Packed training batches: all rows have the same length, and every token is a target once per epoch.

Notable choices:
- the rows of an epoch are cut from the concatenation of all shuffled documents; neighbouring rows share one token (the
  last target of one row is the first input of the next);
- batch n is a pure function of (corpus, seed, n), so the position in a checkpoint is a single integer;
- tokens are neither copied nor reordered: an epoch is two permutations, through which a batch is indexed.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from minids.data.corpus import Document
from minids.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Concatenated documents, each as <bos> text <eos>.

    `tokens` has the tokenizer's dtype; document d starts at `starts[d]` and has the domain
    `domain_names[domains[d]]`.
    """

    tokens: Integer[np.ndarray, "tokens"]
    starts: Int[np.ndarray, "documents"]
    domains: Int[np.ndarray, "documents"]
    domain_names: tuple[str, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of all contents that determine the batches; it is stored in checkpoints."""
        digest = hashlib.sha256(repr(self.domain_names).encode())
        for array in (self.tokens, self.starts, self.domains):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenizedCorpus:
    """Encode `documents` in their order; domains are numbered alphabetically. Raises ValueError if there are none."""
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    domains: list[str] = []
    bos, eos = (np.array([i], tokenizer.dtype) for i in (tokenizer.bos_id, tokenizer.eos_id))
    documents = iter(documents)
    while some := list(itertools.islice(documents, 256)):  # limits memory, and is enough for all cores
        for document, ids in zip(some, tokenizer.encode_batch([document.text for document in some]), strict=True):
            pieces += [bos, ids, eos]
            lengths.append(len(ids) + 2)
            domains.append(document.domain)
    if not lengths:
        raise ValueError("corpus holds no text: there is no document to tokenize")
    starts = np.cumsum([0, *lengths[:-1]])
    domain_names, domain_ids = np.unique(domains, return_inverse=True)
    return TokenizedCorpus(np.concatenate(pieces), starts, domain_ids, tuple(domain_names.tolist()))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of seq_len + 1 tokens: `tokens[:, :-1]` are the inputs, `tokens[:, 1:]` the targets.

    `documents` and `domains` are the indices of each token's document and domain; `loss_mask` marks the tokens that are
    targets, by default all.
    """

    tokens: Int[Tensor, "batch seq_plus_1"]
    documents: Int[Tensor, "batch seq_plus_1"]
    domains: Int[Tensor, "batch seq_plus_1"]
    loss_mask: Bool[Tensor, "batch seq_plus_1"] | None = None

    def rows(self, rows: slice) -> "Batch":
        """Return some of the rows."""
        mask = None if self.loss_mask is None else self.loss_mask[rows]
        return Batch(self.tokens[rows], self.documents[rows], self.domains[rows], mask)

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Split into batches of `size` rows; the last one may be smaller."""
        return (self.rows(slice(first, first + size)) for first in range(0, len(self.tokens), size))

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device."""
        mask = None if self.loss_mask is None else self.loss_mask.to(device)
        return Batch(self.tokens.to(device), self.documents.to(device), self.domains.to(device), mask)


class BatchStream(Iterator[Batch]):
    """Endless iterator of training batches. `position` counts the batches returned, and can be set at no cost.

    Each epoch shuffles the documents, cuts their concatenation into rows, and shuffles the rows, because a long
    document would otherwise fill a batch. The last tokens of an epoch, fewer than `seq_len`, are not used in it. A
    batch may have the last rows of one epoch and the first of the next. Raises ValueError if the corpus is too short
    for one row.
    """

    def __init__(self, corpus: TokenizedCorpus, *, batch_size: int, seq_len: int, seed: int) -> None:
        self.corpus = corpus
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.position = 0
        self.rows_per_epoch = _count_rows(corpus, seq_len, "training")
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, n: int) -> Batch:
        """Return batch `n` without changing the position."""
        numbers = (divmod(i, self.rows_per_epoch) for i in range(n * self.batch_size, (n + 1) * self.batch_size))
        parts = []
        for epoch, of_epoch in itertools.groupby(numbers, key=lambda number: number[0]):
            stream, rows = self._epoch(epoch)
            parts.append(stream.cut(rows[[row for _, row in of_epoch]], self.seq_len))
        return Batch(*torch.from_numpy(np.concatenate(parts, axis=1)))

    def state_dict(self) -> dict[str, int | str]:
        """Return the position and the corpus's fingerprint, for `load_state_dict` with the same sizes and seed."""
        return {"position": self.position, "corpus": self.corpus.fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Restore the position. Raises ValueError if it was saved with another corpus."""
        here = self.corpus.fingerprint
        if state["corpus"] != here:
            raise ValueError(f"saved data position is of corpus {state['corpus']}, these batches are of corpus {here}")
        self.position = int(state["position"])

    def _shuffle(self, epoch: int) -> tuple["_DocumentStream", Int[np.ndarray, "rows"]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.corpus.starts))
        return _DocumentStream(self.corpus, order), random.permutation(self.rows_per_epoch)


def evaluation_batches(
    corpus: TokenizedCorpus, *, batch_size: int, seq_len: int, max_batches: int | None = None
) -> Iterator[Batch]:
    """Return every row of `corpus` once, in the same order every time; the last batch may be smaller.

    Rows are shuffled with a fixed seed, so that `max_batches` samples the whole corpus. The last tokens, fewer than
    `seq_len`, are not targets. Raises ValueError as `BatchStream` does.
    """
    stream = _DocumentStream(corpus, np.arange(len(corpus.starts)))
    rows = np.random.default_rng(0).permutation(_count_rows(corpus, seq_len, "validation"))
    firsts = range(0, len(rows), batch_size)[:max_batches]
    cuts = (stream.cut(rows[first : first + batch_size], seq_len) for first in firsts)
    return (Batch(*torch.from_numpy(cut)) for cut in cuts)


class _DocumentStream:
    """Concatenation of the documents of `corpus` in the given `order`, without copying them."""

    def __init__(self, corpus: TokenizedCorpus, order: Int[np.ndarray, "documents"]) -> None:
        lengths = np.diff(corpus.starts, append=len(corpus.tokens))[order]
        self.corpus, self.order = corpus, order
        self.begins = np.cumsum(lengths) - lengths  # start of document order[i] in the concatenation

    def cut(self, rows: Int[np.ndarray, "batch"], seq_len: int) -> Int[np.ndarray, "3 batch seq_plus_1"]:
        """Return tokens, documents and domains of some rows; row r starts at token r * seq_len of the concatenation."""
        positions = rows[:, None] * seq_len + np.arange(seq_len + 1)
        place = np.searchsorted(self.begins, positions, side="right") - 1
        documents = self.order[place]
        tokens = self.corpus.tokens[self.corpus.starts[documents] + positions - self.begins[place]]
        return np.stack([tokens, documents, self.corpus.domains[documents]])


def _count_rows(corpus: TokenizedCorpus, seq_len: int, split: str) -> int:
    tokens = len(corpus.tokens)
    if tokens <= seq_len:
        raise ValueError(
            f"{split} corpus of {tokens} tokens is too short for a row of {seq_len} + 1 tokens: "
            f"give more text (--data), or lower seq_len (--seq-len) to at most {tokens - 1}"
        )
    return (tokens - 1) // seq_len
