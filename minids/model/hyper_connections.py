"""Hyper-connections: n residual streams per token, read, written and mixed by weights that depend on the token.

Manifold-constrained hyper-connections (mHC, arXiv 2512.24880; in V4) replace the residual connection x + F(x) by

    x' = H_res x + H_post F(H_pre x),        x [n, dim], H_pre and H_post [n], H_res [n, n],

where H_res is doubly stochastic: its rows and columns sum to 1, so that a product of many of them neither amplifies
nor attenuates the streams. Without that constraint (hyper-connections, arXiv 2409.19606) the gain grows with depth.

Notable choices:
- the order of normalisations is that of the released V4 code, so that its weights give equal results: a softmax over
  the targets of each stream, then columns, then rows and columns in turn. `mix[j, k]` is what stream k gets of stream
  j, which is the paper's H_res transposed;
- coefficients are computed in float32, also under autocast, and their parameters stay in float32;
- at the start all streams are equal, and the model computes what it computes with a plain residual connection. The
  published initial values are unverified; here each site reads one stream more than the others, the next site the
  next one, because streams that nothing distinguishes would stay equal.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.block import Block
from minids.model.kv_cache import AttentionContext, Cache
from minids.model.layers import KeptInFloat32, RMSNorm, at_least_float32
from minids.model.moe import MoE, Routing
from minids.model.mtp import MTPModule

INITIAL_SCALE = 0.01  # of what depends on the token (unverified)
INITIAL_KEPT = 4.0  # logit by which a stream prefers to stay itself: 0.95 of it with n = 4


def sinkhorn(logits: Float[Tensor, "*rows n n"], iterations: int, eps: float) -> Float[Tensor, "*rows n n"]:
    """Return a matrix whose rows and columns sum to 1, by normalising rows and columns of exp(logits) in turn.

    The columns come last and sum to 1 up to `eps`; how close the rows come depends on `iterations` and on how uneven
    the logits are (mHC; the order is that of V4's code).
    """
    matrix = logits.movedim((-2, -1), (0, 1)).contiguous()  # [n, n, *rows]: sums over many rows at once are faster
    matrix = matrix.softmax(1) + eps
    matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    return matrix.movedim((0, 1), (-2, -1)).contiguous()


def expand(x: Float[Tensor, "batch seq dim"], streams: int) -> Float[Tensor, "batch seq n dim"]:
    """Start `streams` equal residual streams."""
    return x[:, :, None].expand(-1, -1, streams, -1)


class Coefficients(NamedTuple):
    """Weights of one site for every token, in at least float32."""

    read: Float[Tensor, "*tokens n"]  # H_pre: what the sublayer's input takes of each stream
    write: Float[Tensor, "*tokens n"]  # H_post: what each stream gets of the sublayer's output
    mix: Float[Tensor, "*tokens n n"]  # H_res transposed: what stream k (last) gets of stream j


class StreamProjection(KeptInFloat32):
    """Linear function of all streams of a token, normalised together without weights: the input of the coefficients."""

    def __init__(self, config: ModelConfig, outputs: int, scales: int):
        super().__init__()
        self.streams, self.dim, self.norm_eps = config.hc_mult, config.hidden_size, config.rms_norm_eps
        self.proj = nn.Parameter(torch.empty(outputs, self.streams * self.dim))
        self.scale = nn.Parameter(torch.full((scales,), INITIAL_SCALE))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def projected(self, streams: Float[Tensor, "*tokens n dim"]) -> Float[Tensor, "*tokens outputs"]:
        """Return the projection of RMSNorm(vec x), in at least float32."""
        flat = at_least_float32(streams).flatten(-2)
        with torch.autocast(flat.device.type, enabled=False):
            return F.linear(F.rms_norm(flat, flat.shape[-1:], eps=self.norm_eps), self.proj.to(flat.dtype))


class HyperConnection(StreamProjection):
    """One site, around an attention or a feed-forward: reads, writes and mixes the streams (mHC)."""

    def __init__(self, config: ModelConfig, site: int = 0):
        n = config.hc_mult
        super().__init__(config, n + n + n * n, scales=3)
        self.iterations, self.eps = config.hc_sinkhorn_iters, config.hc_eps
        self.bias = nn.Parameter(self.initial_bias(n, site % n, constrained=self.iterations > 0))

    @staticmethod
    def initial_bias(n: int, favourite: int, constrained: bool) -> Float[Tensor, "outputs"]:
        """Bias with which equal streams are read once in all, written once each, and mixed into equal streams."""
        read = torch.full((n,), 1 / (2 * n))
        read[favourite] = (n + 1) / (2 * n)
        keep = torch.eye(n) * (INITIAL_KEPT if constrained else 1.0)
        return torch.cat((read.logit(eps=1e-6), torch.zeros(n), keep.flatten()))

    def coefficients(self, streams: Float[Tensor, "*tokens n dim"]) -> Coefficients:
        """Compute H_pre = sigmoid + eps, H_post = 2 sigmoid and the doubly stochastic H_res of every token."""
        n = self.streams
        outputs = self.projected(streams)
        sizes = (n, n, n * n)
        read, write, mix = (
            part * scale + bias
            for part, scale, bias in zip(outputs.split(sizes, -1), self.scale, self.bias.split(sizes), strict=True)
        )
        mix = mix.unflatten(-1, (n, n))
        if self.iterations:
            mix = sinkhorn(mix, self.iterations, self.eps)
        return Coefficients(read.sigmoid() + self.eps, 2 * write.sigmoid(), mix)


def read_streams(
    streams: Float[Tensor, "*tokens n dim"], read: Float[Tensor, "*tokens n"]
) -> Float[Tensor, "*tokens dim"]:
    """Collapse the streams to the input of a sublayer, their weighted sum."""
    return (read[..., None] * streams).sum(-2).to(streams.dtype)


def write_streams(
    streams: Float[Tensor, "*tokens n dim"], out: Float[Tensor, "*tokens dim"], weights: Coefficients
) -> Float[Tensor, "*tokens n dim"]:
    """Mix the streams and add the sublayer's output, weighted, to each."""
    mixed = torch.einsum("...jk,...jd->...kd", weights.mix.to(streams.dtype), streams)
    return mixed + weights.write.to(streams.dtype)[..., None] * out[..., None, :]


class HyperBlock(Block):
    """A transformer layer on n residual streams: attention and feed-forward have a hyper-connection each."""

    def __init__(self, config: ModelConfig, dense: bool, index: int = 0):
        super().__init__(config, dense)
        self.attention_connection = HyperConnection(config, 2 * index)
        self.ffn_connection = HyperConnection(config, 2 * index + 1)

    def forward(
        self,
        x: Float[Tensor, "batch seq n dim"],
        context: AttentionContext,
        cache: Cache | None = None,
        experts: Int[Tensor, "batch seq k"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq n dim"], Routing | None]:
        weights = self.attention_connection.coefficients(x)
        out = self.attention(self.attention_norm(read_streams(x, weights.read)), context, cache)  # [batch, seq, dim]
        x = write_streams(x, out, weights)
        weights = self.ffn_connection.coefficients(x)
        h = self.ffn_norm(read_streams(x, weights.read))
        out, routing = self.ffn(h, experts) if isinstance(self.ffn, MoE) else (self.ffn(h), None)
        return write_streams(x, out, weights), routing


class CollapsingNorm(RMSNorm):
    """The norm before the output head: RMSNorm of the streams' weighted sum, with weights of its own per token (V4)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.collapse = StreamProjection(config, config.hc_mult, scales=1)
        self.collapse_eps = config.hc_eps
        with torch.no_grad():
            self.collapse.bias.copy_(torch.full((config.hc_mult,), 1 / config.hc_mult).logit(eps=1e-6))

    def read(self, streams: Float[Tensor, "*tokens n dim"]) -> Float[Tensor, "*tokens n"]:
        """Weights of the streams in the sum."""
        outputs = self.collapse.projected(streams) * self.collapse.scale + self.collapse.bias
        return outputs.sigmoid() + self.collapse_eps

    def forward(self, x: Float[Tensor, "*tokens n dim"]) -> Float[Tensor, "*tokens dim"]:
        return super().forward(read_streams(x, self.read(x)))


class HyperMTPModule(MTPModule):
    """A module of multi-token prediction on n residual streams: each is combined with the embedding (V4).

    The hidden state is that before the final collapse and norm; the module has its own collapse.
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__(config)
        self.block = HyperBlock(config, dense=config.num_moe_layers == 0, index=index)
        self.norm = CollapsingNorm(config)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq n dim"],
        embedding: Float[Tensor, "batch seq dim"],
        context: AttentionContext,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "batch seq n dim"], Routing | None]:
        embedded = expand(self.embedding_norm(embedding), hidden.shape[2])
        joined = torch.cat((self.hidden_norm(hidden), embedded), -1)  # [batch, seq, n, 2 * dim]
        return self.block(self.proj(joined), context, cache)
