"""Tokens packed into training batches: every batch is full, and every token is a target once an epoch.

Notable choices:
- the rows of an epoch are cut from one long stream of shuffled documents, one token shared by neighbouring rows (it
  is the last target of one and the first input of the next);
- batch n is a pure function of (corpus, seed, n), so the position in a checkpoint is a single number;
- nothing is copied or reordered: an epoch is two permutations, and a batch is looked up through them.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from minids.data.corpus import Document
from minids.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """All documents one after the other, each as <bos> text <eos>.

    `tokens` has the smallest dtype that the tokenizer's ids fit; document d starts at `starts[d]` and is of the kind
    `domain_names[domains[d]]`.
    """

    tokens: Integer[np.ndarray, "tokens"]
    starts: Int[np.ndarray, "documents"]
    domains: Int[np.ndarray, "documents"]
    domain_names: tuple[str, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs for any two corpora whose batches could differ; goes into a checkpoint."""
        digest = hashlib.sha256(repr(self.domain_names).encode())
        for array in (self.tokens, self.starts, self.domains):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenizedCorpus:
    """Encode `documents` in their order. Domains are numbered alphabetically. ValueError where there are none."""
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    domains: list[str] = []
    bos, eos = (np.array([i], tokenizer.dtype) for i in (tokenizer.bos_id, tokenizer.eos_id))
    documents = iter(documents)
    while some := list(itertools.islice(documents, 256)):  # few enough for memory, enough to keep every core busy
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
    """Rows of seq_len + 1 tokens: `tokens[:, :-1]` go into the model, `tokens[:, 1:]` are the targets.

    `documents` and `domains` say of each token which document of the corpus it belongs to, and its domain.
    """

    tokens: Int[Tensor, "batch seq_plus_1"]
    documents: Int[Tensor, "batch seq_plus_1"]
    domains: Int[Tensor, "batch seq_plus_1"]


class BatchStream(Iterator[Batch]):
    """Endless training batches. `position` counts the batches served, and moving there costs nothing.

    An epoch shuffles the documents, cuts their stream into rows and shuffles those too, since a long document would
    otherwise fill a batch. Tokens left over at an epoch's end, fewer than `seq_len`, wait for the next epoch. A batch
    may hold the last rows of one epoch and the first of the next.
    """

    def __init__(self, corpus: TokenizedCorpus, *, batch_size: int, seq_len: int, seed: int) -> None:
        self.corpus = corpus
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.position = 0
        self.rows_per_epoch = _count_rows(corpus, seq_len)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, n: int) -> Batch:
        """Batch number `n`; the position stays as it is."""
        numbers = (divmod(i, self.rows_per_epoch) for i in range(n * self.batch_size, (n + 1) * self.batch_size))
        parts = []
        for epoch, of_epoch in itertools.groupby(numbers, key=lambda number: number[0]):
            stream, rows = self._epoch(epoch)
            parts.append(stream.cut(rows[[row for _, row in of_epoch]], self.seq_len))
        return Batch(*torch.from_numpy(np.concatenate(parts, axis=1)))

    def state_dict(self) -> dict[str, int | str]:
        """What `load_state_dict` needs to go on with the same batches where sizes and seed are the same."""
        return {"position": self.position, "corpus": self.corpus.fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go to the saved position. Raises ValueError where it is one in another corpus."""
        here = self.corpus.fingerprint
        if state["corpus"] != here:
            raise ValueError(f"saved data position is of corpus {state['corpus']}, this stream has corpus {here}")
        self.position = state["position"]

    def _shuffle(self, epoch: int) -> tuple["_DocumentStream", Int[np.ndarray, "rows"]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.corpus.starts))
        return _DocumentStream(self.corpus, order), random.permutation(self.rows_per_epoch)


def evaluation_batches(
    corpus: TokenizedCorpus, *, batch_size: int, seq_len: int, max_batches: int | None = None
) -> Iterator[Batch]:
    """Every row of `corpus` once, the same every time. The last batch is as small as it has to be.

    Rows come in an order that is shuffled once and for all, so that `max_batches` reads from everywhere. Tokens left
    over at the end, fewer than `seq_len`, are no targets. Raises ValueError as `BatchStream` does.
    """
    stream = _DocumentStream(corpus, np.arange(len(corpus.starts)))
    rows = np.random.default_rng(0).permutation(_count_rows(corpus, seq_len))
    firsts = range(0, len(rows), batch_size)[:max_batches]
    cuts = (stream.cut(rows[first : first + batch_size], seq_len) for first in firsts)
    return (Batch(*torch.from_numpy(cut)) for cut in cuts)


class _DocumentStream:
    """The documents of `corpus` end to end in the given `order`, without moving them."""

    def __init__(self, corpus: TokenizedCorpus, order: Int[np.ndarray, "documents"]) -> None:
        lengths = np.diff(corpus.starts, append=len(corpus.tokens))[order]
        self.corpus, self.order = corpus, order
        self.begins = np.cumsum(lengths) - lengths  # where in the stream document order[i] begins

    def cut(self, rows: Int[np.ndarray, "batch"], seq_len: int) -> Int[np.ndarray, "3 batch seq_plus_1"]:
        """Tokens, documents and domains of rows number `rows`; row r begins with token r * seq_len of the stream."""
        positions = rows[:, None] * seq_len + np.arange(seq_len + 1)
        place = np.searchsorted(self.begins, positions, side="right") - 1
        documents = self.order[place]
        tokens = self.corpus.tokens[self.corpus.starts[documents] + positions - self.begins[place]]
        return np.stack([tokens, documents, self.corpus.domains[documents]])


def _count_rows(corpus: TokenizedCorpus, seq_len: int) -> int:
    rows = (len(corpus.tokens) - 1) // seq_len
    if rows == 0:
        raise ValueError(f"corpus of {len(corpus.tokens)} tokens is too short for a row of {seq_len} + 1 tokens")
    return rows
