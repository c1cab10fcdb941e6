"""Tokenizers of imported checkpoints, beside the folders that hold them; the class is in `minids.data`."""

from minids.data.checkpoint_tokenizer import CheckpointTokenizer

__all__ = ["CheckpointTokenizer"]
