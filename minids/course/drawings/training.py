"""One training step, from the batch to the new weights and biases, and the schedule that governs it."""

from minids.config import ModelConfig
from minids.course.diagrams import INK, MUTED, STRONG, Diagram
from minids.training.lr_schedule import LRSchedule
from minids.training.pretrain import Recipe


def training_step(config: ModelConfig | None = None, recipe: Recipe | None = None) -> Diagram:
    """Draw a step of pre-training with the weights of the losses of `recipe`, and the learning rate over a run.

    By default both are those of `minids train`.
    """
    c, r = config or ModelConfig.preset("tiny"), recipe or Recipe()
    d = Diagram(17.2, 8.3, "A step of minids train: gradients move the weights, counts move the router's biases")
    d.box("batch", 1.7, 6.0, "batch", "sequences × tokens", "tensor", 2.8)
    d.box("forward", 5.2, 6.0, "forward", f"{c.num_hidden_layers} layers", "operation", 2.2)
    d.box("main", 9.0, 7.3, "main loss", "next token", "tensor", 2.8)
    d.box("mtp", 9.0, 6.0, "MTP loss", f"× {r.mtp_weight:g}", "tensor", 2.8)
    d.box("balance", 9.0, 4.7, "balance loss", f"× {c.aux_loss_alpha:g}", "tensor", 2.8)
    d.box("backward", 12.6, 6.0, "backward", "gradients", "operation", 2.2)
    d.box("clip", 15.7, 6.0, "clip", f"norm ≤ {r.clip_norm:g}", "operation", 2.2)
    d.box("optimizer", 15.7, 3.4, "AdamW", "learning rate", "operation", 2.4)
    d.box("weights", 12.2, 3.4, "weights", "new", "weight", 2.2)
    d.box("counts", 5.2, 3.4, "tokens per expert", "of the whole batch", "tensor", 3.0)
    d.box("bias", 9.0, 3.4, "router bias", f"± {r.balance_speed:g} a step", "weight", 2.8)
    for start, end in (("batch", "forward"), ("forward", "mtp"), ("mtp", "backward"), ("backward", "clip"),
                       ("clip", "optimizer"), ("optimizer", "weights"), ("forward", "counts")):  # fmt: skip
        d.arrow(start, end)
    for name in ("main", "balance"):
        y = d.boxes[name].y
        d.axes.plot((6.95, 6.95), (6.0, y), color=INK, linewidth=1.0, zorder=2)
        arrowhead = dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, color=INK)
        d.axes.annotate("", (7.6, y), (6.95, y), arrowprops=arrowhead, zorder=2)
        d.axes.plot((10.4, 11.0, 11.0), (y, y, 6.0), color=INK, linewidth=1.0, zorder=2)
    d.arrow("counts", "bias", dashed=True)
    d.note(6.85, 2.6, "no gradient: up where a router chose an expert too rarely", align="left")
    _schedule(d, LRSchedule(r.steps, r.warmup_steps), r, 3.2, 0.75, 13.6, 1.1)
    return d


def _schedule(
    d: Diagram, schedule: LRSchedule, r: Recipe, left: float, bottom: float, width: float, height: float
) -> None:
    """Draw the learning rate over the run, with the changes of the two other settings."""
    steps = range(r.steps)
    x = [left + width * step / r.steps for step in steps]
    d.axes.plot(
        x, [bottom + height * schedule.learning_rate_factor(step) for step in steps], color=STRONG, linewidth=1.8
    )
    d.axes.plot((left, left + width), (bottom, bottom), color=MUTED, linewidth=0.8)
    d.note(0.2, bottom + height / 2, "learning rate\nover the run", strong=True)
    for part, back, up, words, align in (
        (0.0, 0.0, -0.35, f"warm-up: {r.warmup_steps} steps", "left"),
        (schedule.fall_begins, 0.0, -0.35, f"from here: cosine, and MTP weight {r.mtp_weight / 3:g}", "left"),
        (schedule.fall_ends, 0.1, height - 0.15, "from here: biases fixed", "right"),
    ):
        place = left + width * part
        d.axes.plot((place, place), (bottom - 0.1, bottom + height), color=MUTED, linewidth=0.8, linestyle=":")
        d.note(place - back, bottom + up, words, align=align)


def packing(lengths: tuple[int, ...] = (3, 1, 3), seq_len: int = 4) -> Diagram:
    """Draw how documents of `lengths` tokens become rows of `seq_len` inputs, and which labels are ignored."""
    tokens, owner, value = [], [], iter(range(1, sum(lengths) + 1))
    for document, length in enumerate(lengths):
        tokens += ["bos", *(str(next(value)) for _ in range(length)), "eos"]
        owner += [document] * (length + 2)
    starts = range(0, len(tokens) - seq_len, seq_len)
    d = Diagram(
        1.2 * len(tokens) + 1.4,
        3.6 + 1.15 * len(starts),
        "Packing: documents end to end, cut into rows of equal length",
    )
    top = 2.1 + 1.15 * len(starts)
    left = 0
    for document, length in enumerate(lengths):
        edge = 0.75 + 1.2 * left
        d.frame(edge, top - 0.55, edge + 1.2 * (length + 2) - 0.1, top + 1.0, f"document {document + 1}")
        left += length + 2
    for i, token in enumerate(tokens):
        d.box(f"token {i}", 1.3 + 1.2 * i, top, token, "", "tensor", 1.0)
    for r, start in enumerate(starts):
        y = top - 1.9 - 1.15 * r
        d.note(0.2, y, f"row {r + 1}", align="left", strong=True)
        for j in range(seq_len):
            d.box(f"input {r} {j}", 2.9 + 1.2 * j, y, tokens[start + j], "", "tensor", 1.0)
            kept = owner[start + j] == owner[start + j + 1]
            label = tokens[start + j + 1] if kept else "−100"
            x = 2.9 + 1.2 * (j + seq_len + 1.6)
            d.box(f"label {r} {j}", x, y, label, "", "tensor" if kept else "idle", 1.0)
        d.arrow(f"input {r} {seq_len - 1}", f"label {r} 0")
    d.note(2.3, top - 1.05, f"inputs: {seq_len} tokens", align="left")
    d.note(2.3 + 1.2 * (seq_len + 1.6), top - 1.05, "labels: one token later; dashed ones are ignored", align="left")
    return d
