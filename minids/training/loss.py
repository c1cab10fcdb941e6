"""Training losses (next-token prediction, multi-token prediction, load balance, indexers), and bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.data.batches import Batch
from minids.model.layers import at_least_float32
from minids.model.moe import balance_loss
from minids.model.transformer import MiniDS, Output
from minids.training.chunked_loss import in_chunks

IGNORED = -100  # ignore_index of cross_entropy


def targets(batch: Batch, depth: int = 0) -> Int[Tensor, "batch targets"]:
    """Targets: the token `depth` + 1 positions later; IGNORED in another document or outside the loss mask."""
    ahead = depth + 1
    is_target = batch.documents[:, ahead:] == batch.documents[:, :-ahead]
    if batch.loss_mask is not None:
        is_target = is_target & batch.loss_mask[:, ahead:]
    return batch.tokens[:, ahead:].masked_fill(~is_target, IGNORED)


@dataclass(frozen=True)
class LossDenominators:
    """Denominators of the losses: number of next-token targets and of sequences in the global batch."""

    targets: int
    sequences: int

    @classmethod
    def of(cls, batch: Batch) -> "LossDenominators":
        """Count those of a global batch, at least 1: a batch without targets has loss 0, not 0 / 0."""
        return cls(max(int((targets(batch) != IGNORED).sum()), 1), len(batch.tokens))


@dataclass(frozen=True)
class Losses:
    """A micro-batch's terms of the losses; summed over the micro-batches of a global batch they are its mean losses."""

    main: Float[Tensor, ""]
    mtp: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    indexer: Float[Tensor, ""]

    def __add__(self, other: "Losses") -> "Losses":
        balance, indexer = self.balance + other.balance, self.indexer + other.indexer
        return Losses(self.main + other.main, self.mtp + other.mtp, balance, indexer)

    def detach(self) -> "Losses":
        """Return the same values without gradient."""
        return Losses(self.main.detach(), self.mtp.detach(), self.balance.detach(), self.indexer.detach())

    def total(self, mtp_weight: float) -> Float[Tensor, ""]:
        """Loss to minimise: main + lambda * MTP + balance (V3 eq. 25; the balance factors are in the config) + indexer.

        No parameter has a gradient from both the indexers' loss and another one.
        """
        return self.main + mtp_weight * self.mtp + self.balance + self.indexer


def losses(model: MiniDS, out: Output, batch: Batch, denominators: LossDenominators) -> Losses:
    """Compute the losses of `out = model.states(batch.tokens[:, :-1], mtp=True)`, in nats per target.

    Main: mean over the targets. MTP: mean over depths, each divided by the number of targets of the main loss although
    it has fewer (V3 eq. 24). Balance: sum over layers, mean over sequences. Indexers: sum over layers, mean over all
    queries.
    """
    sums = [summed_cross_entropy(model.head, x, targets(batch, k)) for k, x in enumerate(out.head_inputs)]
    main, depths = sums[0] / denominators.targets, sums[1:]
    mtp = sum(depths, main.new_zeros(())) / (denominators.targets * max(len(depths), 1))
    balance = sum((balance_loss(routing, model.config) for routing in out.routings), main.new_zeros(()))
    indexer = sum(out.indexer_losses, main.new_zeros(()))
    rows, sequences = len(batch.tokens), denominators.sequences
    return Losses(main, mtp, balance * rows / sequences, indexer * rows / sequences)


def summed_cross_entropy(
    head: nn.Linear, states: Float[Tensor, "batch seq dim"], labels: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Return the sum over the targets of -log p(target), in nats; `states` are the inputs of the output head."""

    def of_chunk(logits: Float[Tensor, "positions vocab"], labels: Int[Tensor, "positions"]) -> Float[Tensor, ""]:
        return F.cross_entropy(at_least_float32(logits), labels, ignore_index=IGNORED, reduction="sum")

    return torch.stack(in_chunks(of_chunk, head, states.flatten(0, 1), labels.flatten())).sum()


@torch.inference_mode()
def bits_per_byte(model: MiniDS, batches: Iterable[Batch], token_bytes: Int[Tensor, "vocab"]) -> float:
    """Compute the bits per byte of text, which are comparable between tokenizers and with gzip.

    End-of-document tokens count bits but no bytes.
    """
    device = model.head.weight.device
    nats = byte_count = 0.0
    for batch in batches:
        labels = targets(batch)
        states = model.states(batch.tokens[:, :-1].to(device)).head_inputs[0]
        nats += summed_cross_entropy(model.head, states, labels.to(device)).item()
        byte_count += token_bytes[labels[labels != IGNORED]].sum().item()
    return nats / math.log(2) / byte_count
