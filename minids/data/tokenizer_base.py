"""The base class of tokenizers, their nine special tokens, and the alphabet of byte-level vocabularies."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Integer
from tokenizers import pre_tokenizers
from torch import Tensor

from minids.files import atomic_write_text

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<think>", "</think>", "<answer>", "</answer>")
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
FILE = "tokenizer.json"


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
        atomic_write_text(directory / FILE, self._to_json())

    @abstractmethod
    def _to_json(self) -> str: ...


def byte_of_character() -> dict[str, int]:
    """Return GPT-2's byte alphabet: printable bytes are themselves, the others are the characters from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = (byte for byte in range(256) if byte not in printable.values())
    return printable | {character: byte for character, byte in zip(alphabet[len(printable) :], others, strict=True)}
