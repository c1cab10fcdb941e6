"""Fused decoding: one decoding step of MLA that reads each weight once, written for a compiler (`compiled.py`).

A decoding step at batch 1 multiplies every matrix with one vector: two operations per weight, which a processor does
faster than its memory delivers the weight. The lower limit of a step's time is therefore

    (bytes of all weights that the step uses) / (bandwidth of the memory),

and everything else is overhead: starting several hundred kernels, writing their results to memory, copying the
matrices of the chosen experts before multiplying with them. A compiler removes it from a step written as follows.

Notable choices:
- a product of a matrix and a vector is written as products and a sum. That is all it costs anyway, and so the compiler
  fuses it with the operations around it, and with the selection of the chosen experts, whose matrices are not copied;
- matrices that read the same vector are one matrix (gate and up; both down projections of MLA). Of two matrices in
  sequence the product is stored where it is smaller: W^UK and W^UQ, W^O and W^UV (V2 section 2.1.2);
- the cache is static, one tensor that is allocated once; its slots come first, so that the slots in use are contiguous;
- a step is a function of weights, tokens, positions and cache; it returns the new cache entries and changes nothing.
  Only the config is compiled into it: it serves all weights of a config, and every length of the cache;
- arithmetic is in float32 (or float64) for weights of 16 bits too: they are converted as they are read.

The prompt is processed by `generate.prefill`: with many tokens the weights are read once per prompt, not per token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minids.model.block import Block
from minids.model.layers import ModuleList, SwiGLU
from minids.model.layers import at_least_float32 as wide
from minids.model.mla import MultiHeadLatentAttention
from minids.model.moe import AllExpertsHere, Experts, GroupedSwiGLU, MoE
from minids.model.rope import rotations
from minids.model.transformer import MiniDS

FEW_ROWS = 8  # above, a matrix product reads its matrix fewer times than once per row


def matvec(matrix: Float[Tensor, "*stack out in"], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*outs"]:
    """Multiply each vector by the matrix, or by its own matrix of a stack; for few rows as products and a sum."""
    if matrix.ndim == 2 and x.shape[:-1].numel() > FEW_ROWS and matrix.dtype == x.dtype:
        return F.linear(x, matrix)
    x = x.contiguous()
    x = x.as_strided(x.shape, x.stride())  # has the compiler store x, which it would else compute again for each output
    return (matrix.to(x.dtype) * x.unsqueeze(-2)).sum(-1)


def rotate(
    x: Float[Tensor, "batch seq heads rope"],
    cos: Float[Tensor, "batch seq 1 pairs"],
    sin: Float[Tensor, "batch seq 1 pairs"],
) -> Float[Tensor, "batch seq heads rope"]:
    """Rotate adjacent pairs of channels as `rope.rotate` does, in real numbers: compilers know no complex ones."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def hold(module: nn.Module, **matrices: Tensor | None) -> None:
    """Keep tensors in a module's `state_dict`, contiguous as they will be read."""
    for name, matrix in matrices.items():
        module.register_buffer(name, None if matrix is None else matrix.contiguous())


