"""MiniDS: the blocks, the multi-token prediction modules, and the whole model.

Notable choices: pre-norm residual blocks; the first layers dense, the rest mixtures of experts; embedding and head are
separate matrices, and the prediction modules use the same two; a forward pass mutates nothing but the cache handed in.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.attention import Cache, GroupedQueryAttention, MultiHeadLatentAttention, Step
from minids.model.layers import RMSNorm, SwiGLU, rotations
from minids.model.moe import Experts, MoE, Router, Routing, update_balance_bias

TO_STREAM = (".o_proj.weight", ".down_proj", ".down_proj.weight")  # the matrices whose output joins the stream


class Block(nn.Module):
    """One layer: attention, then a dense or a mixture feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig, dense: bool):
        super().__init__()
        attention = MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], step: Step, cache: Cache | None = None
    ) -> tuple[Float[Tensor, "batch seq dim"], Routing | None]:
        x = x + self.attention(self.attention_norm(x), step, cache)
        out = self.ffn(self.ffn_norm(x))
        out, routing = out if isinstance(self.ffn, MoE) else (out, None)
        return x + out, routing


class MTPModule(nn.Module):
    """One depth of multi-token prediction: from h_i and the embedding of a later token, the stream one token further.

    V3 eq. 21-22 with the paper's order, [hidden; embedding]; released weights have it the other way round, which
    `interop.hf` turns. The hidden state is the stream before the final norm, in training and in drafting alike
    (the paper leaves this open; PITFALLS 19).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, dense=config.num_moe_layers == 0)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq dim"],
        embedding: Float[Tensor, "batch seq dim"],
        step: Step,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "batch seq dim"], Routing | None]:
        joined = torch.cat((self.hidden_norm(hidden), self.embedding_norm(embedding)), -1)
        return self.block(self.proj(joined), step, cache)


@dataclass
class Output:
    """What a forward pass returns."""

    logits: Float[Tensor, "batch seq vocab"]
    hidden: Float[Tensor, "batch seq dim"]  # the stream before the final norm: what MTP continues from
    mtp_logits: list[Tensor] = field(default_factory=list)  # depth k = 1..D: [batch, seq - k, vocab]
    routings: list[Routing] = field(default_factory=list)  # one per MoE layer that ran, the MTP modules' last

    @property
    def loads(self) -> Int[Tensor, "layers experts"]:
        """Tokens sent to each expert, a row per MoE layer that ran, the MTP modules' rows last; [0, 0] if dense."""
        if not self.routings:
            return torch.zeros(0, 0, dtype=torch.int64)
        return torch.stack([routing.load for routing in self.routings])


