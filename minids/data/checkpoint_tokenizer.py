"""Tokenizers of checkpoints: tokenizer.json and the files beside it, as in transformers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Integer

from minids.data.tokenizer_base import FILE, SPECIAL_TOKENS, Tokenizer, byte_of_character
from minids.files import atomic_write_text

_CONFIG, _GENERATION, _TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
_PADDED = "padded_vocab_size"  # in a saved tokenizer_config.json: the model's, for folders without config.json

MOST_TOKENS = 10**7  # a damaged file could demand more than fits in memory


class CheckpointTokenizer(Tokenizer):
    """Byte-level BPE with the ids of a checkpoint, from the folder of its files.

    <bos> and <eos> are named by tokenizer_config.json, or where it is absent by the ids in config.json. The vocabulary
    size is the model's: padding ids decode to U+FFFD. `token_id` returns -1, which is never sampled, for those of
    SPECIAL_TOKENS that the vocabulary lacks.

    Added tokens are made by `encode(..., allow_special=True)` only, so text cannot forge them. In DeepSeek's files the
    chat roles and <think> are added tokens that are not marked "special": transformers makes them from plain text, and
    as there, `decode` shows them. Only letters, spaces and single characters that were added are plain text (DeepSeek
    added bytes that its vocabulary lacked). Raises a one-line `ValueError` if a file is missing or damaged, or does not
    define <bos> and <eos>.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read the files of a folder; `path` is the folder, or its tokenizer.json, which may have another name."""
        path = Path(path)
        directory, file = (path, path / FILE) if path.is_dir() else (path.parent, path)
        try:
            self._json = file.read_text(encoding="utf-8-sig")
            content = json.loads(self._json)
            listed = content.get("added_tokens") or []
            self._config, model = _read_json(directory / _CONFIG), _read_json(directory / "config.json")
            contents = {token["id"]: token["content"] for token in listed}
            names = {f"<{name}>": _name(name, self._config, model, contents) for name in ("bos", "eos", "pad")}
            shown = {token["id"] for token in listed if not token["special"]}
            for token in listed:
                named = token["content"] in names.values()
                token["special"] = token["special"] or named or not _is_text(token["content"])
            self._core = tokenizers.Tokenizer.from_str(json.dumps(content))
            ids, added = self._core.get_vocab(), self._core.get_added_tokens_decoder()
            sizes = (model["vocab_size"] if model is not None else 0, (self._config or {}).get(_PADDED, 0))
            self.vocab_size = max(*sizes, 1 + max(ids.values()))
            if self.vocab_size > MOST_TOKENS:
                raise ValueError(f"vocab_size={self.vocab_size}: must be at most {MOST_TOKENS:,}")
            template = directory / _TEMPLATE
            self._template = template.read_text(encoding="utf-8") if template.exists() else None
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path}: its tokenizer cannot be read: {' '.join(str(error).split())}") from None
        self._special_ids = {name: ids.get(names.get(name, name) or "", -1) for name in SPECIAL_TOKENS}
        self.pad_id, self.bos_id, self.eos_id = (self._special_ids[name] for name in ("<pad>", "<bos>", "<eos>"))
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{directory}: {_CONFIG} must name a bos_token and an eos_token of the vocabulary")
        byte_of = byte_of_character()
        self._shown = ["\ufffd".encode()] * self.vocab_size
        for token, i in ids.items():
            if i not in added and not byte_of.keys() >= set(token):
                raise ValueError(f"{directory}: its tokenizer must be byte-level, which token {token!r} is not")
            self._shown[i] = token.encode() if i in added else bytes(byte_of[character] for character in token)
        self._text = [b"" if i in added and i not in shown else text for i, text in enumerate(self._shown)]
        self._control = {i for i, token in added.items() if token.special} | {self.bos_id, self.eos_id}
        self._byte_ids = {byte: ids[character] for character, byte in byte_of.items() if character in ids}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return self.encode_batch([text])[0].tolist()
        text.encode()  # ValueError for half of a surrogate pair; the library's TypeError is not informative
        self._core.encode_special_tokens = False
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        for text in texts:
            text.encode()
        self._core.encode_special_tokens = True  # in the library: treat their names as plain text
        batches = (texts[first : first + 64] for first in range(0, len(texts), 64))
        encodings = (
            e for batch in batches for e in self._core.encode_batch_fast(list(batch), add_special_tokens=False)
        )
        return [np.array(self._without_control(encoding.ids), self.dtype) for encoding in encodings]

    def _without_control(self, ids: list[int]) -> list[int]:
        """Spell control tokens as bytes: a vocabulary may hold their names as words, too."""
        if self._control.isdisjoint(ids):
            return ids
        spelt = ([self._byte_ids[byte] for byte in self._shown[i]] if i in self._control else [i] for i in ids)
        return [i for word in spelt for i in word]

    def save(self, directory: str | os.PathLike) -> None:
        """Write the tokenizer's files into an export, for transformers to encode, decode and stop identically."""
        super().save(directory)
        named = {"bos_token": self._shown[self.bos_id].decode(), "eos_token": self._shown[self.eos_id].decode()}
        config = named | {"tokenizer_class": "PreTrainedTokenizerFast"} if self._config is None else self._config
        stops = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id}
        for name, content in ((_CONFIG, config | {_PADDED: self.vocab_size}), (_GENERATION, stops)):
            atomic_write_text(Path(directory, name), json.dumps(content, ensure_ascii=False, indent=2))
        if self._template is not None:
            atomic_write_text(Path(directory, _TEMPLATE), self._template)

    def _to_json(self) -> str:
        return self._json


def _is_text(name: str) -> bool:
    """Whether an added token is ordinary text, not markup such as <think> or [INST]."""
    return len(name) == 1 or name.isalnum() or name.isspace()


def _read_json(path: Path) -> dict[str, Any] | None:
    """Read an object; None if the file does not exist."""
    return dict(json.loads(path.read_text(encoding="utf-8-sig"))) if path.exists() else None


def _name(
    name: str, config: dict[str, Any] | None, model: dict[str, Any] | None, contents: dict[int, str]
) -> str | None:
    """Return the content of the bos, eos or pad token: a string or an object; without a file that names it, its id."""
    if config is not None:
        token = config.get(f"{name}_token")
        return token["content"] if isinstance(token, dict) else token
    i = (model or {}).get(f"{name}_token_id")
    i = i[0] if isinstance(i, list) and i else i
    return contents.get(i) if isinstance(i, int) else None
