"""Packing: every token a target once an epoch, labels that follow their tokens, batches that a position pins down."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.data.batches import BatchStream, TokenizedCorpus, evaluation_batches, tokenize
from minids.data.corpus import Document
from minids.data.tokenizer import BPETokenizer, ByteTokenizer

TOKENIZER = ByteTokenizer()


def make_documents(lengths):
    """Documents whose text tells which one it is: uppercase is prose, lowercase is code."""
    return [
        Document(chr(ord("A" if i % 3 else "a") + i % 26) * length, "prose" if i % 3 else "code", f"group {i}")
        for i, length in enumerate(lengths)
    ]


def numbered_corpus(lengths):
    """A corpus in which every token is unlike any other: token i is i."""
    starts = np.cumsum([0, *lengths[:-1]])
    domains = np.arange(len(lengths)) % 2
    return TokenizedCorpus(np.arange(sum(lengths), dtype=np.int32), starts, domains, ("code", "prose"))


CORPUS = tokenize(make_documents([5, 0, 200, 17, 3, 90, 1, 40]), TOKENIZER)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "documents", "domains"))


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BPETokenizer.train(["AAAA aaaa BBBB"], 270)], ids=["bytes", "bpe"])
def test_tokenize_marks_documents_and_domains(tokenizer):
    documents = make_documents([5, 0, 200, 17])
    corpus = tokenize(iter(documents), tokenizer)
    assert corpus.tokens.dtype == np.uint16 and corpus.domain_names == ("code", "prose")
    ends = [*corpus.starts[1:], len(corpus.tokens)]
    for document, start, end, domain in zip(documents, corpus.starts, ends, corpus.domains, strict=True):
        ids = corpus.tokens[start:end]
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[1:-1], skip_special=False) == document.text
        assert corpus.domain_names[domain] == document.domain


def test_tokenize_many_documents_keeps_their_order():
    documents = [Document(str(i), "text", str(i)) for i in range(1000)]
    corpus = tokenize(documents, TOKENIZER)
    assert TOKENIZER.decode(corpus.tokens) == "".join(map(str, range(1000)))
    assert len(corpus.starts) == len(corpus.domains) == 1000


def test_tokenize_nothing():
    with pytest.raises(ValueError, match="corpus holds no text"):
        tokenize([], TOKENIZER)


def test_fingerprint_follows_the_content():
    assert CORPUS.fingerprint == tokenize(make_documents([5, 0, 200, 17, 3, 90, 1, 40]), TOKENIZER).fingerprint
    assert CORPUS.fingerprint != tokenize(make_documents([5, 0, 200, 17, 3, 90, 40, 1]), TOKENIZER).fingerprint


def test_batch_shape_and_dtype():
    batch = next(BatchStream(CORPUS, batch_size=3, seq_len=16, seed=0))
    for tensor in (batch.tokens, batch.documents, batch.domains):
        assert tensor.shape == (3, 17) and tensor.dtype == torch.int64


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20),
    seq_len=st.integers(1, 9),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_every_token_is_a_target_once_an_epoch(lengths, seq_len, batch_size, seed):
    corpus = numbered_corpus([length + seq_len for length in lengths])
    stream = BatchStream(corpus, batch_size=batch_size, seq_len=seq_len, seed=seed)
    per_epoch = stream.rows_per_epoch
    rows = torch.cat([next(stream).tokens for _ in range(-(-2 * per_epoch // batch_size))])
    for epoch in (rows[:per_epoch], rows[per_epoch : 2 * per_epoch]):
        targets = epoch[:, 1:].flatten().tolist()
        assert len(set(targets)) == len(targets)  # none twice
        assert len(corpus.tokens) - 1 - len(targets) < seq_len  # none missing but the first and the tail


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20), seed=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_labels_belong_to_their_tokens(lengths, seed):
    corpus = numbered_corpus(lengths)
    seq_len = min(5, len(corpus.tokens) - 1)
    batch = next(BatchStream(corpus, batch_size=9, seq_len=seq_len, seed=seed))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    assert np.array_equal(batch.documents, document_of[batch.tokens])
    assert np.array_equal(batch.domains, corpus.domains[document_of[batch.tokens]])


def test_domain_labels_match_the_text():
    """Uppercase letters are prose, lowercase ones code: read back from the characters, not from the corpus."""
    code, prose = (CORPUS.domain_names.index(name) for name in ("code", "prose"))
    letters = 0
    for batch in itertools.islice(BatchStream(CORPUS, batch_size=4, seq_len=16, seed=0), 10):
        for token, domain in zip(batch.tokens.flatten().tolist(), batch.domains.flatten().tolist(), strict=True):
            if token < 256:
                letters += 1
                assert domain == (prose if chr(token).isupper() else code)
    assert letters > 500


def test_rows_are_continuous_text_within_a_document():
    corpus = numbered_corpus([7, 30, 12, 50])
    for batch in itertools.islice(BatchStream(corpus, batch_size=4, seq_len=8, seed=0), 6):
        inside = batch.documents[:, 1:] == batch.documents[:, :-1]
        assert (batch.tokens[:, 1:] - batch.tokens[:, :-1])[inside].eq(1).all()
        begins = corpus.starts[batch.documents[:, 1:]]
        assert np.array_equal(batch.tokens[:, 1:][~inside], begins[~inside.numpy()])


def test_batches_depend_on_nothing_but_corpus_seed_and_number():
    def stream(**changes):
        return BatchStream(CORPUS, **({"batch_size": 4, "seq_len": 16, "seed": 0} | changes))

    first = [next(source) for source in [stream()] for _ in range(20)]
    again = stream()
    backwards = [again.batch(n) for n in reversed(range(20))][::-1]
    assert all(map(same, first, backwards)) and again.position == 0
    assert not same(first[0], stream(seed=1).batch(0))


def test_epochs_differ():
    stream = BatchStream(CORPUS, batch_size=1, seq_len=16, seed=0)
    epochs = [[stream.batch(i + e * stream.rows_per_epoch) for i in range(stream.rows_per_epoch)] for e in (0, 1)]
    assert not all(map(same, *epochs))


def test_a_long_document_does_not_fill_a_batch():
    corpus = numbered_corpus([4000] * 8)
    batch = next(BatchStream(corpus, batch_size=32, seq_len=16, seed=0))
    assert len(batch.documents.unique()) >= 6


@pytest.mark.parametrize("stop", [0, 1, 7, 50])
def test_resume_gives_the_same_batches(stop):
    undisturbed = BatchStream(CORPUS, batch_size=4, seq_len=16, seed=3)
    for _ in range(stop):
        next(undisturbed)
    state = json.loads(json.dumps(undisturbed.state_dict()))  # as a checkpoint would keep it
    resumed = BatchStream(CORPUS, batch_size=4, seq_len=16, seed=3)
    resumed.load_state_dict(state)
    for _ in range(20):
        assert same(next(undisturbed), next(resumed))
    assert resumed.position == stop + 20


def test_a_position_in_another_corpus_is_refused_and_changes_nothing():
    stream = BatchStream(CORPUS, batch_size=4, seq_len=16, seed=3)
    with pytest.raises(ValueError, match="is of corpus 0000000000000000, these batches are of corpus"):
        stream.load_state_dict({"position": 5, "corpus": "0" * 16})
    assert stream.position == 0


@given(lengths=st.lists(st.integers(2, 40), min_size=2, max_size=20), batch_size=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_evaluation_covers_every_row_once(lengths, batch_size):
    corpus = numbered_corpus(lengths)
    batches = list(evaluation_batches(corpus, batch_size=batch_size, seq_len=3))
    assert all(len(batch.tokens) == batch_size for batch in batches[:-1])
    targets = sorted(torch.cat([batch.tokens for batch in batches])[:, 1:].flatten().tolist())
    assert targets == list(range(1, 1 + len(targets))) and len(corpus.tokens) - 1 - len(targets) < 3


def test_evaluation_is_the_same_every_time_and_a_sample_comes_from_everywhere():
    corpus = numbered_corpus([100] * 40)
    whole, again = (list(evaluation_batches(corpus, batch_size=8, seq_len=16)) for _ in range(2))
    assert all(map(same, whole, again))
    some = list(evaluation_batches(corpus, batch_size=8, seq_len=16, max_batches=2))
    assert len(some) == 2 and all(map(same, some, whole))
    assert torch.cat([batch.documents for batch in some]).unique().numel() > 10


def test_too_short_a_corpus_and_bad_sizes():
    corpus = numbered_corpus([10])
    assert len(list(evaluation_batches(corpus, batch_size=2, seq_len=9))) == 1
    remedy = r"give more text \(--data\), or lower seq_len \(--seq-len\) to at most 9$"
    for split, call in (
        ("training", lambda **sizes: BatchStream(corpus, seed=0, **sizes)),
        ("validation", lambda **sizes: evaluation_batches(corpus, **sizes)),
    ):
        message = rf"^{split} corpus of 10 tokens is too short for a row of 10 \+ 1 tokens: {remedy}"
        with pytest.raises(ValueError, match=message):
            call(batch_size=2, seq_len=10)
