"""Tensor names and layouts of DeepSeek's releases for the parameters of a `MiniDS`.

One table serves both directions: `released_tensors` returns views of the model's parameters under the released names;
saving reads the views, loading writes into them. Two layouts differ: experts are stacked [expert, in, out] in minids
and separate [out, in] in the release (the views are transposed), and the column halves of the MTP projection are
swapped (`across`). MLA's RoPE rotates adjacent pairs (2i, 2i+1) in both, so no channels are permuted.
"""

import re

from torch import Tensor

from minids.config import ModelConfig
from minids.model.transformer import MiniDS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = {"embedding.weight": EMBEDDING, "norm.weight": "model.norm.weight", "head.weight": HEAD}
BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.q_down_proj.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_up_proj.weight": "self_attn.q_b_proj.weight",
    "attention.kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "attention.indexer.q_proj.weight": "self_attn.indexer.wq_b.weight",
    "attention.indexer.k_proj.weight": "self_attn.indexer.wk.weight",
    "attention.indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "attention.indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "attention.indexer.head_weights": "self_attn.indexer.weights_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate_proj.weight": "mlp.gate_proj.weight",
    "ffn.up_proj.weight": "mlp.up_proj.weight",
    "ffn.down_proj.weight": "mlp.down_proj.weight",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.router.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.up_proj.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.down_proj.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.experts.gate_proj": "mlp.experts.{expert}.gate_proj.weight",
    "ffn.experts.up_proj": "mlp.experts.{expert}.up_proj.weight",
    "ffn.experts.down_proj": "mlp.experts.{expert}.down_proj.weight",
}
MTP = {
    "hidden_norm.weight": "hnorm.weight",
    "embedding_norm.weight": "enorm.weight",
    "proj.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
} | {f"block.{own}": released for own, released in BLOCK.items()}

BUFFER = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
"""Tensors in some checkpoints that every reader recomputes from config.json."""


def released_name(own: str, num_hidden_layers: int) -> str:
    """Return the released name of a parameter; MTP module k is layer num_hidden_layers + k there."""
    if own in TOP:
        return TOP[own]
    part, i, rest = own.split(".", 2)
    if part == "layers":
        return f"model.layers.{i}.{BLOCK[rest]}"
    return f"model.layers.{num_hidden_layers + int(i)}.{MTP[rest]}"


def released_tensors(model: MiniDS) -> dict[str, Tensor]:
    """Map every released name to a view of the model's parameter, in the released shape."""
    tensors: dict[str, Tensor] = {}
    for own, parameter in model.named_parameters():
        name = released_name(own, model.config.num_hidden_layers)
        if parameter.ndim == 3:
            tensors |= {name.format(expert=e): weight.T for e, weight in enumerate(parameter.detach())}
        else:
            tensors[name] = parameter.detach()
    return tensors


def released_in_fp8(name: str) -> bool:
    """Whether DeepSeek's releases store a tensor in FP8 (docs/ERRATA.md): the matrices of attention and feed-forward.

    The embedding, the head, the gate, the norms, the MTP projection and the indexer's head weights are in BF16, the
    balancing bias in FP32.
    """
    return is_layer_matrix(name) and not name.endswith((".eh_proj.weight", ".weights_proj.weight"))


def is_layer_matrix(name: str) -> bool:
    """Whether a released name is that of a matrix of a layer but its gate: those that FP8 checkpoints may quantise."""
    return "_proj" in name or name.endswith((".indexer.wq_b.weight", ".indexer.wk.weight"))


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Map copies to originals: the release repeats embedding and head in every MTP layer."""
    first = config.num_hidden_layers
    return {
        f"model.layers.{i}.{name}": original
        for i in range(first, first + config.num_nextn_predict_layers)
        for name, original in {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD}.items()
    }


def across(name: str, tensor: Tensor) -> Tensor:
    """Convert the values of a tensor between minids and the release, in either direction.

    The input of the MTP projection is [hidden; embedding] in minids, as in the paper, and [embedding; hidden] in the
    release, so the halves of its columns are swapped (PITFALLS 17).
    """
    return tensor.roll(tensor.shape[1] // 2, dims=1) if name.endswith(".eh_proj.weight") else tensor
