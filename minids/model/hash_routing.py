"""Hash routing: in the first MoE layers of V4, the experts of a token are looked up by its id (FACTS.md section 10).

The router still computes the gate weights. Every text sends a token to the same experts, so nothing has to be balanced.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.config import ModelConfig
from minids.model.layers import KeptInFloat32


class HashRouting(KeptInFloat32):
    """Tables of the experts of every token, one per layer. V4's tables, and how they were made, are not published.

    Here each token has random experts, the same in every model of the same sizes.
    """

    tables: Float[Tensor, "layers vocab k"]
    """A float32 tensor, which holds these integers exactly: torch writes no integers to a checkpoint of shards."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.num_hash_layers is not None
        experts, k = config.n_routed_experts, config.num_experts_per_tok
        tables = [
            np.random.default_rng(layer).random((config.vocab_size, experts), np.float32).argsort(1)[:, :k]
            for layer in range(config.num_hash_layers)
        ]
        self.register_buffer("tables", torch.tensor(np.stack(tables), dtype=torch.float32))

    def forward(self, layer: int, tokens: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq k"] | None:
        """Return the experts of each token in MoE layer number `layer`, or None if its router chooses them."""
        return self.tables[layer, tokens].long() if layer < len(self.tables) else None
