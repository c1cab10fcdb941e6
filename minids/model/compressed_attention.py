"""The attention of V4: one key-value head over the last tokens and over entries that stand for blocks of tokens.

Three kinds of layers (V4; FACTS.md section 10), by what a query attends to besides a window of the last tokens:
- window: nothing else;
- hca, heavily compressed attention: an entry for every 128 tokens, all of them;
- csa, compressed sparse attention: an entry for every 4 tokens, of which an indexer chooses the best 512.

Notable choices:
- an entry is key *and* value, for all heads. Its last channels are rotated as a key needs it; what the value part of
  them adds to the output is rotated back by the position of the query, so that it depends on the distance only;
- a learned logit per head, the sink, is added to the denominator of the softmax: a head may attend to almost nothing;
- heads are projected to the output in groups, each to a narrow vector, which a second matrix joins;
- a cache of the layer is one tensor per sequence, a ring of the last tokens and the parts of the compressors. It has
  no tokens to go back to: `KVCache.truncate` refuses a rollback;
- the indexer is trained as that of V3.2 (`sparse_attention`), by the divergence from the attention probabilities of the
  entries. How V4 trains it is not published in detail.

Not covered: the Hadamard rotation and the 4-bit format of V4's index queries and keys, and its 8-bit cache.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.compressor import Compressor, complete_blocks, rope_config, rotate_last
from minids.model.kv_cache import AttentionContext, Cache, ring_positions, write_ring
from minids.model.layers import KeptInFloat32, RMSNorm, at_least_float32
from minids.model.rope import rotations
from minids.model.sparse_attention import choose, indexer_loss


class CompressedIndexer(nn.Module):
    """Score of every entry for every query: I = sum_j w_j ReLU(q_j . k), as in V3.2 (V4; FACTS.md section 10).

    The index keys are entries of a narrow compressor of its own. Queries and keys are rotated in their last channels
    and in neighbouring pairs, both unlike those of V3.2.
    """

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        assert config.q_lora_rank is not None and config.index_topk is not None  # ModelConfig
        self.heads, self.dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.q_proj = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False)
        self.compressor = Compressor(config, self.dim, block, overlap=True)
        self.head_weights = nn.Parameter(torch.empty(self.heads, config.hidden_size))

    def scores(
        self,
        x: Float[Tensor, "batch seq dim"],
        query_latent: Float[Tensor, "batch seq q_rank"],
        keys: Float[Tensor, "batch blocks index_dim"],
        rotation: Complex[Tensor, "batch seq 1 pairs"],
    ) -> Float[Tensor, "batch seq blocks"]:
        """Compute the index scores of all entries, also of later ones; in at least float32, also under autocast."""
        query = rotate_last(self.q_proj(query_latent).unflatten(-1, (self.heads, self.dim)), rotation)
        with torch.autocast(x.device.type, enabled=False):
            x, query, keys = at_least_float32(x), at_least_float32(query), at_least_float32(keys)
            weights = F.linear(x, self.head_weights.to(x.dtype)) * (self.heads * self.dim) ** -0.5
            return torch.einsum("bth,bths->bts", weights, torch.einsum("bthd,bsd->bths", query, keys).relu())


class Sink(KeptInFloat32):
    """A logit per head that joins the denominator of the softmax and has no value."""

    def __init__(self, heads: int):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(heads))

    def softmax(self, logits: Float[Tensor, "batch heads seq slots"]) -> Float[Tensor, "batch heads seq slots"]:
        """Compute probabilities of the slots, in at least float32; they sum to less than 1."""
        logits = at_least_float32(logits)
        sink = self.logit.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat((logits, sink), -1).softmax(-1)[..., :-1]


class GroupedLinear(nn.Module):
    """A matrix for each group of heads, [groups, in, out]."""

    def __init__(self, groups: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, inputs, outputs))

    def forward(self, x: Float[Tensor, "batch seq in_all"]) -> Float[Tensor, "batch seq out_all"]:
        grouped = x.unflatten(-1, self.weight.shape[:2])
        return torch.einsum("btgi,gio->btgo", grouped, self.weight.to(x.dtype)).flatten(-2)


class CompressedAttention(nn.Module):
    """Attention of one layer of V4, of the kind `config.attention`: window, csa or hca."""

    cache_width = 0
    """Values that the cache grows by for every single token; it has a layout of its own, see `new_cache`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.q_lora_rank is not None  # ModelConfig
        self.heads, self.head_dim, self.window = config.num_attention_heads, config.v_head_dim, config.sliding_window
        self.rope, self.rope_dim, self.norm_eps = rope_config(config), config.qk_rope_head_dim, config.rms_norm_eps
        self.scale = self.head_dim**-0.5  # no temperature of YaRN
        self.q_down_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_up_proj = nn.Linear(config.q_lora_rank, self.heads * self.head_dim, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.kv_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.sink = Sink(self.heads)
        group_width = self.heads * self.head_dim // config.o_groups
        self.group_proj = GroupedLinear(config.o_groups, group_width, config.o_lora_rank)
        self.o_proj = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        sparse = config.attention == "csa"
        block = config.csa_block if sparse else config.hca_block
        self.compressor = None if config.attention == "window" else Compressor(config, self.head_dim, block, sparse)
        self.indexer = CompressedIndexer(config, block) if sparse else None

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: AttentionContext, cache: Cache | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        ring, caches = self.parts(cache) if cache is not None else (None, [None, None])
        rotation = rotations(self.rope, context.positions, self.rope_dim, x.dtype)
        latent = self.q_norm(self.q_down_proj(x))
        query = self.q_up_proj(latent).unflatten(-1, (self.heads, self.head_dim))
        query = rotate_last(F.rms_norm(query, query.shape[-1:], eps=self.norm_eps), rotation)
        own = rotate_last(self.kv_norm(self.kv_proj(x))[:, :, None], rotation)[:, :, 0]
        kv, visible = self.window_entries(own, context, ring)  # [batch, slots, head_dim], [batch, seq, slots]
        scores = None
        if self.compressor is not None:
            entries, attended, scores = self.entries(x, latent, context, rotation, caches)
            kv, visible = torch.cat((kv, entries.to(kv.dtype)), 1), torch.cat((visible, attended), -1)
        out, probabilities = self.attend(query, kv, visible)
        if context.indexer is not None and scores is not None:
            of_entries = probabilities.detach()[..., kv.shape[1] - scores.shape[-1] :].sum(1)
            target = of_entries / of_entries.sum(-1, keepdim=True).clamp_min(torch.finfo(of_entries.dtype).tiny)
            context.indexer.losses.append(indexer_loss(scores, target, attended))
        return self.o_proj(self.group_proj(rotate_last(out, rotation.conj()).flatten(-2)))

    def entries(
        self,
        x: Float[Tensor, "batch seq dim"],
        latent: Float[Tensor, "batch seq q_rank"],
        context: AttentionContext,
        rotation: Complex[Tensor, "batch seq 1 pairs"],
        caches: Sequence[tuple[Tensor, Tensor] | None],
    ) -> tuple[
        Float[Tensor, "batch attended head_dim"],
        Bool[Tensor, "batch seq attended"],
        Float[Tensor, "batch seq blocks"] | None,
    ]:
        """Return the entries, which of them each query attends to, and the index scores that chose these, if any.

        The indexer's inputs are detached. For a single query the entries are only the chosen ones.
        """
        assert self.compressor is not None
        entries, indexer, training = self.compressor(x, context, caches[0]), self.indexer, context.indexer
        attended = complete_blocks(context.positions, self.compressor.block, entries.shape[1])
        if indexer is None:
            return entries, attended, None
        keys = indexer.compressor(x.detach(), context, caches[1])  # also where none is left out, for the cache
        if training is None and entries.shape[1] <= indexer.topk:
            return entries, attended, None
        scores = indexer.scores(x.detach(), latent.detach(), keys, rotation)
        if training is None or training.stage == "sparse":
            attended = choose(scores, attended, indexer.topk)
        if training is None and x.shape[1] == 1:
            entries, attended = fetch(entries, attended, indexer.topk)
        return entries, attended, scores

    def window_entries(
        self,
        own: Float[Tensor, "batch seq head_dim"],
        context: AttentionContext,
        ring: Float[Tensor, "batch window head_dim"] | None,
    ) -> tuple[Float[Tensor, "batch slots head_dim"], Bool[Tensor, "batch seq slots"]]:
        """Return the single tokens, cached ones first, and which of them are in each query's window.

        The window ends with the query's own token. The new tokens are written into the ring.
        """
        kv, held = own, context.positions
        if ring is not None and context.mask is not None:  # it is empty without a mask
            kv = torch.cat((ring.to(own.dtype), own), 1)
            held = torch.cat((ring_positions(self.window, held[:, :1]), held), 1)
        if ring is not None:
            write_ring(ring, context, own)
        distance = context.positions[:, :, None] - held[:, None]
        return kv, (distance >= 0) & (distance < self.window) & (held >= 0)[:, None]

    def attend(
        self,
        query: Float[Tensor, "batch seq heads head_dim"],
        kv: Float[Tensor, "batch slots head_dim"],
        visible: Bool[Tensor, "batch seq slots"],
    ) -> tuple[Float[Tensor, "batch seq heads head_dim"], Float[Tensor, "batch heads seq slots"]]:
        """Compute attention with a sink over keys that are the values too; also return the probabilities."""
        logits = torch.einsum("bthd,bsd->bhts", query, kv) * self.scale
        probabilities = self.sink.softmax(logits.masked_fill(~visible[:, None], -torch.inf))
        return torch.einsum("bhts,bsd->bthd", probabilities.to(kv.dtype), kv), probabilities

    def new_cache(self, batch: int, slots: int, like: Tensor) -> Cache:
        """Allocate a cache for sequences of at most `slots` tokens, [batch, values, 1]: all its parts in one tensor.

        Two more entries than complete blocks: the last block may be unfinished, and one after it may be written.
        """
        entries = 0 if self.compressor is None else slots // self.compressor.block + 2
        return like.new_zeros(batch, self.cache_values(entries), 1)

    def cache_shapes(self, entries: int) -> list[tuple[int, int]]:
        """Rows and widths of a cache's parts: the window's ring, then the ring and the entries of each compressor."""
        shapes = [(self.window, self.head_dim)]
        for compressor in self.compressors():
            shapes += [(compressor.tokens, compressor.state_width), (entries, compressor.width)]
        return shapes

    def cache_values(self, entries: int) -> int:
        """Values of a cache with so many entries, per sequence."""
        return sum(rows * width for rows, width in self.cache_shapes(entries))

    def parts(self, cache: Cache) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return views of a cache's parts, [batch, rows, width]: the window's ring, and those of the compressors."""
        fixed = self.cache_values(0)
        shapes = self.cache_shapes((cache.shape[1] - fixed) // max(1, self.cache_values(1) - fixed))
        views, start = [], 0
        for rows, width in shapes:  # not by `split`, whose views torch does not let one write into
            views.append(cache[:, start : start + rows * width, 0].unflatten(1, (rows, width)))
            start += rows * width
        ring, *others = views
        return ring, list(zip(others[::2], others[1::2], strict=True))

    def compressors(self) -> list[Compressor]:
        """Return the compressors: of the entries, and of the index keys."""
        return [module for module in self.modules() if isinstance(module, Compressor)]


def fetch(
    entries: Float[Tensor, "batch blocks head_dim"], attended: Bool[Tensor, "batch 1 blocks"], k: int
) -> tuple[Float[Tensor, "batch k head_dim"], Bool[Tensor, "batch 1 k"]]:
    """Gather the entries that the only query of each sequence attends to; others, if these are fewer, masked."""
    chosen = attended.int().topk(k, sorted=False).indices  # [batch, 1, k]
    return entries.gather(1, chosen[:, 0, :, None].expand(-1, -1, entries.shape[-1])), attended.gather(-1, chosen)
