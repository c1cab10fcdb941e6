"""The map of DeepSeek-V3, which opens every chapter: you are here."""

from minids.config import ModelConfig
from minids.course.diagrams import Diagram, shape

CHAPTERS = {
    "attention": (1, 2), "cache": (1, 2), "moe": (3,), "mtp": (4,), "training": (5,), "fp8": (6,), "pipeline": (7,),
    "experts": (8,), "rl": (9, 10), "cluster": (11,), "claims": (0,),
}  # fmt: skip


def v3_map(*here: str, config: ModelConfig | None = None) -> Diagram:
    """Draw the model, its training and its cluster; the parts named by `here` are marked.

    Raises `ValueError` for a part that is not on the map.
    """
    unknown = [part for part in here if part not in CHAPTERS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not on the map: choose from {', '.join(CHAPTERS)}")
    c = config or ModelConfig.preset("v3")
    d = Diagram(17.2, 8.6, "DeepSeek-V3: what each chapter builds")

    def part(name: str, x: float, y: float, label: str, small: str, width: float, role="operation", height=0.9) -> None:
        d.box(name, x, y, label, small, "here" if name in here else role, width, height)

    d.frame(0.2, 0.2, 8.3, 8.3, f"the model: {c.num_hidden_layers} layers, {shape(c.hidden_size)} wide")
    d.box("tokens", 3.2, 0.8, "tokens", "", "tensor", 2.2, 0.6)
    part("attention", 3.2, 2.4, "attention: GQA, then MLA", f"{c.num_attention_heads} heads", 4.4)
    part(
        "moe",
        3.2,
        4.4,
        "mixture of experts",
        f"{c.num_experts_per_tok} of {c.n_routed_experts} experts, and 1 shared",
        4.4,
    )
    d.box("head", 3.2, 6.4, "next token", f"{c.vocab_size:,} words", "tensor", 2.6, 0.8)
    part("mtp", 6.9, 6.4, "MTP", "the one after", 1.9)
    part("cache", 6.9, 2.4, "KV cache", f"{c.kv_lora_rank + c.qk_rope_head_dim} values", 1.9, "cache")
    for a, b in (("tokens", "attention"), ("attention", "moe"), ("moe", "head")):
        d.arrow(a, b)
    d.arrow("attention", "cache")
    d.arrow("head", "mtp")
    d.note(0.5, 3.4, "× layers")

    d.frame(8.7, 4.5, 16.9, 8.3, "training it")
    part("training", 10.8, 7.1, "pre-training", "14.8T tokens", 3.4)
    part("rl", 14.8, 7.1, "GRPO, R1-Zero, R1", "rewards by rule", 3.4)
    part("fp8", 10.8, 5.3, "FP8", "tiles of 128", 3.4)
    part("claims", 14.8, 5.3, "the bill", "2.788M GPU hours", 3.4)
    d.arrow("training", "rl")
    d.frame(8.7, 0.2, 16.9, 4.1, "running it on 2,048 GPUs")
    part("pipeline", 10.8, 2.9, "DualPipe", "16 pipeline stages", 3.4)
    part("experts", 14.8, 2.9, "expert parallelism", "64-way, 8 nodes", 3.4)
    part("cluster", 12.8, 1.1, "one real run", "all of it, on your GPUs", 4.2)
    return d
