"""Multi-head latent attention, expanded as it is trained and absorbed as it generates; what is cached is shaded.

And the task on which chapter 02 compares it with shared keys: look-ups by different attributes.
"""

from minids.config import ModelConfig
from minids.cost import kv_values_per_layer
from minids.course.diagrams import INK, Diagram, shape
from minids.course.lookups import ATTRIBUTES, ITEMS, KINDS


def mla_expanded(config: ModelConfig | None = None) -> Diagram:
    """Draw MLA with the keys and values of every head made from the latent (V3 eq. 1-11)."""
    c = config or ModelConfig.preset("v3")
    heads, nope, rope, value = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    d = Diagram(17.6, 9.9, f"Expanded: {heads} heads form keys and values of their own from one cached latent")
    _cached(d, c)

    d.box("h", 6.2, 0.6, "$h_t$", shape(c.hidden_size), width=2.6)
    query = "h"
    if c.q_lora_rank:
        d.box("cq", 2.5, 3.0, "$c^Q$", shape(c.q_lora_rank), width=2.2)
        d.arrow("h", "cq", "$W^{DQ}$, norm", bend=1.6)
        query = "cq"
    d.box("latent", 9.0, 3.0, "latent $c^{KV}$", shape(c.kv_lora_rank), "cache", 2.4)
    d.box("kr", 13.2, 3.0, "key $k^R$", shape(rope), "cache", 1.9)
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
    d.note(13.4, 5.4, "one rotated key for all heads:\nin the scores, not in the values")
    d.note(11.55, 5.4, "formed,\nnot stored")
    d.box("u", 7.2, 9.1, f"$u_t = W^O [o_1 \\ldots o_{{{heads}}}]$", shape(c.hidden_size), width=4.4)
    d.arrow("attention", "u", f"$o_i$: {shape(heads, value)}")
    return d


def mla_absorbed(config: ModelConfig | None = None) -> Diagram:
    """Draw one decode step of absorbed MLA: attention over the cached latents themselves."""
    c = config or ModelConfig.preset("v3")
    heads, rank, rope = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    d = Diagram(17.6, 9.9, "Absorbed: the heads attend to the cached latents, and no key or value is formed")
    _cached(d, c)

    d.box("query", 3.7, 0.6, "$q^C$, $q^R$ of the new token", shape(heads, c.qk_head_dim), width=5.0)
    d.box("qc", 2.4, 3.0, "$q^C$", shape(heads, c.qk_nope_head_dim), width=2.2)
    d.box("qr", 5.0, 3.0, "$q^R$", shape(heads, rope), width=2.0)
    d.box("latent", 9.0, 3.0, "latents $c^{KV}$", shape("s", rank), "cache", 2.4)
    d.box("kr", 13.2, 3.0, "keys $k^R$", shape("s", rope), "cache", 1.9)
    d.note(9.0, 1.9, "of all s tokens, the new one's too", align="center")
    d.arrow("query", "qc")
    d.arrow("query", "qr")

    d.box("latent query", 2.4, 5.0, "$\\tilde q$, a latent query", shape(heads, rank), width=3.2)
    d.arrow("qc", "latent query", "$W^{UK\\top}$")
    softmax = f"softmax$((\\tilde q\\, c^{{KV}} + q^R k^R)\\,/$√{c.qk_head_dim}$)\\;c^{{KV}}$"
    d.box("attention", 7.2, 6.7, softmax, "every head reads the same latents", "operation", 13.6)
    for name in ("latent query", "qr", "latent", "kr"):
        d.arrow(name, "attention", at=d.boxes[name].x)
    d.note(9.15, 4.8, "as key\nand as value")
    d.note(13.35, 4.8, "in the scores only")
    d.box("context", 2.4, 8.6, "Σ $p\\,c^{KV}$ of each head", shape(heads, rank), width=3.2)
    d.box("o", 7.4, 8.6, "$o_i$", shape(heads, c.v_head_dim), width=2.4)
    d.box("u", 12.4, 8.6, "$u_t$", shape(c.hidden_size), width=2.4)
    d.arrow("attention", "context", at=2.4, bend=7.6)
    d.arrow("context", "o", "$W^{UV}$")
    d.arrow("o", "u", "$W^O$")
    return d


