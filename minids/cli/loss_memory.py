"""Peak memory of the output head and its loss, from whole logits and in chunks, as `minids bench` compares them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minids.training.live_bytes import LiveBytes
from minids.training.loss import summed_cross_entropy


def peaks(words: int, positions: int, width: int) -> dict[str, int]:
    """Return the peak bytes of a forward and backward pass of both ways: tensors counted, nothing timed."""
    head, states = nn.Linear(width, words, bias=False), torch.randn(1, positions, width, requires_grad=True)
    labels = torch.randint(words, (1, positions))

    def whole(head: nn.Linear, states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(states).flatten(0, 1).float(), labels.flatten(), reduction="sum")

    found = {}
    for name, loss in {"whole logits": whole, "chunks": summed_cross_entropy}.items():
        with LiveBytes() as live:
            loss(head, states, labels).backward()
        found[name] = live.peak
        head.weight.grad = states.grad = None
    return found
