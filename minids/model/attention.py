"""Softmax attention, and the dense baseline: grouped-query attention, of which MHA and MQA are special cases.

Notable choices:
- every attention module has the same interface, `forward(x, context, cache)`, and the same kind of cache, a tensor
  [batch, slots, cache_width]; `cache_width` is the number of values cached per token and layer;
- keys and values of a token are cached side by side as one entry of 2 * kv_heads * head_dim values.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.kv_cache import AttentionContext, Cache, write_cache
from minids.model.rope import rotate, softmax_scale


def attend(
    query: Float[Tensor, "batch heads seq dim"],
    key: Float[Tensor, "batch kv_heads slots dim"],
    value: Float[Tensor, "batch kv_heads slots value_dim"],
    mask: Float[Tensor, "batch 1 seq slots"] | None,
    scale: float,
) -> Float[Tensor, "batch seq heads value_dim"]:
    """Compute causal softmax attention; query heads share key-value heads in equal groups.

    Without `mask`, query i attends to the keys 0..i. `scale` multiplies the scores before the softmax.
    Values narrower than the keys are padded with zeros, because the fused kernels need equal widths.
    """
    value_dim = value.shape[-1]
    if value_dim < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - value_dim))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out[..., :value_dim].transpose(1, 2)


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention: MHA if `num_key_value_heads` equals the number of heads, MQA if it is 1.

    Queries, keys and values are `v_head_dim` wide; RoPE rotates queries and keys over the whole width, as in Llama.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.kv_heads = config.v_head_dim, config.num_key_value_heads
        self.rope_dim = self.head_dim
        self.cache_width = 2 * self.kv_heads * self.head_dim
        self.scale = softmax_scale(self.head_dim, config.rope_scaling)
        query_width, kv_width = config.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: AttentionContext, cache: Cache | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        # query [batch, seq, heads, head_dim], key [batch, seq, kv_heads, head_dim]
        query = rotate(rearrange(self.q_proj(x), "b t (h d) -> b t h d", d=self.head_dim), context.rotation)
        key = rotate(rearrange(self.k_proj(x), "b t (h d) -> b t h d", d=self.head_dim), context.rotation)
        entry = torch.cat((key.flatten(-2), self.v_proj(x)), -1)  # [batch, seq, cache_width]
        if cache is not None:
            entry = write_cache(cache, context, entry)  # [batch, slots, cache_width]
        key, value = rearrange(entry, "b s (kv h d) -> kv b h s d", kv=2, d=self.head_dim)  # each [b, kv_heads, s, d]
        return self.o_proj(attend(query.transpose(1, 2), key, value, context.mask, self.scale).flatten(-2))
