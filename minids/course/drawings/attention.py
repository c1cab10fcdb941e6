"""MHA, GQA, MQA and MLA side by side: which keys and values each query head uses, and what a token leaves behind."""

from minids.config import ModelConfig
from minids.cost import kv_values_per_layer
from minids.course.diagrams import INK, Diagram, shape

DRAWN, GROUPS = 6, 2  # at most so many query heads are drawn, and of GQA so many groups


def attention_kinds(config: ModelConfig | None = None, gqa_groups: int = 8, mla: bool = True) -> Diagram:
    """Draw the four kinds for a model with MLA, or the three without it; GQA has `gqa_groups` key heads.

    Heads are numbered where all of them are drawn. Raises `ValueError` for a model with fewer than 4 heads.
    """
    c = config or ModelConfig.preset("v3")
    heads = c.num_attention_heads
    drawn = min(heads, DRAWN)
    if drawn < 4 or drawn % GROUPS:
        raise ValueError(f"num_attention_heads={heads}: the drawing needs 4, or at least {DRAWN}")

    def shared(kv_heads: int) -> int:
        return kv_values_per_layer(c.replace(attention="gqa", num_key_value_heads=kv_heads))

    if mla:
        ratio = shared(heads) / kv_values_per_layer(c)
        title = f"MLA: own keys and values in every head, from a cache {ratio:.0f} times smaller than MHA's"
    else:
        title = f"Sharing keys and values divides the cache: by {heads // gqa_groups} in GQA, by {heads} in MQA"
    d = Diagram(17.2 if mla else 13.45, 6.9, title)
    d.frame(1.9, 0.9, 17.0 if mla else 13.25, 2.55, "")
    for y, words in ((5.0, "queries"), (3.3, "from the latent,\nnot stored" if mla else ""), (1.6, "cached")):
        d.note(0.2, y, words, strong=words == "cached")
    d.note(0.2, 6.15, f"{drawn} query heads" if drawn == heads else f"{drawn} of {heads}\nheads drawn")
    d.note(0.2, 0.4, "values per\ntoken and layer")
    panels = (
        ("MHA", f"{heads} key heads", drawn, heads),
        ("GQA", f"{gqa_groups} key heads", GROUPS, gqa_groups),
        ("MQA", "1 key head", 1, 1),
    )
    for number, (name, words, keys, kv_heads) in enumerate(panels):
        left = 2.1 + 3.75 * number
        _queries(d, name, words, left, f"{shared(kv_heads):,}", drawn, drawn == heads)
        for key in range(keys):
            x = left + 3.3 * (key + 0.5) / keys
            label = f"$k_{key}v_{key}$" if drawn == heads else "$kv$" if keys == DRAWN else "$k\\,v$"
            d.box(f"{name} kv {key}", x, 1.6, label, "", "cache", min(1.3, 3.3 / keys * 0.9), 0.8)
            for query in range(key * drawn // keys, (key + 1) * drawn // keys):
                _line(d, x, 2.0, d.boxes[f"{name} q {query}"].x, 4.6)

    if mla:
        _latent(d, c, 2.1 + 3.75 * len(panels), drawn)
    return d


def _latent(d: Diagram, c: ModelConfig, left: float, drawn: int) -> None:
    heads = c.num_attention_heads
    cached = kv_values_per_layer(c)
    mha = kv_values_per_layer(c.replace(attention="gqa", num_key_value_heads=heads))
    words = f"{cached:,} = 1/{mha / cached:.0f} of MHA"
    _queries(d, "MLA", f"{heads} key heads", left, words, drawn, drawn == heads)
    d.box("latent", left + 1.15, 1.6, "$c^{KV}$", shape(c.kv_lora_rank), "cache", 2.1, 0.8)
    d.box("rotated", left + 2.8, 1.6, "$k^R$", shape(c.qk_rope_head_dim), "cache", 0.9, 0.8)
    for x in (left + 1.15, left + 2.8):
        _line(d, x, 2.0, x, 2.25)
    _line(d, left + 1.15, 2.25, left + 2.8, 2.25)
    for query in range(drawn):
        x = d.boxes[f"MLA q {query}"].x
        d.box(f"MLA kv {query}", x, 3.3, "$kv$", "", "idle", 0.47, 0.8)
        _line(d, left + 1.65, 2.25, x, 2.9)
        _line(d, x, 3.7, x, 4.6)


def _queries(d: Diagram, name: str, words: str, left: float, cached: str, drawn: int, numbered: bool) -> None:
    d.note(left + 1.65, 6.15, name, align="center", size=11)
    d.note(left + 1.65, 5.72, words, align="center")
    for query in range(drawn):
        label = f"$q_{query}$" if numbered else "$q$"
        d.box(f"{name} q {query}", left + 3.3 * (query + 0.5) / drawn, 5.0, label, "", "tensor", 0.47, 0.8)
    d.note(left + 1.65, 0.4, cached, strong=True, align="center", size=12)


def _line(d: Diagram, x: float, y: float, to_x: float, to_y: float) -> None:
    d.axes.plot((x, to_x), (y, to_y), color=INK, linewidth=0.8, zorder=2)
