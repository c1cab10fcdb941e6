"""Tokenizers: bytes, byte-level BPE with Hugging Face's `tokenizers`, or a fixed list of symbols.

Notable choices:
- the first two are lossless for every string; all have the same nine special tokens, with the last ids;
- text cannot contain special tokens: `encode` treats "<think>" as seven characters unless `allow_special=True`;
- the number of bytes per token is known (`token_bytes`), so losses are comparable between tokenizers as bits per byte.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from jaxtyping import Int, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minids.files import atomic_write_text

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<think>", "</think>", "<answer>", "</answer>")
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_BREAK = re.compile(r"(?<=\S\n)(?=\S)")
_FILE = "tokenizer.json"


class Tokenizer(ABC):
    """Base class of the tokenizers. A subclass implements `encode_batch` and `_to_json`.

    `token_texts[i]` is the UTF-8 bytes of token i. The special tokens follow, in the order of SPECIAL_TOKENS, and
    decode to no text.
    """

    def __init__(self, token_texts: Sequence[bytes]) -> None:
        self._text = [*token_texts, *(b"" for _ in SPECIAL_TOKENS)]
        self._shown = [*token_texts, *(name.encode() for name in SPECIAL_TOKENS)]
        self._special_ids = {name: len(token_texts) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(self._text)
        self.pad_id, self.bos_id, self.eos_id = (self._special_ids[name] for name in ("<pad>", "<bos>", "<eos>"))

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """Dtype of `encode_batch`'s arrays: uint16 if every id fits, else int32."""
        return np.uint16 if self.vocab_size <= 2**16 else np.int32

    def token_id(self, name: str) -> int:
        """Return the id of a special token. Raises ValueError for any other name."""
        if name not in self._special_ids:
            raise ValueError(f"unknown special token {name!r}: expected one of {', '.join(SPECIAL_TOKENS)}")
        return self._special_ids[name]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encode `text` without adding <bos> or <eos>; with `allow_special`, names of special tokens become tokens.

        Raises ValueError if `text` contains half of a surrogate pair, which has no UTF-8 form.
        """
        if not allow_special:
            return self.encode_batch([text])[0].tolist()
        ids: list[int] = []
        for i, part in enumerate(_SPECIAL.split(text)):  # odd parts are the special tokens that were matched
            ids += [self._special_ids[part]] if i % 2 else self.encode(part)
        return ids

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        """Encode each text to a 1-D array of `dtype`, fast enough for a corpus. Special tokens are plain text."""

    def decode(
        self, ids: Sequence[int] | Integer[np.ndarray, "length"] | Int[Tensor, "length"], *, skip_special: bool = True
    ) -> str:
        """Decode `ids`. Invalid UTF-8 becomes U+FFFD; special tokens are skipped, or decoded to their names.

        Raises ValueError for ids outside the vocabulary.
        """
        table = self._text if skip_special else self._shown
        ids = ids if isinstance(ids, Sequence) else ids.tolist()
        if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
            raise ValueError(f"ids range from {min(ids)} to {max(ids)}: must be in [0, {self.vocab_size})")
        return b"".join(table[i] for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> Int[Tensor, "vocab"]:
        """Return the number of UTF-8 bytes per token, 0 for special tokens: bits per byte = sum(bits) / sum(bytes)."""
        return torch.tensor([len(text) for text in self._text])

    def save(self, directory: str | os.PathLike) -> None:
        """Write `tokenizer.json` into `directory` atomically; create the folder if needed."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write_text(directory / _FILE, self._to_json())

    @abstractmethod
    def _to_json(self) -> str: ...


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
        names = [core.id_to_token(i) for i in range(core.get_vocab_size())]
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
        super().__init__([symbol.encode() for symbol in symbols])
        longest_first = sorted(symbols, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) + "|(.)", re.DOTALL)
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        """Encode each text. Raises ValueError for text that is not made of the symbols."""
        return [np.array([self._id(match) for match in self._pattern.finditer(text)], self.dtype) for text in texts]

    def _id(self, match: re.Match) -> int:
        if match[1] is not None:
            raise ValueError(f"text {match.string!r}: {match[1]!r} is not a symbol of this tokenizer")
        return self._ids[match[0]]

    def _to_json(self) -> str:
        return json.dumps({"type": "symbols", "symbols": list(self._ids)})


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer of any kind from its file, or from the directory that it was saved in.

    Raises a one-line ValueError if the file is missing, damaged, or not a tokenizer of this package.
    """
    path = Path(path)
    path = path / _FILE if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
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


def byte_of_character() -> dict[str, int]:
    """Return GPT-2's byte alphabet: printable bytes are themselves, the others are the characters from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = (byte for byte in range(256) if byte not in printable.values())
    return printable | {character: byte for character, byte in zip(alphabet[len(printable) :], others, strict=True)}