class KVCache:
    """What has been read of each sequence of a batch: a cache tensor per layer, and how many positions are valid."""

    def __init__(self, blocks: list[Block], batch: int, slots: int):
        weight = blocks[0].attention.o_proj.weight
        self.layers = [weight.new_zeros(batch, slots, block.attention.cache_width) for block in blocks]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.longest = 0  # no length exceeds it; known without asking the device

    @property
    def slots(self) -> int:
        return self.layers[0].shape[1]

    def advance(self, tokens: int) -> None:
        """Count the tokens that were just written for every sequence."""
        self.lengths = self.lengths + tokens
        self.longest += tokens

    def truncate(self, lengths: Int[Tensor, "batch"]) -> None:
        """Forget what lies beyond these lengths; its slots are simply written again."""
        self.lengths, self.longest = lengths, int(lengths.max())

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Drop every sequence but these."""
        self.layers = [layer[rows] for layer in self.layers]
        self.truncate(self.lengths[rows])

    def num_bytes(self) -> int:
        """Memory of all layers, in bytes."""
        return sum(layer.nbytes for layer in self.layers)


class MiniDS(nn.Module):
    """DeepSeek-V3 (FACTS.md sections 1 to 4), or by another config one of the models it is compared with."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, dense=i < config.first_k_dense_replace) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.num_nextn_predict_layers))
        self.initialize()

    def forward(self, tokens: Int[Tensor, "batch seq"], *, mtp: bool = False, cache: KVCache | None = None) -> Output:
        """Logits of the next token at every position; with `mtp` also those of the tokens after it.

        With a cache, `tokens` continue what the cache has read, and are added to it. Raises `ValueError` where the
        sequence is longer than the context or the cache.
        """
        hidden, routings = self.trunk(tokens, cache)
        out = Output(self.logits(hidden), hidden, routings=routings)
        if mtp:
            self._predict_further(tokens, out)
        return out

    def trunk(
        self, tokens: Int[Tensor, "batch seq"], cache: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch seq dim"], list[Routing]]:
        """The stream after the last layer, before the final norm, and the routing of every MoE layer."""
        x = self.embedding(tokens)
        step = self.step(tokens, cache)
        routings = []
        for i, layer in enumerate(self.layers):
            x, routing = layer(x, step, cache and cache.layers[i])
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x, routings

    def logits(self, hidden: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq vocab"]:
        """The shared output head on the stream after the last layer."""
        return self.head(self.norm(hidden))

    def step(self, tokens: Int[Tensor, "batch seq"], cache: KVCache | None = None) -> Step:
        """Positions, rotations and mask of tokens that continue `cache`, or start at 0 where there is none."""
        batch, seq = tokens.shape
        longest = seq + (cache.longest if cache is not None else 0)
        room = min(self.config.max_position_embeddings, cache.slots if cache is not None else longest)
        if longest > room:
            raise ValueError(f"sequence of {longest} tokens: the context holds {room}")
        positions = torch.arange(seq, device=tokens.device).expand(batch, seq)
        dtype = self.embedding.weight.dtype
        mask = None
        if cache is not None:
            positions = positions + cache.lengths[:, None]
            unseen = torch.arange(longest, device=tokens.device) > positions[:, None, :, None]
            mask = torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)
        sequence = torch.arange(batch, device=tokens.device)[:, None]
        rotation = rotations(self.config, positions, self.layers[0].attention.rope_dim, dtype)
        return Step(sequence, positions, rotation, mask)

    def _predict_further(self, tokens: Int[Tensor, "batch seq"], out: Output) -> None:
        """Run depth k on positions 0..T-k-1: it reads token i+k and predicts token i+k+1 (V3 eq. 21-23)."""
        hidden = out.hidden
        for k, module in enumerate(self.mtp[: tokens.shape[1] - 1], start=1):
            following = tokens[:, k:]
            hidden, routing = module(hidden[:, :-1], self.embedding(following), self.step(following))
            out.mtp_logits.append(self.head(module.norm(hidden)))
            if routing is not None:
                out.routings.append(routing)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of the trunk for `batch` sequences of at most `slots` tokens."""
        return KVCache(list(self.layers), batch, slots)

    def new_mtp_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of the prediction modules."""
        return KVCache([module.block for module in self.mtp], batch, slots)

    def update_balance_bias(self, loads: Int[Tensor, "layers experts"], speed: float) -> None:
        """Once per optimizer step: nudge the routers' biases by the loads of the global batch, rows as in `Output`.

        Routers without a row, those of MTP modules that did not run, keep theirs.
        """
        for router, load in zip(self.routers(), loads, strict=False):
            if router.bias is not None:
                update_balance_bias(router.bias, load, speed)

    def routers(self) -> list[Router]:
        """The routers in the order of `Output.loads`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def num_parameters(self, mtp: bool = False) -> int:
        """Parameters of the main model, balancing biases included (FACTS.md section 1.1); on request the MTP's too."""
        total = sum(p.numel() for p in self.parameters())
        return total if mtp else total - sum(p.numel() for p in self.mtp.parameters())

    def num_active_parameters(self) -> int:
        """Parameters of the main model that one token uses, embedding and head counted (FACTS.md section 1.1)."""
        routed = sum(p.numel() for m in self.layers.modules() if isinstance(m, Experts) for p in m.parameters())
        return self.num_parameters() - routed + routed * self.config.num_experts_per_tok // self.config.n_routed_experts

    def precision_report(self) -> dict[str, str]:
        """In what every layer with parameters of its own computes, by the layer's name."""
        owners = ((name, module, next(module.parameters(recurse=False), None)) for name, module in self.named_modules())
        return {
            name: getattr(module, "computes_in", str(own.dtype).removeprefix("torch."))
            for name, module, own in owners
            if own is not None
        }

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights from normal distributions.

        As published, every matrix has the standard deviation `initializer_range` (0.006; FACTS.md section 1). At
        widths in the hundreds that is far too small for the signal to pass; with `initializer_range=None` a matrix has
        1 / sqrt(fan-in), one that writes to the stream 1 / sqrt(2 * layers) of that, the embedding 1, the head
        1 / width.
        """
        published = self.config.initializer_range
        to_stream = (2 * self.config.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                continue  # norms start at 1, balancing biases at 0
            fan_in = weight.shape[1]
            std = fan_in**-0.5 * (to_stream if name.endswith(TO_STREAM) else 1)
            if name.startswith("embedding"):
                std = 1.0
            elif name.startswith("head"):
                std = 1 / fan_in
            weight.normal_(0, published or std)
