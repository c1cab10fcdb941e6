"""One transformer layer with pre-norm residual connections."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import V4_KINDS, ModelConfig
from minids.model.attention import GroupedQueryAttention
from minids.model.compressed_attention import CompressedAttention
from minids.model.kv_cache import AttentionContext, Cache
from minids.model.layers import RMSNorm, SwiGLU
from minids.model.mla import MultiHeadLatentAttention
from minids.model.moe import MoE, Routing
from minids.model.sparse_attention import SparseLatentAttention


class Block(nn.Module):
    """One transformer layer: attention, then a dense feed-forward or a mixture of experts.

    Each reads the normalised residual stream, and its output is added to the residual stream. Returns the residual
    stream, and the routing of the experts or None. `experts` are given to the mixture of experts, see `MoE`.
    """

    def __init__(self, config: ModelConfig, dense: bool):
        super().__init__()
        attention: type[MultiHeadLatentAttention | GroupedQueryAttention | CompressedAttention]
        attention = MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention
        if config.attention in V4_KINDS:
            attention = CompressedAttention
        elif config.index_topk is not None:
            attention = SparseLatentAttention
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        context: AttentionContext,
        cache: Cache | None = None,
        experts: Int[Tensor, "batch seq k"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq dim"], Routing | None]:
        x = x + self.attention(self.attention_norm(x), context, cache)  # [batch, seq, dim]
        h = self.ffn_norm(x)
        out, routing = self.ffn(h, experts) if isinstance(self.ffn, MoE) else (self.ffn(h), None)
        return x + out, routing
