"""MiniDS: the complete model, with embedding, layers, output head and multi-token prediction (MTP) modules.

Notable choices: pre-norm residual layers; the first layers are dense, the others mixtures of experts; embedding and
output head are separate matrices, which the MTP modules share; a forward pass changes no state but the given cache.
What came after V3 is off unless the config asks for it: several residual streams (hyper_connections.py), a memory that
some layers read before their attention (engram.py), and V4's attention and hash routing (compressed_attention.py).

Dimensions in shape annotations and comments, in all of `minids.model`:
    batch             sequences in a batch (b)
    seq               tokens per sequence in this forward pass (t)
    slots             positions of the cache; a token attends to those up to its own (s)
    dim               width of the residual stream, `hidden_size`
    vocab             tokens in the vocabulary
    heads, kv_heads   query heads, and key-value heads of GQA (h)
    nope, rope        unrotated and rotated part of a query or key head; query_dim = nope + rope
    kv_rank, q_rank   widths of the key-value and the query latent of MLA
    entry, width      values cached per token and layer; in MLA kv_rank + rope
    index_heads, index_dim   heads of the indexer of sparse attention, and their width
    blocks            entries of V4's compressed attention, one per block of tokens; head_dim is its only width
    pairs             pairs of channels that RoPE rotates, rope / 2
    experts, k        routed experts of a layer, and those chosen per token
    tokens, rows      batch * seq; copies of tokens sorted by expert, tokens * k
    streams, n        residual streams of hyper-connections; without them the residual stream has no such dimension
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.block import Block
from minids.model.compressed_attention import CompressedAttention
from minids.model.engram import EngramLayers, new_history
from minids.model.hash_routing import HashRouting
from minids.model.hyper_connections import CollapsingNorm, HyperBlock, HyperMTPModule, expand
from minids.model.kv_cache import AttentionContext, IndexerTraining, KVCache
from minids.model.layers import ModuleList, RMSNorm
from minids.model.moe import Experts, MoE, Router, Routing, update_balance_bias
from minids.model.mtp import MTPModule
from minids.model.rope import rotations

# Matrices that write to the residual stream.
WRITES_TO_RESIDUAL = (".o_proj.weight", ".down_proj", ".down_proj.weight", ".value_proj.weight")


@dataclass
class Output:
    """Output of a forward pass."""

    hidden: Float[Tensor, "batch seq *streams dim"]  # residual stream before the final norm; input of MTP
    head_inputs: list[Tensor]  # depth k = 0 (the next token)..D (MTP), normalised: [batch, seq - k, dim]
    head: nn.Linear
    routings: list[Routing] = field(default_factory=list)  # one per MoE layer that ran; MTP modules last
    indexer_losses: list[Tensor] = field(default_factory=list)  # one per layer with an indexer that is trained

    @cached_property
    def logits(self) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token; `MiniDS.forward` computes them, after `MiniDS.states` the first access does."""
        return self.head(self.head_inputs[0])

    @cached_property
    def mtp_logits(self) -> list[Tensor]:
        """Logits of the MTP modules, computed when `logits` are; depth k = 1..D: [batch, seq - k, vocab]."""
        return [self.head(x) for x in self.head_inputs[1:]]

    @property
    def tokens_per_expert(self) -> Int[Tensor, "layers experts"]:
        """Number of tokens per expert, one row per MoE layer that ran, MTP modules last; shape [0, 0] if dense."""
        if not self.routings:
            return torch.zeros(0, 0, dtype=torch.int64)
        return torch.stack([routing.tokens_per_expert for routing in self.routings])


