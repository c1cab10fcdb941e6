"""Both tokenizers: lossless, unforgeable, the same after a trip to disk."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.data import tokenizer as module
from minids.data.corpus import read_documents
from minids.data.tokenizer import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, load_tokenizer

TEXTS = [document.text for document in read_documents("pydocs", max_bytes=200_000)]
BYTES = ByteTokenizer()
BPE = BPETokenizer.train(TEXTS, 600)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])

# hypothesis draws few of these by itself: whitespace runs, digits, combined emoji, the names of special tokens
AWKWARD = [*SPECIAL_TOKENS, " ", "\n", "\t", "\r\n", "2024", "é", "👩‍💻", "\0", "a"]
ANY_TEXT = st.text() | st.lists(st.sampled_from(AWKWARD)).map("".join)


@BOTH
@given(text=ANY_TEXT, allow_special=st.booleans())
@settings(max_examples=150, deadline=None)
def test_round_trip_is_exact(tokenizer, text, allow_special):
    ids = tokenizer.encode(text, allow_special=allow_special)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@BOTH
@given(text=ANY_TEXT)
@settings(max_examples=150, deadline=None)
def test_token_bytes_sum_to_the_length_of_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@BOTH
def test_token_bytes_are_zero_for_special_tokens_alone(tokenizer):
    table = tokenizer.token_bytes()
    assert table.shape == (tokenizer.vocab_size,)
    assert (table[-len(SPECIAL_TOKENS) :] == 0).all() and (table[: -len(SPECIAL_TOKENS)] > 0).all()


@BOTH
@given(text=ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_text_cannot_forge_special_tokens(tokenizer, text):
    special = {tokenizer.token_id(name) for name in SPECIAL_TOKENS}
    assert special.isdisjoint(tokenizer.encode(text))
    assert special.isdisjoint(tokenizer.encode_batch([text])[0].tolist())


@BOTH
def test_special_tokens_on_request(tokenizer):
    ids = tokenizer.encode("<user>2+2?<assistant><think>é</think>4<eos>", allow_special=True)
    assert ids[0] == tokenizer.token_id("<user>") and ids[-1] == tokenizer.eos_id
    assert sum(i >= tokenizer.vocab_size - len(SPECIAL_TOKENS) for i in ids) == 5
    assert tokenizer.decode(ids) == "2+2?é4"
    assert tokenizer.decode(ids, skip_special=False) == "<user>2+2?<assistant><think>é</think>4<eos>"


@BOTH
def test_special_ids_are_the_last_ones_and_distinct(tokenizer):
    ids = [tokenizer.token_id(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(tokenizer.vocab_size - len(SPECIAL_TOKENS), tokenizer.vocab_size))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == tuple(ids[:3])


@BOTH
def test_unknown_special_token(tokenizer):
    with pytest.raises(ValueError, match="unknown special token '<tool>'"):
        tokenizer.token_id("<tool>")


@BOTH
def test_encode_batch_equals_encode(tokenizer):
    texts = ["", "x", *TEXTS[:20]]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.uint16 and ids.ndim == 1 for ids in batch)
    assert tokenizer.encode_batch([]) == []


@BOTH
def test_decode_takes_lists_arrays_and_tensors(tokenizer):
    ids = tokenizer.encode("some text")
    for form in (ids, tuple(ids), np.array(ids, np.uint16), torch.tensor(ids)):
        assert tokenizer.decode(form) == "some text"
    assert tokenizer.decode([]) == tokenizer.decode(torch.tensor([], dtype=torch.int64)) == ""


@BOTH
def test_decode_replaces_invalid_utf8(tokenizer):
    whole = tokenizer.encode("日")
    assert len(whole) == 3
    assert tokenizer.decode(whole[:2] + tokenizer.encode("x")) == "\ufffdx"


@BOTH
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer, bad):
    with pytest.raises(ValueError, match=rf"ids range .*must be in \[0, {tokenizer.vocab_size}\)"):
        tokenizer.decode([65, bad])


@BOTH
def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800")


def test_byte_ids_are_the_bytes():
    assert BYTES.vocab_size == 265
    assert BYTES.encode("hé<") == [*"hé".encode(), ord("<")]


def test_bpe_compresses_and_keeps_digits_apart():
    text = "".join(TEXTS)
    assert BPE.vocab_size == 600
    assert len(BPE.encode(text)) < 0.55 * len(text.encode())
    assert len(BPE.encode("2024")) == 4


def test_bpe_of_a_long_text_is_that_of_the_library_without_our_cuts(monkeypatch):
    text = "".join(TEXTS) + "  \n \n\tx\r\ny" * 9000
    pieces = list(module._cut(text))
    assert "".join(pieces) == text and len(pieces) > 5
    with_cuts = BPE.encode(text)
    monkeypatch.setattr(module, "_cut", lambda text: [text])
    assert with_cuts == BPE.encode(text)


@given(text=st.text("a \n\r\t.é", max_size=60))
@settings(max_examples=200, deadline=None)
def test_cuts_do_not_change_tokens(text):
    pieces = module._cut(text, length=1)
    assert [i for piece in pieces for i in BPE._core.encode(piece).ids] == BPE._core.encode(text).ids


def test_bpe_training_is_the_same_in_another_process():
    program = (
        "from minids.data.tokenizer import BPETokenizer; from minids.data.corpus import read_documents\n"
        "texts = [document.text for document in read_documents('pydocs', max_bytes=200_000)]\n"
        "print(BPETokenizer.train(texts, 600).encode('for x in range(10): print(x)'), end='')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout == str(BPE.encode("for x in range(10): print(x)"))


def test_bpe_vocab_size_bounds():
    with pytest.raises(ValueError, match="vocab_size=264: must be at least 265"):
        BPETokenizer.train(["text"], 264)
    assert BPETokenizer.train(["text"], 265).vocab_size == 265
    assert BPETokenizer.train(["ab ab"], 5000).vocab_size < 300  # nothing left to merge


def test_dtype_grows_with_the_vocabulary(monkeypatch):
    assert BYTES.dtype is np.uint16
    large = ByteTokenizer()
    large.vocab_size = 2**16 + 1
    assert large.dtype is np.int32


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    directory = tmp_path / "new" / "folder"
    tokenizer.save(directory)
    tokenizer.save(directory)  # over an older file
    assert [path.name for path in directory.iterdir()] == ["tokenizer.json"]
    for path in (directory, directory / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
        text = "<think>for i in range(1234):\n\tpass é</think>"
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)
        assert (loaded.token_bytes() == tokenizer.token_bytes()).all()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    BYTES.save(tmp_path)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        BPE.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_saved_bpe_opens_in_the_tokenizers_library(tmp_path):
    BPE.save(tmp_path)
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<user>sum of 12 and 30?<think>\n  42"
    assert core.encode(text).ids == BPE.encode(text, allow_special=True)
    assert core.decode(core.encode(text).ids, skip_special_tokens=False) == text


def _foreign(vocabulary: list[str], special: tuple[str, ...]) -> str:
    core = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(vocabulary)}, []))
    core.add_special_tokens(list(special))
    return core.to_str()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b'{"type": "byte"', "is damaged"),
        (b"[]", "of an unknown kind"),
        (b'{"type": "byte", "special_tokens": ["<pad>"]}', "of an unknown kind"),
        (b'{"type": "sentencepiece"}', "of an unknown kind"),
        (b'{"model": {}}', "cannot be read"),
        (_foreign(list("abc"), SPECIAL_TOKENS).encode(), "must be byte-level"),
        (_foreign(list("abc"), SPECIAL_TOKENS[:-1]).encode(), "must name a bos_token and an eos_token"),
    ],
)
def test_load_refuses_what_is_no_tokenizer(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_load_refuses_a_truncated_bpe(tmp_path):
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"].popitem()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot read tokenizer .*: No such file"):
        load_tokenizer(tmp_path)
