"""Multi-token prediction (MTP): predict one token further from a hidden state and the embedding of the next token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.block import Block
from minids.model.kv_cache import AttentionContext, Cache
from minids.model.layers import RMSNorm
from minids.model.moe import Routing


class MTPModule(nn.Module):
    """One depth of multi-token prediction: combines the hidden state with the embedding of a later token.

    V3 eq. 21-22 with the paper's order, [hidden; embedding]; released weights have the reverse order, which
    `interop.hf` converts. The hidden state is the residual stream before the final norm, in training and in drafting
    (the paper does not specify this; PITFALLS 19).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, dense=config.num_moe_layers == 0)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq dim"],
        embedding: Float[Tensor, "batch seq dim"],
        context: AttentionContext,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "batch seq dim"], Routing | None]:
        joined = torch.cat((self.hidden_norm(hidden), self.embedding_norm(embedding)), -1)  # [batch, seq, 2 * dim]
        return self.block(self.proj(joined), context, cache)
