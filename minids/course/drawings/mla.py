"""Multi-head latent attention, expanded as it is trained and absorbed as it generates; what is cached is shaded."""

from minids.config import ModelConfig
from minids.cost import kv_values_per_layer
from minids.course.diagrams import Diagram, shape


def mla_expanded(config: ModelConfig | None = None) -> Diagram:
    """Draw MLA with the keys and values of every head made from the latent (V3 eq. 1-11)."""
    c = config or ModelConfig.preset("v3")
    heads, nope, rope, value = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    d = Diagram(17.2, 9.9, f"MLA caches one latent and one rotated key per token, for all {heads} heads")
    _cached(d, c, "cached per token:")

    d.box("h", 6.2, 0.6, "$h_t$", shape(c.hidden_size), width=2.6)
    query = "h"
    if c.q_lora_rank:
        d.box("cq", 2.5, 3.0, "$c^Q$", shape(c.q_lora_rank), width=2.2)
        d.arrow("h", "cq", "$W^{DQ}$, norm", bend=1.6)
        query = "cq"
    d.box("latent", 9.0, 3.0, "$c^{KV}$", shape(c.kv_lora_rank), "cache", 2.4)
    d.box("kr", 13.2, 3.0, "$k^R$", shape(rope), "cache", 1.9)
    d.arrow("h", "latent", "$W^{DKV}$, norm", bend=1.6)
    d.arrow("h", "kr", "$W^{KR}$, RoPE", bend=1.6)

    d.box("qc", 1.3, 5.4, "$q^C$", shape(heads, nope))
    d.box("qr", 3.7, 5.4, "$q^R$", shape(heads, rope))
    d.box("kc", 7.7, 5.4, "$k^C$", shape(heads, nope), width=2.1)
    d.box("v", 10.3, 5.4, "$v^C$", shape(heads, value), width=2.1)
    d.arrow(query, "qc", "$W^{UQ}$", bend=4.2)
    d.arrow(query, "qr", "$W^{QR}$, RoPE", bend=4.2)
    d.arrow("latent", "kc", "$W^{UK}$", bend=4.2)
    d.arrow("latent", "v", "$W^{UV}$", bend=4.2)

    softmax = f"softmax$((q^C k^C + q^R k^R)\\,/$√{c.qk_head_dim}$)\\;v^C$"
    d.box("attention", 7.2, 7.3, softmax, "in each head", "operation", 13.6)
    for name in ("qc", "qr", "kc", "v", "kr"):
        d.arrow(name, "attention", at=d.boxes[name].x)
    d.note(13.4, 5.4, "one key\nfor all heads")
    d.note(11.55, 5.4, "not stored")
    d.box("u", 7.2, 9.1, f"$u_t = W^O [o_1 \\ldots o_{{{heads}}}]$", shape(c.hidden_size), width=4.4)
    d.arrow("attention", "u", f"$o_i$: {shape(heads, value)}")
    return d


def mla_absorbed(config: ModelConfig | None = None) -> Diagram:
    """Draw one decode step of absorbed MLA: attention over the cached latents themselves."""
    c = config or ModelConfig.preset("v3")
    heads, rank, rope = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    d = Diagram(17.2, 9.9, "Absorbed, the query enters the latent space: no key and no value is formed")
    _cached(d, c, "cached per token:")

    d.box("query", 3.7, 0.6, "$q^C$, $q^R$ of the new token", shape(heads, c.qk_head_dim), width=5.0)
    d.box("qc", 2.4, 3.0, "$q^C$", shape(heads, c.qk_nope_head_dim), width=2.2)
    d.box("qr", 5.0, 3.0, "$q^R$", shape(heads, rope), width=2.0)
    d.box("latent", 9.0, 3.0, "$c^{KV}$", shape("s", rank), "cache", 2.4)
    d.box("kr", 13.2, 3.0, "$k^R$", shape("s", rope), "cache", 1.9)
    d.arrow("query", "qc")
    d.arrow("query", "qr")

    d.box("latent query", 2.4, 5.0, "$\\tilde q$, a latent query", shape(heads, rank), width=3.2)
    d.arrow("qc", "latent query", "$W^{UK\\top}$")
    softmax = f"softmax$((\\tilde q\\, c^{{KV}} + q^R k^R)\\,/$√{c.qk_head_dim}$)\\;c^{{KV}}$"
    d.box("attention", 7.2, 6.7, softmax, "every head reads the same latents", "operation", 13.6)
    for name in ("latent query", "qr", "latent", "kr"):
        d.arrow(name, "attention", at=d.boxes[name].x)
    d.note(9.15, 4.8, "as key\nand as value")
    d.box("context", 2.4, 8.6, "Σ $p\\,c^{KV}$ of each head", shape(heads, rank), width=3.2)
    d.box("o", 7.4, 8.6, "$o_i$", shape(heads, c.v_head_dim), width=2.4)
    d.box("u", 12.4, 8.6, "$u_t$", shape(c.hidden_size), width=2.4)
    d.arrow("attention", "context", at=2.4, bend=7.6)
    d.arrow("context", "o", "$W^{UV}$")
    d.arrow("o", "u", "$W^O$")
    return d


def _cached(d: Diagram, c: ModelConfig, label: str) -> None:
    """Draw the frame of the cache, and what it holds against MHA."""
    mha = c.replace(attention="gqa", num_key_value_heads=c.num_attention_heads)
    d.frame(7.4, 2.35, 14.6, 3.65, "")
    d.note(14.8, 3.45, label, strong=True)
    d.note(14.8, 2.98, f"{kv_values_per_layer(c):,} values", strong=True, size=10)
    d.note(14.8, 2.5, f"MHA: {kv_values_per_layer(mha):,}", strong=True)