class FusedAttention(nn.Module):
    """MLA in the absorbed form: all heads attend to the cached latents (`mla.MultiHeadLatentAttention.absorbed`)."""

    down: Float[Tensor, "ranks dim"]  # to the query latent and the cache entry
    query: Float[Tensor, "heads_times_query q_rank"]
    key_up: Float[Tensor, "heads kv_rank nope"] | None  # None: contained in `query`
    value_up: Float[Tensor, "heads value kv_rank"] | None  # None: contained in `out`
    out: Float[Tensor, "dim heads_times_value"]

    def __init__(self, attention: MultiHeadLatentAttention):
        super().__init__()
        self.heads, self.kv_rank, self.rope_dim = attention.heads, attention.kv_rank, attention.rope_dim
        self.scale, self.kv_norm = attention.scale, attention.kv_norm
        down: Tensor = attention.kv_down_proj.weight
        if attention.q_lora_rank is None:
            self.q_rank, query = 0, attention.q_proj.weight
        else:
            self.q_rank, query, self.q_norm = attention.q_lora_rank, attention.q_up_proj.weight, attention.q_norm
            down = torch.cat((attention.q_down_proj.weight, down))  # both read the residual stream
        up = attention.kv_up_proj.weight.unflatten(0, (self.heads, -1))  # [heads, nope + value, kv_rank]
        key_up, value_up = up[:, : attention.nope_dim].mT, up[:, attention.nope_dim :]
        nope, rope = query.unflatten(0, (self.heads, -1)).split((attention.nope_dim, self.rope_dim), 1)
        merged = torch.einsum("hrn,hnq->hrq", wide(key_up), wide(nope)).to(query.dtype)
        merge_keys = merged.numel() <= key_up.numel() + nope.numel()
        hold(self, query=torch.cat((merged, rope), 1).flatten(0, 1) if merge_keys else query)
        hold(self, down=down, key_up=None if merge_keys else key_up)

        out = attention.o_proj.weight.unflatten(1, (self.heads, -1))
        merged = torch.einsum("dhv,hvr->dhr", wide(out), wide(value_up)).to(out.dtype)
        merge_values = merged.numel() <= value_up.numel() + out.numel()
        hold(self, out=(merged if merge_values else out).flatten(1), value_up=None if merge_values else value_up)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rotation: tuple[Tensor, Tensor],
        cache: Float[Tensor, "slots batch entry"],
        unseen: Float[Tensor, "batch 1 seq slots_plus_seq"],
    ) -> tuple[Float[Tensor, "batch seq dim"], Float[Tensor, "batch seq entry"]]:
        """Attend to the cached entries and to those of the new tokens; return the output and the new entries."""
        q_latent, latent, key_rope = matvec(self.down, x).split((self.q_rank, self.kv_rank, self.rope_dim), -1)
        entry = torch.cat((self.kv_norm(latent), rotate(key_rope[:, :, None], *rotation)[:, :, 0]), -1)
        query = matvec(self.query, self.q_norm(q_latent) if self.q_rank else x).unflatten(-1, (self.heads, -1))
        query, query_rope = query[..., : -self.rope_dim], query[..., -self.rope_dim :]  # [batch, seq, heads, ...]
        if self.key_up is not None:
            query = matvec(self.key_up, query)
        query = torch.cat((query, rotate(query_rope, *rotation)), -1)

        cache, slots = cache.to(x.dtype), cache.shape[0]
        scores = torch.cat(
            (torch.einsum("bthw,sbw->bhts", query, cache), torch.einsum("bthw,bsw->bhts", query, entry)), -1
        )
        chances = (scores * self.scale + unseen).softmax(-1)  # [batch, heads, seq, slots + seq]
        latents, new_latents = cache[..., : self.kv_rank], entry[..., : self.kv_rank]
        out = torch.einsum("bhts,sbr->bthr", chances[..., :slots], latents)
        out = out + torch.einsum("bhts,bsr->bthr", chances[..., slots:], new_latents)
        if self.value_up is not None:
            out = matvec(self.value_up, out)
        return matvec(self.out, out.flatten(-2)), entry


def swiglu(
    x: Float[Tensor, "*rows dim"],
    gate_up: Float[Tensor, "*stack two_inner dim"],
    down: Float[Tensor, "*stack dim inner"],
    weight: Float[Tensor, "*outs 1"] | float = 1.0,
) -> Float[Tensor, "*outs dim"]:
    """Compute the gated feed-forward; the gate weight of an expert multiplies its inner activations."""
    gate, up = matvec(gate_up, x).chunk(2, -1)
    return matvec(down, F.silu(gate) * up * weight)


class FusedSwiGLU(nn.Module):
    """A dense feed-forward, or the shared experts; gate and up are one matrix."""

    gate_up: Float[Tensor, "two_inner dim"]
    down: Float[Tensor, "dim inner"]

    def __init__(self, ffn: SwiGLU):
        super().__init__()
        hold(self, gate_up=torch.cat((ffn.gate_proj.weight, ffn.up_proj.weight)), down=ffn.down_proj.weight)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        return swiglu(x, self.gate_up, self.down)


class FusedMoE(nn.Module):
    """A mixture of experts of which only the chosen ones are read; transposed, so that each sum is over neighbours."""

    gate_up: Float[Tensor, "experts two_inner dim"]
    down: Float[Tensor, "experts dim inner"]

    def __init__(self, moe: MoE):
        super().__init__()
        self.router, self.shared = moe.router, None if moe.shared is None else FusedSwiGLU(moe.shared)
        hold(
            self, gate_up=torch.cat((moe.experts.gate_proj, moe.experts.up_proj), -1).mT, down=moe.experts.down_proj.mT
        )

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        routing = self.router(x)
        chosen, weights = routing.experts, routing.weights.to(x.dtype)[..., None]  # [batch, seq, k], [batch, seq, k, 1]
        # The selected matrices [batch, seq, k, out, in] are never stored: the compiler reads them where they are.
        out = swiglu(x[:, :, None], self.gate_up[chosen], self.down[chosen], weights).sum(2)
        return out if self.shared is None else out + self.shared(x)


