"""Apply the output head to a chunk of the positions at a time, so that the logits of a batch never exist as a whole.

Logits are the largest tensors of a training step, one value per position and word of the vocabulary, and a loss needs
three of that size: logits, log-probabilities and their gradient. Here each chunk is reduced at once to what is wanted,
such as its summed loss, and its logits are freed. The backward pass computes them again, a chunk at a time (activation
checkpointing). The price is a second product with the head; what is kept are the hidden states only.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

LOGITS = 2**23
"""Logits of a chunk, 32 MiB in float32. The batches of a small vocabulary fit in one chunk."""
POSITIONS = 256
"""Minimum of positions in a chunk: in the backward pass each chunk adds once to the gradient of the whole head."""


def in_chunks(
    read: Callable[..., T],
    head: nn.Linear,
    states: Float[Tensor, "positions dim"],
    *others: Shaped[Tensor, "positions *_"],
) -> list[T]:
    """Return `read(logits, *others)` for each chunk of positions, in order; `logits` are those of the chunk's `states`.

    `read` gets the rows of `others` that belong to the chunk. It must be a function of its arguments, because it runs
    again in the backward pass, unless one chunk holds all positions.
    """
    size = max(POSITIONS, LOGITS // head.out_features)
    if len(states) <= size:
        return [read(head(states), *others)]
    device = states.device.type

    def of_chunk(states: Tensor, *others: Tensor) -> T:
        # Under autocast each chunk casts the head anew: a shared copy in bf16 would add up its gradients in bf16.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            return read(head(states), *others)

    again = partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
    run = again if torch.is_grad_enabled() else of_chunk
    return [run(*parts) for parts in zip(*(column.split(size) for column in (states, *others)), strict=True)]
