"""What is minimised: the next token, the tokens after it, and an even load; and what is reported: bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minids.data.batches import Batch
from minids.model.layers import at_least_float32
from minids.model.moe import balance_loss
from minids.model.transformer import MiniDS, Output

IGNORED = -100  # the label that cross_entropy passes over


def targets(batch: Batch, depth: int = 0) -> Int[Tensor, "batch targets"]:
    """The token `depth` + 1 places after each position, IGNORED where that lies in another document."""
    ahead = depth + 1
    same_document = batch.documents[:, ahead:] == batch.documents[:, :-ahead]
    return batch.tokens[:, ahead:].masked_fill(~same_document, IGNORED)


@dataclass(frozen=True)
class Share:
    """What a micro-batch is divided by: the next-token targets and the sequences of the whole global batch."""

    targets: int
    sequences: int

    @classmethod
    def of(cls, batch: Batch) -> "Share":
        return cls(int((targets(batch) != IGNORED).sum()), len(batch.tokens))


@dataclass(frozen=True)
class Losses:
    """A micro-batch's part of the losses of its global batch; over all its micro-batches they add up to the means."""

    main: Float[Tensor, ""]
    mtp: Float[Tensor, ""]
    balance: Float[Tensor, ""]

    def total(self, mtp_weight: float) -> Float[Tensor, ""]:
        """Loss to minimise: main + lambda * MTP + balance (V3 eq. 25; the balance factors are in the config)."""
        return self.main + mtp_weight * self.mtp + self.balance


def losses(model: MiniDS, out: Output, batch: Batch, share: Share) -> Losses:
    """The losses of `out = model(batch.tokens[:, :-1], mtp=True)`.

    Main: mean over the targets. MTP: mean over depths, each divided by the main model's number of targets although it
    has fewer (V3 eq. 24). Balance: sum over layers, mean over sequences.
    """
    main = _summed_nats(out.logits, targets(batch)) / share.targets
    depths = [_summed_nats(logits, targets(batch, k)) for k, logits in enumerate(out.mtp_logits, start=1)]
    mtp = sum(depths, main.new_zeros(())) / (share.targets * max(len(depths), 1))
    balance = sum((balance_loss(routing, model.config) for routing in out.routings), main.new_zeros(()))
    return Losses(main, mtp, balance * len(batch.tokens) / share.sequences)


def _summed_nats(logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    flat = at_least_float32(logits.flatten(0, 1))
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.inference_mode()
def bits_per_byte(model: MiniDS, batches: Iterable[Batch], token_bytes: Int[Tensor, "vocab"]) -> float:
    """How many bits the model needs for a byte of text: comparable between tokenizers, and with gzip.

    End-of-document tokens cost bits and stand for no byte.
    """
    device = model.head.weight.device
    nats = byte_count = 0.0
    for batch in batches:
        labels = targets(batch)
        nats += _summed_nats(model(batch.tokens[:, :-1].to(device)).logits, labels.to(device)).item()
        byte_count += token_bytes[labels[labels != IGNORED]].sum().item()
    return nats / math.log(2) / byte_count