def lookup_task() -> Diagram:
    """Draw a query of the look-up task, and the keys that GQA and MLA have for it with equal caches."""
    gqa, mla = KINDS["GQA, 2 key heads"], KINDS["MLA, rank 24 + 8"]
    heads, groups = gqa.num_attention_heads, gqa.num_key_value_heads
    cached = kv_values_per_layer(mla)
    used = 2 * gqa.v_head_dim
    d = Diagram(17.2, 6.9, f"Of {cached} cached values a head of GQA uses {used}, a head of MLA all {cached}")
    items = {1: (3, 11, 7, 0), 2: (9, 4, 2, 14), 3: (5, 7, 13, 6), ITEMS: (12, 0, 4, 9)}
    d.note(3.85, 6.3, f"{ITEMS} items with {ATTRIBUTES} attributes", align="center", size=9.5)
    for number, (item, attributes) in enumerate(items.items()):
        y = 5.4 - 0.95 * number - 0.35 * (item == ITEMS)
        d.note(0.2, y, f"item {item}")
        for a, value in enumerate(attributes):
            found = item == 3 and a in (1, 3)
            d.box(f"{item} {a}", 2.2 + 1.1 * a, y, f"{value}", "", "here" if found else "tensor", 0.95, 0.7)
    d.note(3.85, 2.72, "...", align="center")
    d.note(0.2, 0.75, "query")
    for a, words in enumerate(("", "7", "", "?")):
        d.box(f"query {a}", 2.2 + 1.1 * a, 0.75, words, "", "operation" if words else "idle", 0.95, 0.7)
    d.note(6.3, 0.75, "the item whose second attribute is 7: what is its fourth?  6")

    width = gqa.v_head_dim
    d.note(7.4, 6.3, f"GQA: {groups} keys and values, each shared by {heads // groups} heads", size=9.5)
    for group in range(groups):
        left = 8.3 + 4.6 * group
        d.box(f"k {group}", left, 4.35, f"$k_{group + 1}$", shape(width), "cache", 1.6, 0.8)
        d.box(f"v {group}", left + 1.8, 4.35, f"$v_{group + 1}$", shape(width), "cache", 1.6, 0.8)
        first = group * heads // groups + 1
        words = f"heads {first} to {first + heads // groups - 1}"
        d.box(f"heads {group}", left + 0.9, 5.5, words, "", "tensor", 4.2, 0.7)
        d.path([(left + 0.9, 4.75), (left + 0.9, 5.13)])
    d.note(7.4, 3.45, "MLA: a key and a value for each head, from one latent", size=9.5)
    d.box("latent", 10.3, 1.65, "latent $c^{KV}$", shape(mla.kv_lora_rank), "cache", 3.6, 0.8)
    d.box("rotated", 14.0, 1.65, "$k^R$", shape(mla.qk_rope_head_dim), "cache", 1.6, 0.8)
    for head in range(heads):
        x = 7.9 + 1.15 * head
        d.box(f"key {head}", x, 2.85, f"$k_{head + 1}, v_{head + 1}$", "", "idle", 1.05, 0.6)
        d.path([(10.3, 2.05), (10.3, 2.2), (x, 2.2), (x, 2.55)])
    d.axes.plot((14.0, 14.0), (2.05, 2.2), color=INK, linewidth=1.0, zorder=2)
    return d


def _cached(d: Diagram, c: ModelConfig) -> None:
    """Draw the frame of the cache, and what it holds against MHA."""
    mha = kv_values_per_layer(c.replace(attention="gqa", num_key_value_heads=c.num_attention_heads))
    values = kv_values_per_layer(c)
    d.frame(7.4, 2.35, 14.6, 3.65, "")
    d.note(14.8, 3.7, "cached per token\nand layer:", strong=True)
    d.note(14.8, 3.03, f"{values:,} values", strong=True, size=10)
    d.note(14.8, 2.36, f"MHA: {mha:,},\n{mha / values:.0f} times as many", strong=True)
