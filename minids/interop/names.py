"""What DeepSeek's release calls each tensor of a `MiniDS`, and where the two lay a tensor out differently.

One table serves both directions: `released_tensors` gives views of the model's own parameters under the released
names; saving reads them, loading writes into them. Two layouts differ: experts are stacked [expert, in, out] here and
separate [out, in] there (the views are transposed), and the MTP projection has its column halves the other way round
(`across`). Rotated pairs are neighbours (2i, 2i+1) in both, so nothing is permuted.
"""

from torch import Tensor

from minids.config import ModelConfig
from minids.model.transformer import MiniDS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = {"embedding.weight": EMBEDDING, "norm.weight": "model.norm.weight", "head.weight": HEAD}
BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.q_proj.0.weight": "self_attn.q_a_proj.weight",
    "attention.q_proj.1.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_proj.2.weight": "self_attn.q_b_proj.weight",
    "attention.kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
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


def released_name(own: str, num_hidden_layers: int) -> str:
    """The released name of a parameter; prediction module k is layer num_hidden_layers + k there."""
    if own in TOP:
        return TOP[own]
    room, i, rest = own.split(".", 2)
    if room == "layers":
        return f"model.layers.{i}.{BLOCK[rest]}"
    return f"model.layers.{num_hidden_layers + int(i)}.{MTP[rest]}"


def released_tensors(model: MiniDS) -> dict[str, Tensor]:
    """Every released name and a view of what it names in the model, in the shape that the release gives it."""
    tensors = {}
    for own, parameter in model.named_parameters():
        name = released_name(own, model.config.num_hidden_layers)
        if parameter.ndim == 3:
            tensors |= {name.format(expert=e): weight.T for e, weight in enumerate(parameter.detach())}
        else:
            tensors[name] = parameter.detach()
    return tensors


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """The release repeats embedding and head in every prediction layer: {name of the copy: name of the original}."""
    first = config.num_hidden_layers
    return {
        f"model.layers.{i}.{name}": original
        for i in range(first, first + config.num_nextn_predict_layers)
        for name, original in {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD}.items()
    }


def across(name: str, tensor: Tensor) -> Tensor:
    """Carry the values of a tensor over the border, in either direction.

    The MTP projection reads [hidden; embedding] here, as in the paper, and [embedding; hidden] in the release, so the
    halves of its columns change places (PITFALLS 17).
    """
    return tensor.roll(tensor.shape[1] // 2, dims=1) if name.endswith(".eh_proj.weight") else tensor