class MiniDS(nn.Module):
    """DeepSeek-V3 (FACTS.md sections 1 to 4); with other configs, DeepSeek-V2, V3.2, V4, or a dense baseline."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        layers, depths, several = config.num_hidden_layers, config.num_nextn_predict_layers, config.hc_mult > 1
        self.layers: ModuleList[Block] = ModuleList(
            HyperBlock(config.of_layer(i), i < config.first_k_dense_replace, i) if several
            else Block(config.of_layer(i), dense=i < config.first_k_dense_replace)
            for i in range(layers)
        )  # fmt: skip
        self.norm = CollapsingNorm(config) if several else RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp: ModuleList[MTPModule] = ModuleList(
            HyperMTPModule(config, layers + k) if several else MTPModule(config) for k in range(depths)
        )
        self.engram = EngramLayers(config) if config.engram is not None else None
        self.hash_routing = HashRouting(config) if config.num_hash_layers is not None else None
        self.initialize()

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        mtp: bool = False,
        cache: KVCache | None = None,
        indexer: IndexerTraining | None = None,
        experts: Int[Tensor, "moe_layers batch seq k"] | None = None,
    ) -> Output:
        """Compute the next-token logits at every position; with `mtp` also those of the MTP modules.

        With a cache, `tokens` continue the cached sequences and are added to the cache. With `indexer`, the indexers of
        sparse attention add their losses to it. With `experts`, the MoE layers of the trunk use these instead of those
        that their routers choose. Raises `ValueError` if the sequence exceeds the context length or the capacity of the
        cache.
        """
        out = self.states(tokens, mtp=mtp, cache=cache, indexer=indexer, experts=experts)
        _ = out.logits, out.mtp_logits  # computed here, with the weights and the gradient mode of this forward pass
        return out

    def states(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        mtp: bool = False,
        cache: KVCache | None = None,
        indexer: IndexerTraining | None = None,
        experts: Int[Tensor, "moe_layers batch seq k"] | None = None,
    ) -> Output:
        """Compute what `forward` does, without the logits: a loss applies the head itself, to a chunk at a time."""
        hidden, routings = self.trunk(tokens, cache, indexer, experts)  # hidden [batch, seq, dim]
        out = Output(hidden, [self.norm(hidden)], self.head, routings)
        if mtp:
            self._predict_further(tokens, out, indexer)
        if indexer is not None:
            out.indexer_losses = indexer.losses
        return out

    def trunk(
        self,
        tokens: Int[Tensor, "batch seq"],
        cache: KVCache | None = None,
        indexer: IndexerTraining | None = None,
        experts: Int[Tensor, "moe_layers batch seq k"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq *streams dim"], list[Routing]]:
        """Run all layers; return the residual stream before the final norm, and the routing of every MoE layer."""
        x = self.embedding(tokens)  # [batch, seq, dim]
        if self.config.hc_mult > 1:
            x = expand(x, self.config.hc_mult)  # [batch, seq, n, dim]
        context = self.attention_context(tokens, cache, indexer)
        if self.engram is not None:
            ngrams = self.engram.ngrams(tokens, context, None if cache is None else cache.layers[-1])
        routings: list[Routing] = []
        for i, layer in enumerate(self.layers):
            if self.engram is not None:
                x = self.engram(i, x, ngrams)
            given = None
            if experts is not None and isinstance(layer.ffn, MoE):
                given = experts[len(routings)]
            elif self.hash_routing is not None and isinstance(layer.ffn, MoE):
                given = self.hash_routing(len(routings), tokens)
            x, routing = layer(x, context, cache and cache.layers[i], given)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x, routings

    def logits(self, hidden: Float[Tensor, "batch seq *streams dim"]) -> Float[Tensor, "batch seq vocab"]:
        """Apply the final norm and the output head to the residual stream after the last layer."""
        return self.head(self.norm(hidden))

    def attention_context(
        self, tokens: Int[Tensor, "batch seq"], cache: KVCache | None = None, indexer: IndexerTraining | None = None
    ) -> AttentionContext:
        """Compute positions, rotations and mask of tokens that continue `cache`, or start at position 0 without one."""
        batch, seq = tokens.shape
        longest = seq + (cache.longest if cache is not None else 0)
        limit = min(self.config.max_position_embeddings, cache.slots if cache is not None else longest)
        if longest > limit:
            raise ValueError(f"sequence of {longest} tokens: the context holds {limit}")
        positions = torch.arange(seq, device=tokens.device).expand(batch, seq)
        dtype = self.embedding.weight.dtype
        mask = None
        if cache is not None and cache.longest > 0:  # an empty one needs no mask: attention is causal
            positions = positions + cache.lengths[:, None]
            unseen = torch.arange(longest, device=tokens.device) > positions[:, None, :, None]  # [batch, 1, seq, slots]
            mask = torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)
        sequence = torch.arange(batch, device=tokens.device)[:, None]
        rotation = rotations(self.config, positions, self.layers[0].attention.rope_dim, dtype)
        return AttentionContext(sequence, positions, rotation, mask, indexer)

    def _predict_further(
        self, tokens: Int[Tensor, "batch seq"], out: Output, indexer: IndexerTraining | None = None
    ) -> None:
        """Run MTP depth k on positions 0..T-k-1: input token i+k, predicted token i+k+1 (V3 eq. 21-23)."""
        hidden = out.hidden
        for k, module in enumerate(self.mtp[: tokens.shape[1] - 1], start=1):
            following = tokens[:, k:]  # [batch, seq - k]
            context = self.attention_context(following, indexer=indexer)
            hidden, routing = module(hidden[:, :-1], self.embedding(following), context)
            out.head_inputs.append(module.norm(hidden))
            if routing is not None:
                out.routings.append(routing)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """Allocate a cache of the layers for `batch` sequences of at most `slots` tokens.

        Where layers read n-grams, the tokens are cached too, as one more layer.
        """
        cache = self._cache_of(self.layers, batch, slots)
        if self.engram is not None:
            cache.layers.append(new_history(batch, slots, self.head.weight.device))
        return cache

    def new_mtp_cache(self, batch: int, slots: int) -> KVCache:
        """Allocate a cache of the MTP modules, with one layer per module."""
        return self._cache_of([module.block for module in self.mtp], batch, slots)

    def _cache_of(self, blocks: Iterable[Block], batch: int, slots: int) -> KVCache:
        attentions = [block.attention for block in blocks]
        cache = KVCache([attention.cache_width for attention in attentions], batch, slots, like=self.head.weight)
        for i, attention in enumerate(attentions):
            if isinstance(attention, CompressedAttention):
                cache.layers[i], cache.keeps_all = attention.new_cache(batch, slots, self.head.weight), False
        return cache

    def update_balance_bias(self, tokens_per_expert: Int[Tensor, "layers experts"], speed: float) -> None:
        """Update the routers' biases, once per optimizer step; the rows are those of `Output.tokens_per_expert`.

        The counts are those of the global batch. Routers without a row (MTP modules that did not run) keep their bias.
        """
        for router, counts in zip(self.routers(), tokens_per_expert, strict=False):
            if router.bias is not None:
                update_balance_bias(router.bias, counts, speed)

    def routers(self) -> list[Router]:
        """Return the routers in the order of `Output.tokens_per_expert`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def num_parameters(self, mtp: bool = False) -> int:
        """Count the main model's parameters with balancing biases (FACTS.md section 1.1); with `mtp` also MTP's."""
        total = sum(p.numel() for p in self.parameters())
        return total if mtp else total - sum(p.numel() for p in self.mtp.parameters())

    def num_active_parameters(self) -> int:
        """Count the parameters of the main model that one token uses, embedding and head too (FACTS.md section 1.1)."""
        routed = sum(p.numel() for m in self.layers.modules() if isinstance(m, Experts) for p in m.parameters())
        unread = 0 if self.engram is None else self.engram.num_idle_parameters()
        total = self.num_parameters() - unread
        return total - routed + routed * self.config.num_experts_per_tok // self.config.n_routed_experts

    def precision_report(self) -> dict[str, str]:
        """Map the name of every module with parameters of its own to the precision in which it computes."""
        owners = ((name, module, next(module.parameters(recurse=False), None)) for name, module in self.named_modules())
        return {
            name: getattr(module, "computes_in", str(own.dtype).removeprefix("torch."))
            for name, module, own in owners
            if own is not None
        }

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialise all matrices from normal distributions.

        As published, every matrix has the standard deviation `initializer_range` (0.006; FACTS.md section 1). That is
        too small for widths in the hundreds: the signal would vanish. With `initializer_range=None` a matrix has
        1 / sqrt(fan-in), one that writes to the residual stream 1 / sqrt(2 * layers) of that, the embedding 1, and the
        output head 1 / width.
        """
        published = self.config.initializer_range
        residual_factor = (2 * self.config.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                continue  # norms start at 1, balancing biases at 0
            fan_in = weight.shape[1]
            std = fan_in**-0.5 * (residual_factor if name.endswith(WRITES_TO_RESIDUAL) else 1)
            if name.startswith("embedding"):
                std = 1.0
            elif name.startswith("head"):
                std = 1 / fan_in
            weight.normal_(0, published or std)
