"""The map of DeepSeek-V3, which opens every chapter: you are here."""

from minids.config import ModelConfig
from minids.course.diagrams import Diagram, shape

CHAPTERS = {
    "attention": (1, 2), "cache": (1, 2), "moe": (3,), "mtp": (4,), "training": (5,), "fp8": (6,), "pipeline": (7,),
    "experts": (8,), "rl": (9, 10), "sparse": (11,), "after": (12,), "cluster": (13,), "claims": (0,),
}  # fmt: skip


def v3_map(*here: str, config: ModelConfig | None = None) -> Diagram:
    """Draw the model, its training and its cluster; the parts named by `here` are marked.

    Raises `ValueError` for a part that is not on the map.
    """
    unknown = [part for part in here if part not in CHAPTERS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not on the map: choose from {', '.join(CHAPTERS)}")
    c = config or ModelConfig.preset("v3")
    d = Diagram(17.2, 8.6, "DeepSeek-V3, and the chapter that builds each part")

    def part(name: str, x: float, y: float, label: str, small: str, width: float) -> None:
        chapters = ", ".join(f"{chapter:02}" for chapter in CHAPTERS[name])
        d.box(name, x, y, f"{chapters}  {label}", small, "here" if name in here else "operation", width, 0.9)

    d.frame(0.2, 0.2, 8.3, 8.3, "the model")
    d.frame(0.5, 1.5, 8.0, 5.3, f"a layer, {c.num_hidden_layers} times")
    d.note(3.15, 5.0, f"residual stream of {shape(c.hidden_size)}")
    d.box("tokens", 2.9, 0.8, "tokens", "", "tensor", 2.2, 0.6)
    part("attention", 2.9, 2.4, "attention", f"{c.num_attention_heads} heads", 3.8)
    part(
        "moe", 2.9, 4.1, "mixture of experts", f"{c.num_experts_per_tok} of {c.n_routed_experts} experts, 1 shared", 4.4
    )
    d.box("head", 2.9, 6.8, "next token", f"{c.vocab_size:,} possible", "tensor", 2.6, 0.8)
    part("mtp", 6.7, 6.8, "MTP", "the one after", 2.2)
    part("cache", 6.55, 2.4, "KV cache", f"{c.kv_lora_rank + c.qk_rope_head_dim} values a token", 2.75)
    part("sparse", 6.55, 4.1, "DSA", "sparse, in V3.2", 2.5)
    part("after", 6.3, 0.8, "after V3", "streams, memory, Muon", 3.2)
    for a, b in (("tokens", "attention"), ("attention", "moe"), ("moe", "head")):
        d.arrow(a, b)
    d.arrow("cache", "attention")
    d.arrow("cache", "sparse")
    d.path([(2.9, 5.75), (6.7, 5.75), (6.7, 6.35)])

    d.frame(8.7, 4.5, 16.9, 8.3, "training it")
    part("training", 10.75, 7.0, "pre-training", "14.8T tokens", 3.6)
    part("rl", 14.85, 7.0, "GRPO, R1-Zero, R1", "rewards by rule", 3.8)
    part("fp8", 10.75, 5.3, "FP8", "tiles of 128", 3.6)
    part("claims", 14.85, 5.3, "the bill", "2.788M GPU hours", 3.8)
    d.arrow("training", "rl")
    d.frame(8.7, 0.2, 16.9, 4.1, "training it on 2,048 GPUs, and on yours")
    part("pipeline", 10.75, 2.8, "DualPipe", "16 pipeline stages", 3.6)
    part("experts", 14.85, 2.8, "expert parallelism", "64-way, 8 nodes", 3.8)
    part("cluster", 12.8, 1.1, "one real run", "all of it, on the GPUs you have", 4.6)
    return d
