"""Look-ups by different attributes: a task on which heads need different keys from the same small cache (chapter 02).

Each of 12 items has four attributes, of 16 values each; within a sequence no two items share the value of an attribute.
A query names one attribute's value and asks for another attribute of that item: "the item whose second attribute is 7,
what is its fourth?". The model has one attention layer of the package, followed by a feed-forward network.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.cost import attention_parameters
from minids.model.attention import GroupedQueryAttention, attend
from minids.model.mla import MultiHeadLatentAttention

ITEMS, ATTRIBUTES, VALUES = 12, 4, 16
PARAMETERS = 40_000  # of attention and feed-forward network together

_MLA = ModelConfig.preset(
    "nano", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, v_head_dim=8, q_lora_rank=None,
    kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8,
)  # fmt: skip
_GQA = _MLA.replace(attention="gqa")
KINDS = {  # from many cached values per token to few
    "MHA": _GQA,
    "GQA, 4 key heads": _GQA.replace(num_key_value_heads=4),
    "MLA, rank 56 + 8": _MLA.replace(kv_lora_rank=56),
    "GQA, 2 key heads": _GQA.replace(num_key_value_heads=2),
    "MQA, head width 16": _GQA.replace(num_key_value_heads=1, v_head_dim=16),  # queries as wide as MLA's
    "MLA, rank 24 + 8": _MLA,
    "MQA": _GQA.replace(num_key_value_heads=1),
    "MLA, rank 8 + 8": _MLA.replace(kv_lora_rank=8),
}


class Lookups(NamedTuple):
    """Sequences of items, a query for each, and its answer."""

    items: Int[Tensor, "n items attributes"]
    given: Int[Tensor, "n"]  # the attribute by which the item is found
    value: Int[Tensor, "n"]
    asked: Int[Tensor, "n"]  # the attribute that is the answer
    answer: Int[Tensor, "n"]


def draw_lookups(n: int, generator: torch.Generator) -> Lookups:
    """Draw `n` sequences and queries."""
    shuffled = torch.rand(n, ATTRIBUTES, VALUES, generator=generator).argsort(-1)
    items = shuffled[..., :ITEMS].transpose(1, 2)
    given = torch.randint(ATTRIBUTES, (n,), generator=generator)
    asked = (given + torch.randint(1, ATTRIBUTES, (n,), generator=generator)) % ATTRIBUTES
    row, item = torch.arange(n), torch.randint(ITEMS, (n,), generator=generator)
    return Lookups(items, given, items[row, item, given], asked, items[row, item, asked])


class LookupModel(nn.Module):
    """One attention layer over the items and the query, then a feed-forward network that fills up to `PARAMETERS`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, dim = config, config.hidden_size
        self.attributes = nn.Parameter(torch.randn(ATTRIBUTES, VALUES, dim) / 2)
        self.given = nn.Parameter(torch.randn(ATTRIBUTES, VALUES, dim))
        self.asked = nn.Parameter(torch.randn(ATTRIBUTES, dim))
        self.attention = (GroupedQueryAttention if config.attention == "gqa" else MultiHeadLatentAttention)(config)
        for weight in self.attention.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        width = (PARAMETERS - attention_parameters(config)) // (2 * dim)
        self.ffn = nn.Sequential(nn.Linear(dim, width, bias=False), nn.GELU(), nn.Linear(width, dim, bias=False))
        self.head = nn.Linear(dim, VALUES)

    def forward(self, items: Tensor, given: Tensor, value: Tensor, asked: Tensor) -> Float[Tensor, "n values"]:
        """Return the scores of the possible answers; the query is the last token."""
        embedding = self.attributes.flatten(0, 1)
        item = F.embedding(items + VALUES * torch.arange(ATTRIBUTES), embedding).sum(-2)  # [n, items, dim]
        query = F.embedding(given * VALUES + value, self.given.flatten(0, 1)) + self.asked[asked]
        out = query + self.attend(torch.cat((item, query[:, None]), 1))
        return self.head(out + self.ffn(out))

    def attend(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n dim"]:
        """Attend from the last token to all. Nothing is rotated: the order of the items says nothing."""
        layer, last, mask = self.attention, x[:, -1:], x.new_zeros(len(x), 1, 1, x.shape[1])
        if isinstance(layer, GroupedQueryAttention):
            projections = (layer.q_proj, last), (layer.k_proj, x), (layer.v_proj, x)
            split = "n t (h d) -> n h t d"
            query, key, value = (rearrange(project(x), split, d=layer.head_dim) for project, x in projections)
            out = attend(query, key, value, mask, layer.scale).flatten(-2)
        else:
            latent, key = layer.kv_down_proj(x).split((layer.kv_rank, layer.rope_dim), -1)
            query = layer.query(last).unflatten(-1, (layer.heads, -1))
            out = layer.expanded(query, torch.cat((layer.kv_norm(latent), key), -1), mask)
        return layer.o_proj(out)[:, 0]


def lookup_accuracy(config: ModelConfig, seed: int, steps: int, batch: int = 256) -> float:
    """Train a new model; return the share of correct answers to 4,096 fresh queries, the same for all models."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), LookupModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        *query, answer = draw_lookups(batch, generator)
        loss = F.cross_entropy(model(*query), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        *query, answer = draw_lookups(4096, torch.Generator().manual_seed(99))
        return (model(*query).argmax(-1) == answer).float().mean().item()
