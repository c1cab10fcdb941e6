"""A round of speculative decoding as one function: the MTP module drafts, and the fused step verifies in the same call.

A round of one sequence consists of some hundred small operations, most of which cost more to start than to compute.
Compiled as one function (`compiled.py`) it costs what its weights cost to read: those of the module and the head for
the draft, then those of the model for two tokens, which choose up to twice as many experts as one token.

Notable choices:
- sampling is an argmax of logits with Gumbel noise added, which is an input, so that the round is a function of its
  inputs; without noise it is greedy;
- the module's cache is one more layer of the static cache; the round returns the new entries and changes nothing.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.inference.fused import FusedBlock, FusedStep, hold, matvec
from minids.model.layers import at_least_float32 as wide
from minids.model.mtp import MTPModule
from minids.model.transformer import MiniDS

Round = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class FusedMTP(nn.Module):
    """One MTP module, as `mtp.MTPModule`."""

    proj: Float[Tensor, "dim two_dims"]

    def __init__(self, module: MTPModule):
        super().__init__()
        self.hidden_norm, self.embedding_norm, self.norm = module.hidden_norm, module.embedding_norm, module.norm
        hold(self, proj=module.proj.weight)
        self.block = FusedBlock(module.block)

    def forward(self, hidden: Tensor, embedding: Tensor, *context: object) -> tuple[Tensor, Tensor]:
        """Return the hidden states of the module and its new cache entries; `context` as in `FusedAttention`."""
        joined = torch.cat((self.hidden_norm(hidden), self.embedding_norm(embedding)), -1)
        return self.block(matvec(self.proj, joined), *context)


class FusedRound(nn.Module):
    """One round for a batch, with a single MTP module. A snapshot of the model's weights."""

    @torch.no_grad()
    def __init__(self, model: MiniDS):
        """Merge the matrices of `model`. Raises `ValueError` as `FusedStep`, and unless it has one MTP module."""
        super().__init__()
        if len(model.mtp) != 1:
            raise ValueError(
                f"num_nextn_predict_layers={len(model.mtp)}: the compiled round drafts with one module; "
                "decode without compiled"
            )
        self.step, self.module = FusedStep(model), FusedMTP(model.mtp[0])

    def forward(
        self,
        tokens: Int[Tensor, "batch 2"],
        hidden: Float[Tensor, "batch 2 dim"],
        positions: Int[Tensor, "batch"],
        noise: Float[Tensor, "batch vocab"],
        temperature: Float[Tensor, ""],
        cache: Float[Tensor, "slots layers_plus_1 batch entry"],
    ) -> Round:
        """Draft one token and verify it.

        `positions` are those of each sequence's last token, which is not in the cache. The module processes the two
        positions before it, or position 0 and one that does not count: `hidden` are their states, `tokens` the tokens
        that follow them. The module's entries are the last layer of the cache.

        Returns: the drafts [batch], their logits [batch, vocab], the model's logits after the last token and after the
        draft [batch, 2, vocab], its hidden states there [batch, 2, dim], and the new entries: those of the module
        [batch, 2, entry] and those of the model [batch, 2, layers, entry].
        """
        step, two = self.step, torch.arange(2, device=tokens.device)
        first = (positions - 2).clamp_min(0)
        last = (positions - 1 - first)[:, None]  # which of the two positions is the newest one
        back = first[:, None] + two
        rotation, mask = step.context(back, cache, hidden.dtype)
        further, own_entry = self.module(hidden, wide(step.embedding(tokens)), rotation, cache[:, -1], mask)
        newest = further.gather(1, last[..., None].expand(-1, 1, further.shape[-1]))
        draft_logits = matvec(step.head.weight, self.module.norm(newest))[:, 0]
        drafts = (draft_logits / temperature + noise).argmax(-1)
        read = torch.cat((tokens.gather(1, last), drafts[:, None]), 1)
        new_hidden, entries = step.trunk(read, positions[:, None] + two, cache[:, :-1])
        return drafts, draft_logits, step.logits(new_hidden), new_hidden, own_entry, entries

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Return inputs for the compiler, which leaves open the number of slots of the last one, the cache."""
        tokens, _, cache = self.step.example(batch)
        weight = self.step.head.weight
        hidden = torch.zeros(batch, 2, weight.shape[1], dtype=wide(weight).dtype)
        noise = torch.zeros(batch, weight.shape[0], dtype=hidden.dtype)
        cache = torch.cat((cache, cache[:, :1]), 1)
        return tokens.expand(-1, 2).clone(), hidden, tokens[:, 0], noise, hidden.new_ones(()), cache

    @property
    def longest(self) -> int:
        """Number of positions that it knows the rotations of."""
        return self.step.longest
