"""KV cache, and the attention context: positions, rotation and mask of a forward pass.

Notable choice: the token at position p of a sequence is cached in slot p. The causal mask is then a comparison of
positions, sequences of different lengths can share a batch, and a rollback only sets the length. Only the attention of
V4 keeps less (compressed_attention.py): of single tokens the last ones, in a ring, where a rollback finds them gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

IndexStage = Literal["dense_warmup", "sparse"]


class IndexerTraining:
    """Training of the indexers in a forward pass (`sparse_attention`): the stage, and the loss of each layer that ran.

    Attention is dense in the stage dense_warmup. Layers without an indexer add nothing. It is no dataclass, because
    FSDP copies dataclasses that hold tensors with gradients, and a copy would keep the losses that are added to it.
    """

    def __init__(self, stage: IndexStage):
        self.stage = stage
        self.losses: list[Float[Tensor, ""]] = []


@dataclass
class AttentionContext:
    """Positions of a forward pass's tokens, their rotations, and the attention mask.

    `mask` is added to the scores: 0 for visible slots, -inf for the others. Without a cache and with an empty one it is
    None: the sequences start at position 0, and attention is causal.
    """

    sequence: Int[Tensor, "batch 1"]  # 0, 1, ..., batch - 1: indexes the slots of the cache together with `positions`
    positions: Int[Tensor, "batch seq"]
    rotation: Complex[Tensor, "batch seq 1 pairs"]
    mask: Float[Tensor, "batch 1 seq slots"] | None = None
    indexer: IndexerTraining | None = None  # None outside of training, and in models without indexers


Cache = Float[Tensor, "batch slots width"]


def write_cache(
    cache: Cache, context: AttentionContext, entry: Float[Tensor, "batch seq width"]
) -> Float[Tensor, "batch seen width"]:
    """Write each token's entry into the slot of its position, in place; return the slots up to the longest sequence."""
    cache[context.sequence, context.positions] = entry.to(cache.dtype)
    return cache[:, : entry.shape[1] if context.mask is None else context.mask.shape[-1]]


def write_ring(
    ring: Float[Tensor, "batch size width"], context: AttentionContext, values: Float[Tensor, "batch seq width"]
) -> None:
    """Write the values of the last `size` tokens in place, without gradient: position p goes to p modulo the size."""
    size = ring.shape[1]
    ring[context.sequence, context.positions[:, -size:] % size] = values[:, -size:].detach().to(ring.dtype)


def ring_positions(size: int, start: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch size"]:
    """Return the positions of the tokens that a ring holds before position `start`; negative where it is empty."""
    last = start - 1
    return last - (last - torch.arange(size, device=start.device)) % size


class KVCache:
    """Cache of a batch of sequences: one tensor per layer, and the number of valid positions per sequence."""

    def __init__(self, widths: Sequence[int], batch: int, slots: int, like: Tensor):
        """Allocate a layer for each of `widths`, its values per token, with the dtype and the device of `like`."""
        self.layers = [like.new_zeros(batch, slots, width) for width in widths]
        self.slots = slots  # capacity in tokens per sequence
        self.keeps_all = True  # the tokens of all slots, in every layer
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.longest = 0  # maximum of `lengths`, known without synchronising with the device

    def advance(self, tokens: int) -> None:
        """Add `tokens` to the length of every sequence, after they were written."""
        self.lengths = self.lengths + tokens
        self.longest += tokens

    def truncate(self, lengths: Int[Tensor, "batch"]) -> None:
        """Set the lengths; slots beyond them are overwritten later.

        Raises `ValueError` for a rollback where layers keep only the last tokens.
        """
        if not self.keeps_all and not torch.equal(lengths, self.lengths):
            rule = "this attention keeps no tokens to go back to; give all sequences the same number of tokens"
            raise ValueError(f"lengths={lengths.tolist()}: {rule}")
        self.lengths, self.longest = lengths, int(lengths.max())

    def keep(self, rows: Int[Tensor, "kept"]) -> Int[Tensor, "kept"]:
        """Keep only these sequences of the batch; return the rows where they are from now on.

        Only sequences beyond the new batch size are copied, to rows that are no longer needed.
        """
        kept, beyond = len(rows), rows >= len(rows)
        unused = torch.ones(kept, dtype=torch.bool, device=rows.device)
        unused[rows[~beyond]] = False
        moved = rows.masked_scatter(beyond, unused.nonzero())
        for layer in self.layers:
            layer[moved[beyond]] = layer[rows[beyond]]
        self.layers = [layer[:kept] for layer in self.layers]
        lengths = self.lengths.clone()
        lengths[moved] = self.lengths[rows]
        self.lengths, self.longest = lengths[:kept], int(lengths[:kept].max())
        return moved

    def num_bytes(self) -> int:
        """Memory of all layers, in bytes."""
        return sum(layer.nbytes for layer in self.layers)
