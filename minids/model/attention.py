"""Attention and what it caches: the dense baseline (MHA, GQA, MQA) and multi-head latent attention (MLA).

Notable choices:
- one interface, `forward(x, step, cache)`, and one kind of cache, a tensor [batch, slots, cache_width], where
  `cache_width` is what a token costs in this layer: 2 * kv_heads * head_dim numbers, or MLA's latent and rotated key;
- a slot is a position: what a sequence wrote at position p lies in slot p. A causal mask is then a comparison of
  positions, sequences of different length share a batch, and rolling back is forgetting a length;
- MLA has two forms of the same function: expanded (per-head keys and values, for many queries at once) and absorbed
  (attends over the latents themselves, for few), chosen by which needs fewer multiplications.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.layers import RMSNorm, rotate, softmax_scale


@dataclass
class Step:
    """Where a forward pass stands: each token's position, the rotation that belongs to it, and what it may see.

    `mask` is 0 for a slot that a token may see and -inf for the others. It is None where there is no cache: the
    sequence starts at position 0 and attention is plainly causal.
    """

    sequence: Int[Tensor, "batch 1"]  # 0, 1, 2, ...: with `positions` it addresses the slots of the cache
    positions: Int[Tensor, "batch seq"]
    rotation: Complex[Tensor, "batch seq 1 pairs"]
    mask: Float[Tensor, "batch 1 seq slots"] | None = None


Cache = Float[Tensor, "batch slots width"]


def remember(cache: Cache, step: Step, entry: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seen width"]:
    """Write each token's entry into the slot of its position (in place) and return the slots that can be visible."""
    cache[step.sequence, step.positions] = entry.to(cache.dtype)
    return cache[:, : step.mask.shape[-1]]


def attend(
    query: Float[Tensor, "batch heads seq dim"],
    key: Float[Tensor, "batch kv_heads slots dim"],
    value: Float[Tensor, "batch kv_heads slots value_dim"],
    mask: Float[Tensor, "batch 1 seq slots"] | None,
    scale: float,
) -> Float[Tensor, "batch seq heads value_dim"]:
    """Causal softmax attention; query heads share key heads in equal groups.

    Values narrower than the keys are padded, because the fused kernels want one width.
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
    """The dense baseline: `num_key_value_heads` = heads is MHA, 1 is MQA, between them GQA.

    Heads are `v_head_dim` wide and rotated over their whole width, as in Llama.
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
        self, x: Float[Tensor, "batch seq dim"], step: Step, cache: Cache | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        query = rotate(rearrange(self.q_proj(x), "b t (h d) -> b t h d", d=self.head_dim), step.rotation)
        key = rotate(rearrange(self.k_proj(x), "b t (h d) -> b t h d", d=self.head_dim), step.rotation)
        entry = torch.cat((key.flatten(-2), self.v_proj(x)), -1)
        if cache is not None:
            entry = remember(cache, step, entry)
        key, value = rearrange(entry, "b s (kv h d) -> kv b h s d", kv=2, d=self.head_dim)
        return self.o_proj(attend(query.transpose(1, 2), key, value, step.mask, self.scale).flatten(-2))


LATENT_NORM_EPS = 1e-6  # whatever `rms_norm_eps` says: so in the released code


