"""Tokenizers of imported checkpoints: tokenizer.json and tokenizer_config.json, as in transformers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Integer

from minids.data.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_of_character
from minids.files import atomic_write_text

_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"


class CheckpointTokenizer(Tokenizer):
    """Byte-level BPE with the checkpoint's ids and special tokens; its files define <bos> and <eos>.

    `token_id` returns -1, which is never sampled, for those of SPECIAL_TOKENS that the vocabulary lacks, and
    `encode(..., allow_special=True)` recognises the checkpoint's special tokens. The vocabulary size is the model's:
    padding ids decode to U+FFFD. Raises a one-line `ValueError` if a file is missing or damaged, or does not define
    these tokens.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        try:
            self._core = tokenizers.Tokenizer.from_file(str(Path(directory, "tokenizer.json")))
            files = [json.loads(Path(directory, name).read_text(encoding="utf-8")) for name in (_CONFIG, "config.json")]
            self._config, model = files
            named = {f"<{name}>": self._config.get(f"{name}_token") for name in ("bos", "eos", "pad")}
            own = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
            ids, added, byte_of = self._core.get_vocab(), self._core.get_added_tokens_decoder(), byte_of_character()
            self.vocab_size = max(model["vocab_size"], 1 + max(ids.values()))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{directory}: its tokenizer cannot be read: {error}") from None
        self._special_ids = {name: ids.get(own.get(name, name), -1) for name in SPECIAL_TOKENS}
        self.pad_id, self.bos_id, self.eos_id = (self._special_ids[name] for name in ("<pad>", "<bos>", "<eos>"))
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{directory}: {_CONFIG} must name a bos_token and an eos_token of the vocabulary")
        self._shown = ["\ufffd".encode()] * self.vocab_size
        for token, i in ids.items():
            if i not in added and not byte_of.keys() >= set(token):
                raise ValueError(f"{directory}: its tokenizer must be byte-level, which token {token!r} is not")
            self._shown[i] = token.encode() if i in added else bytes(byte_of[character] for character in token)
        self._text = [b"" if i in added and added[i].special else shown for i, shown in enumerate(self._shown)]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        self._core.encode_special_tokens = not allow_special  # in the library: treat their names as plain text
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        return [np.array(self.encode(text), self.dtype) for text in texts]

    def save(self, directory: str | os.PathLike) -> None:
        """Write the tokenizer's files into an export, for transformers to encode, decode and stop identically."""
        super().save(directory)
        stops = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id}
        for name, content in ((_CONFIG, self._config), (_GENERATION, stops)):
            atomic_write_text(Path(directory, name), json.dumps(content, ensure_ascii=False, indent=2))

    def _to_json(self) -> str:
        return self._core.to_str()
