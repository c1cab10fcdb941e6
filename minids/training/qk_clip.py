"""QK-Clip: bound the attention logits of MLA by scaling the query and key matrices of single heads.

Kimi K2 (arXiv 2507.20534; FACTS.md section 10) applies it after every step of Muon, whose updates let the logits of
some heads grow without bound. V4 needs none, because it normalises queries and keys.

Notable choices: logits are observed during the training passes, which are not changed by it; that costs the product of
queries and keys once more. Only the heads above the threshold are scaled, and the key that all heads share is not.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minids.model.kv_cache import AttentionContext
from minids.model.mla import MultiHeadLatentAttention


@torch.no_grad()
def max_logits(
    attention: MultiHeadLatentAttention, x: Float[Tensor, "batch seq dim"], context: AttentionContext
) -> Float[Tensor, "heads"]:
    """Return each head's largest causal attention logit of a batch without a cache, as the softmax gets them."""
    query, entries = attention.query_and_entry(x, context)  # [batch, seq, heads, nope + rope], [batch, seq, entry]
    latent, key_rope = entries.split((attention.kv_rank, attention.rope_dim), -1)
    key_nope = attention.kv_up_proj(latent).unflatten(-1, (attention.heads, -1))[..., : attention.nope_dim]
    query_nope, query_rope = query.split((attention.nope_dim, attention.rope_dim), -1)
    scores = torch.einsum("bthd,bshd->bhts", query_nope, key_nope)
    scores = (scores + torch.einsum("bthd,bsd->bhts", query_rope, key_rope)) * attention.scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(later, -torch.inf).amax((0, 2, 3)).float()


@torch.no_grad()
def clip_query_and_key(attention: MultiHeadLatentAttention, largest: Float[Tensor, "heads"], threshold: float) -> None:
    """Scale the logits of each head whose `largest` exceeds `threshold` down to it, in place, by its own matrices.

    With g = threshold / largest, the unrotated query and key get sqrt(g) each. The rotated query gets g, because all
    heads share the rotated key, which stays.
    """
    factor = (threshold / largest).clamp_max(1.0)  # [heads]; negative maxima give a negative quotient
    factor = torch.where(largest > threshold, factor, torch.ones_like(factor))
    queries = attention.q_proj if attention.q_lora_rank is None else attention.q_up_proj
    query = queries.weight.unflatten(0, (attention.heads, -1))  # [heads, nope + rope, in]
    key = attention.kv_up_proj.weight.unflatten(0, (attention.heads, -1))  # [heads, nope + value, kv_rank]
    factor = factor.to(query.dtype)[:, None, None]
    query[:, : attention.nope_dim] *= factor.sqrt()
    query[:, attention.nope_dim :] *= factor
    key[:, : attention.nope_dim] *= factor.sqrt()


class QKClip:
    """QK-Clip of a model in training: it watches the attention logits, and `step` clips after an optimizer step."""

    def __init__(self, model: nn.Module, threshold: float):
        """Watch every MLA of `model`. Raises `ValueError` if it has none."""
        self.threshold, self.largest = threshold, dict[MultiHeadLatentAttention, Tensor]()
        watched = [module for module in model.modules() if isinstance(module, MultiHeadLatentAttention)]
        if not watched:
            raise ValueError("qk_clip: needs attention='mla', whose heads have query and key matrices of their own")
        for attention in watched:
            attention.register_forward_pre_hook(self._watch)

    def _watch(self, attention: MultiHeadLatentAttention, inputs: tuple) -> None:
        if not (attention.training and torch.is_grad_enabled()):
            return  # an evaluation, or generation
        largest = max_logits(attention, *inputs[:2])
        self.largest[attention] = torch.maximum(self.largest.get(attention, largest), largest)

    def step(self) -> float:
        """Clip by the logits since the last call; return the largest of them."""
        most = max((float(largest.max()) for largest in self.largest.values()), default=-math.inf)
        for attention, largest in self.largest.items():
            clip_query_and_key(attention, largest, self.threshold)
        self.largest.clear()
        return most
