"""Count the rows sent within and between nodes in expert parallelism (V3 section 3.2.2), for chapter 08."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Traffic:
    """Rows sent from rank to rank in one dispatch (the combine returns as many), and the number of ranks per node."""

    rows: Int[Tensor, "ranks ranks"]
    gpus_per_node: int

    @classmethod
    def naive(cls, experts: Int[Tensor, "tokens k"], source: Int[Tensor, "tokens"], owner: Int[Tensor, "experts"],
              ranks: int, gpus_per_node: int) -> "Traffic":  # fmt: skip
        """Count one row per token and expert, from the rank `source` of the token to the expert's `owner`."""
        return cls(_count(source[:, None].expand_as(experts), owner[experts], ranks), gpus_per_node)

    @classmethod
    def forwarded(cls, experts: Int[Tensor, "tokens k"], source: Int[Tensor, "tokens"], owner: Int[Tensor, "experts"],
                  ranks: int, gpus_per_node: int) -> "Traffic":  # fmt: skip
        """Count V3's dispatch: once per node to the GPU of equal local rank, from there to each GPU with an expert."""
        token, target = _distinct(torch.arange(len(experts), device=experts.device)[:, None], owner[experts], ranks)
        relay = target // gpus_per_node * gpus_per_node + source[token] % gpus_per_node
        crossing, entry = _distinct(token, relay, ranks)
        return cls(_count(source[crossing], entry, ranks) + _count(relay, target, ranks), gpus_per_node)

    @property
    def within_nodes(self) -> int:
        """Rows sent to another GPU of the same node (NVLink)."""
        return int(self.rows[self._same_node()].sum() - self.rows.trace())

    @property
    def between_nodes(self) -> int:
        """Rows sent to another node (InfiniBand)."""
        return int(self.rows[~self._same_node()].sum())

    def _same_node(self) -> Tensor:
        node = torch.arange(len(self.rows)) // self.gpus_per_node
        return node[:, None] == node


def _count(source: Tensor, target: Tensor, ranks: int) -> Int[Tensor, "ranks ranks"]:
    return torch.bincount((source * ranks + target).flatten(), minlength=ranks**2).view(ranks, ranks)


def _distinct(token: Tensor, rank: Tensor, ranks: int) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
    """Return the distinct pairs of a token and a rank."""
    pairs = (token * ranks + rank).unique()
    return pairs // ranks, pairs % ranks