class MultiHeadLatentAttention(nn.Module):
    """MLA: keys and values of all heads are re-made from one small latent per token (V3 eq. 1-11; FACTS.md section 2).

    A token's cache entry is its latent after the norm, followed by one rotated key that all heads share.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_rank = config.num_attention_heads, config.kv_lora_rank
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.cache_width = self.kv_rank + self.rope_dim
        self.scale = softmax_scale(config.qk_head_dim, config.rope_scaling)

        query_width = self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(config.hidden_size, config.q_lora_rank, bias=False),
                RMSNorm(config.q_lora_rank, LATENT_NORM_EPS),
                nn.Linear(config.q_lora_rank, query_width, bias=False),
            )
        self.kv_down_proj = nn.Linear(config.hidden_size, self.cache_width, bias=False)
        self.kv_norm = RMSNorm(self.kv_rank, LATENT_NORM_EPS)
        self.kv_up_proj = nn.Linear(self.kv_rank, self.heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], step: Step, cache: Cache | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        query, entry = self.query_and_entry(x, step)
        if cache is None:
            return self.o_proj(self.expanded(query, entry, step.mask))
        entries = remember(cache, step, entry)
        form = self.absorbed if self.absorbing_is_cheaper(x.shape[1]) else self.expanded
        return self.o_proj(form(query, entries, step.mask))

    def query_and_entry(
        self, x: Float[Tensor, "batch seq dim"], step: Step
    ) -> tuple[Float[Tensor, "batch seq heads query_dim"], Float[Tensor, "batch seq entry"]]:
        """Every head's query (V3 eq. 6-9), and what is cached: the normalised latent and the shared key (eq. 1, 3)."""
        query = self.q_proj(x).unflatten(-1, (self.heads, -1))
        query_nope, query_rope = query.split((self.nope_dim, self.rope_dim), -1)
        latent, key_rope = self.kv_down_proj(x).split((self.kv_rank, self.rope_dim), -1)
        rotated = rotate(torch.cat((query_rope, key_rope[:, :, None]), 2), step.rotation)
        query_rope, key_rope = rotated.split((self.heads, 1), 2)
        return torch.cat((query_nope, query_rope), -1), torch.cat((self.kv_norm(latent), key_rope[:, :, 0]), -1)

    def expanded(
        self,
        query: Float[Tensor, "batch seq heads query_dim"],
        entries: Float[Tensor, "batch slots entry"],
        mask: Float[Tensor, "batch 1 seq slots"] | None,
    ) -> Float[Tensor, "batch seq out"]:
        """Re-make per-head keys and values from the latents, then ordinary attention (V3 eq. 2, 5, 10)."""
        latent, key_rope = entries.split((self.kv_rank, self.rope_dim), -1)
        key_value = rearrange(self.kv_up_proj(latent), "b s (h d) -> b h s d", h=self.heads)
        key_nope, value = key_value.split((self.nope_dim, self.value_dim), -1)
        key = torch.cat((key_nope, key_rope[:, None].expand(-1, self.heads, -1, -1)), -1)
        return attend(query.transpose(1, 2), key, value, mask, self.scale).flatten(-2)

    def absorbed(
        self,
        query: Float[Tensor, "batch seq heads query_dim"],
        entries: Float[Tensor, "batch slots entry"],
        mask: Float[Tensor, "batch 1 seq slots"],
    ) -> Float[Tensor, "batch seq out"]:
        """The same, with W^UK moved onto the query and W^UV behind the sum: one key and one value serve all heads.

        score = (W_UK^T q_nope) . latent + q_rope . key_rope;  out = W_UV (sum of p * latent)  (V2 section 2.1.2).
        """
        up = self.kv_up_proj.weight.unflatten(0, (self.heads, -1))
        key_up, value_up = up.split((self.nope_dim, self.value_dim), 1)
        query_nope, query_rope = query.split((self.nope_dim, self.rope_dim), -1)
        query_latent = torch.einsum("bthn,hnr->bthr", query_nope, key_up)
        absorbed_query = torch.cat((query_latent, query_rope), -1).transpose(1, 2)
        shared = entries[:, None].expand(-1, self.heads, -1, -1)  # key and value at once; the rotated part is cut off
        latent = attend(absorbed_query, shared, shared, mask, self.scale)[..., : self.kv_rank]
        return torch.einsum("bthr,hvr->bthv", latent, value_up).flatten(-2)

    def absorbing_is_cheaper(self, queries: int) -> bool:
        """Whether `queries` queries take fewer multiplications per cached token and head absorbed than expanded.

        Absorbed, each takes (kv_rank + rope) + kv_rank; expanded, (nope + rope) + value, after kv_rank * (nope + value)
        once to re-make the token's key and value. In V3 the two meet at 170 queries.
        """
        expanded_width = self.nope_dim + self.value_dim
        return queries * (2 * self.kv_rank - expanded_width) < self.kv_rank * expanded_width