class FusedBlock(nn.Module):
    """One transformer layer, as `block.Block`."""

    def __init__(self, block: Block):
        super().__init__()
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        assert isinstance(block.attention, MultiHeadLatentAttention)  # `check_model`
        self.attention = FusedAttention(block.attention)
        self.ffn = FusedMoE(block.ffn) if isinstance(block.ffn, MoE) else FusedSwiGLU(block.ffn)

    def forward(self, x: Float[Tensor, "batch seq dim"], *context: Any) -> tuple[Tensor, Tensor]:
        """Return the residual stream and the new cache entries; `context` as in `FusedAttention`."""
        out, entry = self.attention(self.attention_norm(x), *context)
        x = x + out
        return x + self.ffn(self.ffn_norm(x)), entry


class FusedStep(nn.Module):
    """One decoding step of a batch as a function of tokens, positions and cache. A snapshot of the model's weights."""

    cos: Float[Tensor, "context 1 pairs"]
    sin: Float[Tensor, "context 1 pairs"]

    @torch.no_grad()
    def __init__(self, model: MiniDS):
        """Merge the matrices of `model`. Raises `ValueError` for other attention than MLA, and for experts in FP8."""
        super().__init__()
        check_model(model)
        self.embedding, self.norm, self.head = model.embedding, model.norm, model.head
        self.layers: ModuleList[FusedBlock] = ModuleList(FusedBlock(block) for block in model.layers)
        dtype = torch.promote_types(model.head.weight.dtype, torch.float32)
        positions = torch.arange(model.config.max_position_embeddings, device=model.head.weight.device)
        rotation = rotations(model.config, positions[None], model.config.qk_rope_head_dim, dtype)[0]
        hold(self, cos=rotation.real, sin=rotation.imag)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
        cache: Float[Tensor, "slots layers batch entry"],
    ) -> tuple[Float[Tensor, "batch seq vocab"], Float[Tensor, "batch seq layers entry"]]:
        """Return the logits after each token, and the tokens' cache entries, which the caller writes into the cache.

        A token attends to the slots below the position of its sequence's first new token, and to the new tokens up to
        itself.
        """
        hidden, entries = self.trunk(tokens, positions, cache)
        return self.logits(hidden), entries

    def trunk(self, tokens: Tensor, positions: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream before the final norm, and the new cache entries."""
        x, entries = wide(self.embedding(tokens)), []
        context = self.context(positions, cache, x.dtype)
        for layer, layer_cache in zip(self.layers, cache.unbind(1), strict=True):
            x, entry = layer(x, context[0], layer_cache, context[1])
            entries.append(entry)
        return x, torch.stack(entries, 2)

    def logits(self, hidden: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq vocab"]:
        """Apply the final norm and the output head."""
        return matvec(self.head.weight, self.norm(hidden))

    def context(self, positions: Int[Tensor, "batch seq"], cache: Tensor, dtype: torch.dtype) -> tuple[tuple, Tensor]:
        """Return the rotations of the new tokens, and the mask that is added to their scores."""
        batch, seq = positions.shape
        later = torch.ones(seq, seq, dtype=torch.bool, device=positions.device).triu(1).expand(batch, seq, seq)
        unused = torch.arange(cache.shape[0], device=positions.device) >= positions[:, :1, None]
        unseen = torch.cat((unused.expand(-1, seq, -1), later), -1)  # [batch, seq, slots + seq]
        mask = torch.zeros_like(unseen, dtype=dtype).masked_fill(unseen, -torch.inf)[:, None]
        return (self.cos[positions], self.sin[positions]), mask  # cosine and sine [batch, seq, 1, pairs]

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Return inputs for the compiler, which leaves open the number of slots of the last one, the cache."""
        tokens = torch.zeros(batch, 1, dtype=torch.int64)
        attention = self.layers[0].attention
        cache = self.head.weight.new_zeros(8, len(self.layers), batch, attention.kv_rank + attention.rope_dim)
        return tokens, tokens.clone(), cache

    @property
    def longest(self) -> int:
        """Number of positions that it knows the rotations of."""
        return len(self.cos)


def check_model(model: MiniDS) -> None:
    """Raise `ValueError` for a model that the fused step does not cover."""
    if model.config.attention != "mla":
        raise ValueError(f"attention={model.config.attention!r}: the fused step has mla only; decode without compiled")
    for name, plain_value in (("hc_mult", 1), ("engram", None), ("index_topk", None)):
        if (value := getattr(model.config, name)) != plain_value:
            raise ValueError(f"{name}={value!r}: the fused step has {plain_value} only; decode without compiled")
    if model.head.weight.device.type != "cpu":
        raise ValueError(
            f"device={model.head.weight.device}: the compiled step is for the CPU; decode without compiled"
        )
    plain = all(
        type(module) is nn.Linear
        or isinstance(module, Experts)
        and isinstance(module.arithmetic, GroupedSwiGLU)
        and isinstance(module.dispatcher, AllExpertsHere)
        for module in model.modules()
        if isinstance(module, nn.Linear | Experts)
    )
    if not plain:
        raise ValueError("FP8 or sharded experts: the fused step has plain weights only; decode without compiled")
