"""Multi-head latent attention (MLA): the keys and values of all heads are projections of one small latent per token.

Notable choice: two forms of the same function, expanded (per-head keys and values, for many queries) and absorbed
(attention over the latents, for few queries); the one that needs fewer multiplications is used.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.attention import attend
from minids.model.kv_cache import AttentionContext, Cache, write_cache
from minids.model.layers import RMSNorm
from minids.model.rope import rotate, softmax_scale

LATENT_NORM_EPS = 1e-6  # independent of `rms_norm_eps`, as in the released code


class MultiHeadLatentAttention(nn.Module):
    """MLA: keys and values of all heads are projections of one latent per token (V3 eq. 1-11; FACTS.md section 2).

    The cache entry of a token is its normalised latent, followed by one rotated key that all heads share.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_lora_rank, self.kv_rank = config.q_lora_rank, config.kv_lora_rank
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.cache_width = self.kv_rank + self.rope_dim
        self.scale = softmax_scale(config.qk_head_dim, config.rope_scaling)

        query_width = self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_down_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_up_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_down_proj = nn.Linear(config.hidden_size, self.cache_width, bias=False)
        self.kv_norm = RMSNorm(self.kv_rank, LATENT_NORM_EPS)
        self.kv_up_proj = nn.Linear(self.kv_rank, self.heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: AttentionContext, cache: Cache | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        query, entry = self.query_and_entry(x, context)  # [batch, seq, heads, query_dim], [batch, seq, entry]
        if cache is None:
            return self.o_proj(self.expanded(query, entry, context.mask))
        entries = write_cache(cache, context, entry)  # [batch, slots, entry]
        form = self.absorbed if self.absorbing_is_cheaper(x.shape[1]) else self.expanded
        return self.o_proj(form(query, entries, context.mask))

    def query(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq heads_times_query_dim"]:
        """Compute the queries of all heads before rotation, through a query latent (V3 eq. 6-7) or directly."""
        if self.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_up_proj(self.q_norm(self.q_down_proj(x)))

    def query_and_entry(
        self, x: Float[Tensor, "batch seq dim"], context: AttentionContext
    ) -> tuple[Float[Tensor, "batch seq heads query_dim"], Float[Tensor, "batch seq entry"]]:
        """Compute the queries (V3 eq. 6-9) and the cache entries: normalised latent and shared key (eq. 1, 3)."""
        query = self.query(x).unflatten(-1, (self.heads, -1))  # [batch, seq, heads, nope + rope]
        query_nope, query_rope = query.split((self.nope_dim, self.rope_dim), -1)
        latent, key_rope = self.kv_down_proj(x).split((self.kv_rank, self.rope_dim), -1)  # each [batch, seq, ...]
        rotated = rotate(torch.cat((query_rope, key_rope[:, :, None]), 2), context.rotation)  # [b, s, heads + 1, rope]
        query_rope, key_rope = rotated.split((self.heads, 1), 2)
        return torch.cat((query_nope, query_rope), -1), torch.cat((self.kv_norm(latent), key_rope[:, :, 0]), -1)

    def expanded(
        self,
        query: Float[Tensor, "batch seq heads query_dim"],
        entries: Float[Tensor, "batch slots entry"],
        mask: Float[Tensor, "batch 1 seq slots"] | None,
    ) -> Float[Tensor, "batch seq out"]:
        """Compute per-head keys and values from the latents, then standard attention (V3 eq. 2, 5, 10)."""
        latent, key_rope = entries.split((self.kv_rank, self.rope_dim), -1)
        key_value = rearrange(self.kv_up_proj(latent), "b s (h d) -> b h s d", h=self.heads)  # d = nope + value
        key_nope, value = key_value.split((self.nope_dim, self.value_dim), -1)
        # key [batch, heads, slots, query_dim]; the rotated part is the same in all heads
        key = torch.cat((key_nope, key_rope[:, None].expand(-1, self.heads, -1, -1)), -1)
        return attend(query.transpose(1, 2), key, value, mask, self.scale).flatten(-2)

    def absorbed(
        self,
        query: Float[Tensor, "batch seq heads query_dim"],
        entries: Float[Tensor, "batch slots entry"],
        mask: Float[Tensor, "batch 1 seq slots"] | None,
    ) -> Float[Tensor, "batch seq out"]:
        """Compute the same with W^UK applied to the query and W^UV to the output: all heads share one key and value.

        score = (W_UK^T q_nope) . latent + q_rope . key_rope;  out = W_UV (sum of p * latent)  (V2 section 2.1.2).
        """
        up = self.kv_up_proj.weight.unflatten(0, (self.heads, -1))  # [heads, nope + value, kv_rank]
        key_up, value_up = up.split((self.nope_dim, self.value_dim), 1)
        query_nope, query_rope = query.split((self.nope_dim, self.rope_dim), -1)
        query_latent = torch.einsum("bthn,hnr->bthr", query_nope, key_up)
        absorbed_query = torch.cat((query_latent, query_rope), -1).transpose(1, 2)  # [batch, heads, seq, entry]
        # Entries are both keys and values; of the output the part from the rotated keys is dropped.
        shared = entries[:, None].expand(-1, self.heads, -1, -1)  # [batch, heads, slots, entry]
        latent = attend(absorbed_query, shared, shared, mask, self.scale)[..., : self.kv_rank]
        return torch.einsum("bthr,hvr->bthv", latent, value_up).flatten(-2)

    def absorbing_is_cheaper(self, queries: int) -> bool:
        """Whether the absorbed form needs fewer multiplications than the expanded one, per cached token and head.

        Per query, absorbed: (kv_rank + rope) + kv_rank; expanded: (nope + rope) + value, and once per cached token
        kv_rank * (nope + value) for its key and value. In V3 absorbed is cheaper up to 170 queries.
        """
        expanded_width = self.nope_dim + self.value_dim
        return queries * (2 * self.kv_rank - expanded_width) < self.kv_rank * expanded_width
