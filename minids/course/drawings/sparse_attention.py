"""Sparse attention: V3.2's indexer, how it is trained, and V4's compressed entries."""

from minids.config import ModelConfig
from minids.course.diagrams import Diagram, Role, shape

# V4: raw tokens that every layer attends to, and tokens per entry (FACTS.md section 10)
WINDOW, CSA, HCA = 128, 4, 128


def indexer(config: ModelConfig | None = None) -> Diagram:
    """Draw DeepSeek Sparse Attention for one query (V3.2-Exp eq. 1 and 2)."""
    c = config or ModelConfig.preset("v3_2")
    if c.index_topk is None:
        raise ValueError("index_topk=None: the config has no sparse attention to draw")
    entry, heads, width = c.kv_lora_rank + c.qk_rope_head_dim, c.index_n_heads, c.index_head_dim
    d = Diagram(17.2, 8.8, f"A small indexer scores every cached token; attention reads the best {c.index_topk:,} only")
    score = "$I_{t,s} = \\sum_j w_j\\,$ReLU$(q_j k_s)$"
    d.frame(0.3, 0.3, 5.9, 8.4, "cached, per token and layer", "cache")
    d.frame(6.2, 0.3, 16.9, 4.4, "indexer: one key for all its heads")
    d.frame(6.2, 4.7, 16.9, 8.4, f"latent attention, {c.num_attention_heads} heads")
    d.box("index keys", 3.1, 1.7, "index keys $k^I_s$", shape("s", width), "cache", 3.6)
    d.box("entries", 3.1, 6.1, "latents and keys $k^R$", shape("s", entry), "cache", 4.2)
    d.box("query", 15.0, 1.2, "index queries $q^I_t$", shape(heads, width), "tensor", 3.2)
    d.box("weights", 15.0, 2.3, "head weights $w_t$", shape(heads), "tensor", 3.2)
    d.box("score", 9.8, 1.7, score, "a score for each cached token", "operation", 5.6, 2.0)
    d.box("top", 9.8, 3.6, f"top {c.index_topk:,}", "of s, no gradient", "operation", 3.6)
    d.box("chosen", 9.8, 6.1, "chosen entries", shape(c.index_topk, entry), "tensor", 3.6)
    d.box("attend", 14.4, 6.1, "softmax over them", "absorbed MLA", "operation", 4.2)
    d.box("out", 14.4, 7.7, "output $u_t$", shape(c.hidden_size), "tensor", 3.6)
    for start, end in (("index keys", "score"), ("query", "score"), ("weights", "score"), ("score", "top")):
        d.arrow(start, end)
    d.arrow("top", "chosen", "which s", dashed=True)
    for start, end in (("entries", "chosen"), ("chosen", "attend"), ("attend", "out")):
        d.arrow(start, end)
    d.note(6.5, 7.7, "the indexer learns from a loss of its own:\nKL to the attention that it replaces")
    return d


def compressed(window: int = WINDOW, csa: int = CSA, hca: int = HCA) -> Diagram:
    """Draw what a query of V4 attends to in its two kinds of layers: raw tokens nearby, mixed entries further away."""
    d = Diagram(
        17.2, 8.2, f"V4 caches an entry per {csa} or per {hca} tokens, and the last {window} tokens as they are"
    )
    d.frame(0.3, 4.3, 16.9, 7.8, f"CSA layer: {csa} tokens make an entry, few are chosen (dashed: cached, not read)")
    d.frame(0.3, 0.3, 16.9, 3.9, f"HCA layer: {hca} tokens make an entry; all of them are read")
    for name, y, entries, chosen, count in (("csa", 5.4, 6, (1, 4), csa), ("hca", 1.5, 2, (0, 1), hca)):
        width = 9.6 / entries
        for i in range(entries):
            x = 0.8 + (i + 0.5) * width
            role: Role = "cache" if i in chosen else "idle"
            d.box(f"{name} {i}", x, y, f"entry {i}", f"{count} tokens", role, width - 0.2)
        d.box(f"{name} window", 12.0, y, "window", f"last {window}", "cache", 2.2)
        d.box(f"{name} query", 15.2, y, "query", "64 or 128 heads", "operation", 2.6)
        d.arrow(f"{name} window", f"{name} query")
        top = y + 1.15
        for i in chosen:
            x = d.boxes[f"{name} {i}"].x
            d.path([(x, y + 0.4), (x, top), (15.2, top), (15.2, y + 0.4)])
    d.note(0.8, 4.7, f"an entry overlaps: it mixes its own {csa} tokens and the {csa} before, by a softmax per channel")
    d.note(0.8, 0.7, "an entry is key and value at once, one for all heads; its position is that of its first token")
    return d


