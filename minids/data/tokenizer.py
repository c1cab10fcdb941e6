"""Tokenizers: bytes, byte-level BPE with Hugging Face's `tokenizers`, or a fixed list of symbols.

Notable choices:
- the first two are lossless for every string; all have the same nine special tokens, with the last ids;
  those of imported checkpoints have others (checkpoint_tokenizer.py);
- text cannot contain special tokens: `encode` treats "<think>" as seven characters unless `allow_special=True`;
- the number of bytes per token is known (`token_bytes`), so losses are comparable between tokenizers as bits per byte.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from minids.data.checkpoint_tokenizer import CheckpointTokenizer
from minids.data.tokenizer_base import FILE, SPECIAL_TOKENS, Tokenizer, byte_of_character

_BREAK = re.compile(r"(?<=\S\n)(?=\S)")


class ByteTokenizer(Tokenizer):
    """Bytes as tokens: ids 0..255 are the bytes of UTF-8, 256..264 the special tokens, without training."""

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)])

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]

    def _to_json(self) -> str:
        return json.dumps({"type": "byte", "special_tokens": SPECIAL_TOKENS})


class BPETokenizer(Tokenizer):
    """Byte-level BPE: the initial alphabet is all 256 bytes, so there are no unknown characters.

    Text is split into words as in GPT-2, and every digit is a token of its own, so that arithmetic has place values.
    The file has Hugging Face's format; train a tokenizer with `BPETokenizer.train`.
    """

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        name_of = {i: name for name, i in core.get_vocab().items()}
        names = [name_of[i] for i in range(core.get_vocab_size())]
        words = names[: -len(SPECIAL_TOKENS)]
        if tuple(names[len(words) :]) != SPECIAL_TOKENS:
            raise ValueError(f"a tokenizer's last ids must be {' '.join(SPECIAL_TOKENS)}, not {names[len(words) :]}")
        byte_of = byte_of_character()
        if not set(byte_of) <= set(words) or not set("".join(words)) <= set(byte_of):
            raise ValueError("a BPE tokenizer must be byte-level: all 256 bytes and nothing else in its alphabet")
        super().__init__([bytes(byte_of[character] for character in word) for word in words])
        self._core = core
        self._core.encode_special_tokens = True  # in the library: treat their names as plain text

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges from `texts` until there are `vocab_size` tokens, with special tokens. Deterministic.

        A small text has few pairs to merge and gives fewer tokens: use `vocab_size` of the result.
        Raises ValueError below 265, the number of bytes and special tokens.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size={vocab_size}: must be at least {smallest} (256 bytes and special tokens)")
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            initial_alphabet=sorted(byte_of_character()),
            show_progress=False,
        )
        core.train_from_iterator((piece for text in texts for piece in _cut(text)), trainer)
        core.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(core)

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        for text in texts:
            text.encode()  # ValueError for half of a surrogate pair; the library's TypeError is not informative
        pieces = [list(_cut(text)) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        ids: list[np.ndarray] = []
        for first in range(0, len(flat), 64):  # the library needs about 100 bytes per byte of a batch
            encodings = self._core.encode_batch_fast(flat[first : first + 64])
            ids += [np.array(encoding.ids, self.dtype) for encoding in encodings]
        of_piece = iter(ids)
        return [np.concatenate([next(of_piece) for _ in of_text]) for of_text in pieces]

    def _to_json(self) -> str:
        return self._core.to_str()


class SymbolTokenizer(Tokenizer):
    """One token per symbol; the longest matching symbol is chosen. Other text cannot be encoded."""

    def __init__(self, symbols: Sequence[str]) -> None:
        if not symbols or "" in symbols:
            raise ValueError(f"symbols={list(symbols)}: must hold at least one symbol, and no empty one")
        super().__init__([symbol.encode() for symbol in symbols])
        longest_first = sorted(symbols, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) + "|(.)", re.DOTALL)
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        """Encode each text. Raises ValueError for text that is not made of the symbols."""
        return [np.array([self._id(match) for match in self._pattern.finditer(text)], self.dtype) for text in texts]

    def _id(self, match: re.Match) -> int:
        if match[1] is not None:
            near = match.string[max(match.start() - 20, 0) : match.end() + 20]
            raise ValueError(f"text ...{near!r}...: {match[1]!r} is not a symbol of this tokenizer")
        return self._ids[match[0]]

    def _to_json(self) -> str:
        return json.dumps({"type": "symbols", "symbols": list(self._ids)})


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer of any kind from its file, or from the directory that it was saved in.

    A tokenizer.json that minids did not write is that of a checkpoint, and is read with the files beside it. Raises a
    one-line ValueError if the file is missing, damaged, or of an unknown kind.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
        content = json.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read tokenizer {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"tokenizer {path} is damaged: {error}") from None
    if content == {"type": "byte", "special_tokens": list(SPECIAL_TOKENS)}:
        return ByteTokenizer()
    match content:
        case {"type": "symbols", "symbols": [*symbols]} if all(isinstance(symbol, str) for symbol in symbols):
            return SymbolTokenizer(symbols)
    if not (isinstance(content, dict) and "model" in content):
        raise ValueError(f"tokenizer {path} is of an unknown kind: neither minids' bytes nor Hugging Face's tokenizer")
    added = content.get("added_tokens")
    names = [token.get("content") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if names != list(SPECIAL_TOKENS):
        return CheckpointTokenizer(path)
    try:
        return BPETokenizer(tokenizers.Tokenizer.from_str(text))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"tokenizer {path} is damaged: {error}") from None


def _cut(text: str, length: int = 2**15) -> Iterator[str]:
    """Split text into pieces of about `length` characters whose concatenated tokens are those of the whole text.

    Cuts are at single line breaks between visible characters, which are always separate words. Text without such line
    breaks is not cut.
    """
    start = 0
    while cut := _BREAK.search(text, start + length):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
