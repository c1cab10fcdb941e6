"""DeepSeek Sparse Attention (DSA) of V3.2: a small indexer scores all cached tokens, MLA attends to the best k of them.

The choice passes no gradient: a token is chosen or not. The indexer therefore has a loss of its own, the divergence of
its softmax from the attention probabilities of MLA. It is trained in two stages (V3.2-Exp section 2.1):
- dense warm-up: attention is dense, only the indexers are trained;
- sparse stage: attention is sparse, everything is trained. The indexer learns from its own loss only, because its
  inputs are detached; the rest of the model learns from its own losses only, because the target is detached.

Notable choices:
- a cache entry of MLA is followed by the token's index key, so caches, batches and rollbacks are those of MLA;
- of entries with equal scores the earlier one is chosen. ReLU makes many scores exactly 0, and a tie that is broken at
  random would let cached decoding and a full pass choose differently. transformers takes any of them, so that with few
  index heads, where ties are frequent, its logits can differ;
- one query fetches its k entries from the cache; several queries attend to all entries with a mask, as V3.2 does for
  short prompts (V3.2-Exp section 3), which saves no time.

Not covered: the Hadamard rotation and the FP8 format of V3.2's index queries and keys. A rotation changes no product.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.kv_cache import AttentionContext, Cache, IndexStage, write_cache
from minids.model.layers import at_least_float32
from minids.model.mla import MultiHeadLatentAttention

KEY_NORM_EPS = 1e-6


def rotate_halves(
    x: Float[Tensor, "batch seq heads dim"], rotation: Complex[Tensor, "batch seq 1 pairs"]
) -> Float[Tensor, "batch seq heads dim"]:
    """Rotate channel i together with channel i + pairs, for i < pairs; channels from 2 * pairs on stay.

    The angles are those of MLA, which rotates the neighbouring channels (2i, 2i + 1) instead (`rope.rotate`).
    """
    pairs = rotation.shape[-1]
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), -1)
    rotated = torch.complex(first.to(rotation.real.dtype), second.to(rotation.real.dtype)) * rotation
    return torch.cat((rotated.real.to(x.dtype), rotated.imag.to(x.dtype), rest), -1)


class LightningIndexer(nn.Module):
    """Score of every cached token for every query: I = sum_j w_j ReLU(q_j . k) (V3.2-Exp eq. 1; FACTS.md section 10).

    j counts index heads, which share one index key per token. The weights w_j may be negative; they have no softmax.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.q_lora_rank is not None  # ModelConfig
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.q_proj = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, KEY_NORM_EPS)
        self.head_weights = nn.Parameter(torch.empty(self.heads, config.hidden_size))

    def key(self, x: Float[Tensor, "batch seq dim"], context: AttentionContext) -> Float[Tensor, "batch seq index_dim"]:
        """Compute each token's index key, which is cached: projection, LayerNorm with bias, rotation."""
        return rotate_halves(self.k_norm(self.k_proj(x))[:, :, None], context.rotation)[:, :, 0]

    def scores(
        self,
        x: Float[Tensor, "batch seq dim"],
        query_latent: Float[Tensor, "batch seq q_rank"],
        keys: Float[Tensor, "batch slots index_dim"],
        context: AttentionContext,
    ) -> Float[Tensor, "batch seq slots"]:
        """Compute the index scores of all slots, also of later ones; in float32 or float64, also under autocast.

        The released code scales by 1 / sqrt(heads * dim), which changes the softmax of the loss, but no choice.
        """
        query = self.q_proj(query_latent).unflatten(-1, (self.heads, self.dim))  # [batch, seq, index_heads, index_dim]
        query = at_least_float32(rotate_halves(query, context.rotation))
        with torch.autocast(x.device.type, enabled=False):
            weights = F.linear(at_least_float32(x), self.head_weights.to(query.dtype)) * (self.heads * self.dim) ** -0.5
            products = torch.einsum("bthd,bsd->bths", query, keys.to(query.dtype)).relu()
            return torch.einsum("bth,bths->bts", weights, products)


def choose(
    scores: Float[Tensor, "batch seq slots"], visible: Bool[Tensor, "batch seq slots"], k: int
) -> Bool[Tensor, "batch seq slots"]:
    """Choose each query's k visible slots with the highest scores, or all if there are fewer; earlier ones at a tie."""
    scores = scores.detach().masked_fill(~visible, -torch.inf)
    lowest = scores.topk(min(k, scores.shape[-1])).values[..., -1:]  # of the chosen ones
    above, tied = scores > lowest, scores == lowest
    free = k - above.sum(-1, keepdim=True)
    return (above | tied & (tied.cumsum(-1) <= free)) & visible


def indexer_loss(
    scores: Float[Tensor, "batch seq slots"],
    target: Float[Tensor, "batch seq slots"],
    attended: Bool[Tensor, "batch seq slots"],
) -> Float[Tensor, ""]:
    """Compute KL(target || softmax(scores)) over the attended slots in nats, mean over queries (V3.2-Exp eq. 3-4).

    `target` is a distribution over the attended slots. The paper sums over queries.
    """
    log_chance = scores.masked_fill(~attended, -torch.inf).log_softmax(-1)
    log_chance = log_chance.masked_fill(~attended, 0.0)  # the target is 0 there, and 0 * -inf is not
    return (torch.xlogy(target, target) - target * log_chance).sum(-1).mean()