def training_stages() -> Diagram:
    """Draw which loss trains which part in the two stages of the indexer's training (V3.2-Exp eq. 3 and 4)."""
    d = Diagram(17.2, 7.6, "Two stages: the indexer first learns from dense attention, then both learn side by side")
    stages = (("dense warm-up", "all visible tokens", True), ("sparse stage", "the chosen tokens only", False))
    for (name, tokens, frozen), x in zip(stages, (0.3, 8.75), strict=True):
        d.frame(x, 0.3, x + 8.15, 7.2, f"{name}: attention over {tokens}")
        left, right = x + 1.8, x + 5.8
        d.box(f"{name} input", x + 3.8, 1.2, "hidden states", "", "tensor", 3.0, 0.7)
        d.box(f"{name} indexer", left, 3.3, "indexer", "trained", "here", 2.8)
        role: Role = "idle" if frozen else "here"
        d.box(f"{name} model", right, 3.3, "model", "frozen" if frozen else "trained", role, 2.8)
        d.box(f"{name} KL", left, 5.6, "KL loss", f"over {tokens}", "operation", 3.2)
        d.box(f"{name} target", right if frozen else x + 4.75, 5.6, "attention p", "the target", "tensor", 1.8)
        d.arrow(f"{name} input", f"{name} indexer", dashed=True)
        d.arrow(f"{name} input", f"{name} model")
        d.arrow(f"{name} indexer", f"{name} KL")
        d.arrow(f"{name} model", f"{name} target")
        d.arrow(f"{name} target", f"{name} KL", dashed=True)
        if not frozen:
            d.box(f"{name} loss", x + 6.95, 5.6, "language loss", "", "operation", 2.1)
            d.arrow(f"{name} model", f"{name} loss")
    d.note(0.6, 0.55, "dashed: detached, no gradient goes back")
    return d


def csa_entries(block: int = CSA, blocks: int = 3) -> Diagram:
    """Draw which tokens each entry of CSA mixes; the last block is not finished and has no entry."""
    d = Diagram(
        17.2, 6.8, f"An entry of CSA mixes {2 * block} tokens: {block} of its own block, {block} of the one before"
    )
    width = 1.02
    for i in range(blocks * block + 2):
        finished = i < blocks * block
        x = 1.0 + i * width + 0.35 * (i // block)
        d.box(f"token {i}", x, 1.2, f"{i}", "", "tensor" if finished else "idle", 0.86, 0.6)
    for b in range(blocks):
        own = [d.boxes[f"token {b * block + j}"] for j in range(block)]
        x = (own[0].x + own[-1].x) / 2
        d.box(f"entry {b}", x, 4.9, f"entry {b}", f"RoPE at {b * block}", "cache", 3.0)
        d.box(f"series {b}", x, 2.9, "2 series, 2 logits", "per token and channel", "operation", 3.8)
        d.arrow(f"series {b}", f"entry {b}", "own block" if b == 0 else "")
        d.path([(x, 1.5), (x, 2.5)])
        if b:
            before = d.boxes[f"series {b - 1}"].x
            d.path([(before + 1.3, 3.3), (before + 1.3, 3.95), (x - 0.9, 3.95), (x - 0.9, 4.5)], strong=True)
    last = d.boxes[f"token {blocks * block + 1}"]
    d.note(last.x - 1.5, 2.2, "unfinished block:\nno entry yet", size=8.2)
    d.note(0.6, 5.9, "thick: the series for the following entry; one softmax per channel over all tokens of an entry")
    d.note(0.6, 0.45, "tokens")
    return d
