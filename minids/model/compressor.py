"""Compression of the cache along the sequence: a block of tokens becomes one entry (V4; FACTS.md section 10).

Each token has a content C and logits Z, both as wide as an entry. The entry of block i is a weighted mean of the
contents of its m tokens, with weights of its own for every channel:

    entry_i = RMSNorm(sum_j softmax_j(Z_j + B_j) * C_j),        B_j learned per place in the block,

rotated (RoPE) at the position i * m of its first token. With overlap (CSA) each token has two series of C and Z: one
for its own block, one for the next. An entry then mixes 2m tokens, its block and the one before, by one softmax.

Notable choices:
- in the released weights the first half of the channels is the series for the *next* block, the second half that for
  the token's own, and so it is here;
- an entry can be seen by a token only when its block is complete, so what is computed for an unfinished block does not
  matter: it is written anew with every token. No shape depends on where in a block a sequence is;
- of single tokens the cache keeps C and Z of the last m tokens (2m with overlap), in a ring: what an entry that is yet
  to be completed is made of.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from minids.config import ModelConfig
from minids.model.kv_cache import AttentionContext, write_ring
from minids.model.layers import KeptInFloat32, RMSNorm, at_least_float32
from minids.model.rope import rotate, rotations


def rotate_last(
    x: Float[Tensor, "batch seq heads dim"], rotation: Complex[Tensor, "batch seq 1 pairs"]
) -> Float[Tensor, "batch seq heads dim"]:
    """Rotate the neighbouring pairs among the last 2 * pairs channels; the channels before them stay."""
    still = x.shape[-1] - 2 * rotation.shape[-1]
    return torch.cat((x[..., :still], rotate(x[..., still:].contiguous(), rotation)), -1)


def rope_config(config: ModelConfig) -> ModelConfig:
    """Return a config with the rotary base and the YaRN of the layer: those of layers with entries, or of the others.

    Queries, window and entries of a layer have the same.
    """
    if config.attention == "window":
        return config.replace(rope_scaling=None)
    return config.replace(rope_theta=config.compress_rope_theta)


def complete_blocks(positions: Int[Tensor, "batch seq"], block: int, blocks: int) -> Bool[Tensor, "batch seq blocks"]:
    """Return which blocks are complete for each query, its own token included: i < floor((t + 1) / m)."""
    return torch.arange(blocks, device=positions.device) < ((positions + 1) // block)[..., None]


class Compressor(KeptInFloat32):
    """One entry of `width` channels for each `block` of tokens, with `overlap` also of the tokens of the block before.

    Its cache consists of the ring of `tokens` single tokens, each `state_width` wide, and of the entries.
    """

    def __init__(self, config: ModelConfig, width: int, block: int, overlap: bool):
        super().__init__()
        self.width, self.block = width, block
        self.before = 1 if overlap else 0  # blocks before its own that an entry also mixes
        series = 1 + self.before
        self.tokens, self.state_width = series * block, 2 * series * width
        self.rope, self.rope_dim = rope_config(config), config.qk_rope_head_dim
        self.content_proj = nn.Linear(config.hidden_size, series * width, bias=False)
        self.logit_proj = nn.Linear(config.hidden_size, series * width, bias=False)
        self.place_bias = nn.Parameter(torch.zeros(block, series * width))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: AttentionContext, cache: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "batch blocks width"]:
        """Return the entries of all blocks that are complete for the longest sequence; update the cache in place."""
        states = torch.cat((self.content_proj(x), self.logit_proj(x)), -1)
        if context.mask is None:  # the sequences begin here
            longest = x.shape[1]
            begun = torch.zeros_like(context.positions[:, 0])
            blocks = F.pad(states[:, : longest // self.block * self.block], (0, 0, self.before * self.block, 0))
        else:
            assert cache is not None
            longest = context.mask.shape[-1]
            begun = context.positions[:, 0] // self.block
            blocks = self.with_cached(states, cache[0], context.positions[:, 0])
        new = self.pool(blocks, begun).to(x.dtype)
        if cache is None:
            return new
        ring, entries = cache
        write_ring(ring, context, states)
        numbers = begun[:, None] + torch.arange(new.shape[1], device=x.device)
        entries[context.sequence, numbers] = new.detach().to(entries.dtype)
        return entries[:, : longest // self.block].to(x.dtype)

    def with_cached(
        self,
        states: Float[Tensor, "batch seq state"],
        ring: Float[Tensor, "batch tokens state"],
        start: Int[Tensor, "batch"],
    ) -> Float[Tensor, "batch within state"]:
        """Return the tokens of all blocks that new tokens may belong to, with overlap after those of the one before.

        Places after the last token, and before the first one, hold anything.
        """
        seq, held = states.shape[1], ring.shape[1]
        touched = (seq + self.block - 2) // self.block + 1  # at most, wherever in its block a sequence is
        places = torch.arange((touched + self.before) * self.block, device=states.device)
        positions = (start // self.block - self.before)[:, None] * self.block + places  # [batch, within]
        new = positions - start[:, None]  # index in `states`, negative for cached tokens
        index = torch.where(new < 0, positions % held, held + new.clamp(max=seq - 1))
        both = torch.cat((ring.to(states.dtype), states), 1)
        return both.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))

    def pool(
        self, states: Float[Tensor, "batch within state"], first: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch blocks width"]:
        """Compute the entries of consecutive blocks from `first` on; with overlap the block before comes with them."""
        content, logits = rearrange(states, "b (i m) c -> b i m c", m=self.block).chunk(2, -1)
        logits = at_least_float32(logits) + self.place_bias
        number = first[:, None] + torch.arange(content.shape[1] - self.before, device=states.device)
        if self.before:
            content, logits = self.overlapping(content), self.overlapping(logits)
            nothing = (number == 0)[..., None, None]  # before block 0
            before = logits[:, :, : self.block].masked_fill(nothing, -torch.inf)
            logits = torch.cat((before, logits[:, :, self.block :]), 2)
        entry = self.norm((logits.softmax(2) * content).sum(2).to(states.dtype))  # softmax over tokens
        rotation = rotations(self.rope, number * self.block, self.rope_dim, states.dtype)
        return rotate_last(entry[:, :, None], rotation)[:, :, 0]

    def overlapping(
        self, series: Float[Tensor, "batch blocks place both"]
    ) -> Float[Tensor, "batch following two_blocks width"]:
        """Line up the first series of each block with the second series of the next block."""
        return torch.cat((series[:, :-1, :, : self.width], series[:, 1:, :, self.width :]), 2)