class SparseLatentAttention(MultiHeadLatentAttention):
    """MLA over the `index_topk` entries that an indexer scores highest (V3.2-Exp eq. 2; FACTS.md section 10).

    All heads of a query attend to the same entries. In training `context.indexer` collects the indexer's loss.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert config.index_topk is not None
        self.topk, self.indexer = config.index_topk, LightningIndexer(config)
        self.entry_width = self.cache_width
        self.cache_width = self.entry_width + config.index_head_dim

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: AttentionContext, cache: Cache | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        query, entries = self.query_and_entry(x, context)  # [batch, seq, heads, query_dim], [batch, seq, entry]
        index_keys = self.indexer.key(x.detach(), context)  # [batch, seq, index_dim]
        if cache is not None:
            cached = write_cache(cache, context, torch.cat((entries, index_keys), -1))
            entries, index_keys = cached.split((self.entry_width, self.indexer.dim), -1)  # each [batch, slots, ...]

        training, mask = context.indexer, context.mask
        if training is not None or entries.shape[1] > self.topk:
            scores = self.indexer.scores(x.detach(), self.query_latent(x).detach(), index_keys, context)
            attended = visible_slots(scores, context.mask)
            if training is None or training.stage == "sparse":
                attended = choose(scores, attended, self.topk)
                mask = additive(attended, query)
            if training is not None:
                target = self.probabilities(query, entries, additive(attended, query))
                training.losses.append(indexer_loss(scores, target, attended))
            elif x.shape[1] == 1:
                entries, mask = self.fetch(entries, attended)

        absorbs = cache is not None and self.absorbing_is_cheaper(x.shape[1])
        return self.o_proj((self.absorbed if absorbs else self.expanded)(query, entries, mask))

    def query_latent(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq q_rank"]:
        """Compute the normalised query latent, as `query` does: once more, for 2 % of a layer's FLOPs in V3.2."""
        return self.q_norm(self.q_down_proj(x))

    def fetch(
        self, entries: Float[Tensor, "batch slots entry"], attended: Bool[Tensor, "batch 1 slots"]
    ) -> tuple[Float[Tensor, "batch k entry"], Float[Tensor, "batch 1 1 k"]]:
        """Gather the entries that the only query of each sequence attends to; return them and their mask.

        A sequence with fewer than k entries gets others in addition, which are masked.
        """
        chosen = attended.int().topk(self.topk, sorted=False).indices  # [batch, 1, k]
        fetched = entries.gather(1, chosen[:, 0, :, None].expand(-1, -1, entries.shape[-1]))
        return fetched, additive(attended.gather(-1, chosen), entries)

    @torch.no_grad()
    def probabilities(
        self,
        query: Float[Tensor, "batch seq heads query_dim"],
        entries: Float[Tensor, "batch slots entry"],
        mask: Float[Tensor, "batch 1 seq slots"],
    ) -> Float[Tensor, "batch seq slots"]:
        """Compute the attention probabilities summed over heads, normalised to a sum of 1: the indexer's target.

        They are computed again, because the fused attention kernel does not return them.
        """
        latent, key_rope = entries.split((self.kv_rank, self.rope_dim), -1)
        key_nope = rearrange(self.kv_up_proj(latent), "b s (h d) -> b h s d", h=self.heads)[..., : self.nope_dim]
        key = torch.cat((key_nope, key_rope[:, None].expand(-1, self.heads, -1, -1)), -1)  # [b, heads, slots, query]
        logits = torch.einsum("bthd,bhsd->bhts", query, key.to(query.dtype)) * self.scale + mask
        return at_least_float32(logits).softmax(-1).mean(1)


def visible_slots(
    scores: Float[Tensor, "batch seq slots"], mask: Float[Tensor, "batch 1 seq slots"] | None
) -> Bool[Tensor, "batch seq slots"]:
    """Return which slots each query may attend to; without a mask query i sees the slots 0..i."""
    return torch.ones_like(scores, dtype=torch.bool).tril() if mask is None else mask[:, 0] == 0


def additive(attended: Bool[Tensor, "batch seq slots"], like: Tensor) -> Float[Tensor, "batch 1 seq slots"]:
    """Return the attention mask with 0 for attended slots and -inf for the others, in the dtype of `like`."""
    return torch.zeros_like(attended, dtype=like.dtype).masked_fill(~attended, -torch.inf)[:, None]


def set_trained_parameters(model: nn.Module, stage: IndexStage) -> None:
    """Freeze everything but the indexers for the dense warm-up, or nothing for the sparse stage.

    Balancing biases have no gradient in either stage.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith("router.bias"):
            parameter.requires_grad_(stage == "sparse" or ".indexer." in name)
