"""Charts of chapter 08: who sends how many rows to whom, and which expert is placed on which GPU."""

from typing import Any

import torch
from jaxtyping import Int, Real
from matplotlib.figure import Figure
from torch import Tensor

from minids.course import plots
from minids.course.traffic import Traffic
from minids.parallel.eplb import Placement


def draw_sizes(sizes: Int[Tensor, "senders receivers"], title: str) -> Figure:
    """Draw the rows of one all-to-all as a table of numbers, with the sum that each receiver gets."""
    figure = plots.heatmap(sizes.tolist(), "receiver: rank (rows that arrive)", "sender: rank", "rows", title)
    figure.set_size_inches(5.4, 4.2)
    axes = figure.axes[0]
    axes.set_aspect("equal")
    for sender, row in enumerate(sizes.tolist()):
        for receiver, rows in enumerate(row):
            ink = "black" if rows > sizes.max() / 2 else "white"
            axes.text(receiver, sender, rows, ha="center", va="center", color=ink, fontsize=13)
    arrive = [f"{rank}\n({total})" for rank, total in enumerate(sizes.sum(0).tolist())]
    axes.set(xticks=range(len(sizes)), yticks=range(len(sizes)))
    axes.set_xticklabels(arrive)
    figure.axes[1].set_yticks(range(int(sizes.max()) + 1))
    return figure


def draw_traffic(kinds: dict[str, Traffic], title: str, most: int = 30) -> Figure:
    """Draw maps of the rows from GPU to GPU side by side; `most` stands for all larger numbers."""
    figure = Figure(figsize=(7.4, 3.9), layout="constrained")
    figure.suptitle(title)
    for axes, (name, traffic) in zip(figure.subplots(1, len(kinds), sharey=True), kinds.items(), strict=True):
        rows = traffic.rows.float().fill_diagonal_(0)
        image = axes.imshow(rows.clamp_max(most).numpy(), cmap="cividis", interpolation="nearest")
        ticks = range(0, len(rows), traffic.gpus_per_node)
        axes.set(title=name, xlabel="receiver: GPU", xticks=ticks, yticks=ticks)
    figure.axes[0].set_ylabel("sender: GPU")
    figure.colorbar(image, ax=figure.axes, label=f"rows ({most} stands for {most} or more)")
    return figure


def draw_placement(load: Real[Tensor, "experts"], placement: Placement, title: str, unit: str = "rows") -> Figure:
    """Draw the first layer of a placement: a bar for each GPU, a piece for each slot with the number of its expert.

    Experts with several copies have colours, all others are grey; the dashed line is the mean load.
    """
    copies, slots = placement.copies[0], placement.expert_of_slot[0].view(placement.gpus, -1).tolist()
    several = [expert for expert in range(len(load)) if copies[expert] > 1]
    figure, axes = plots.canvas("GPU", f"load ({unit})", title)
    for gpu, experts in enumerate(slots):
        bottom = 0.0
        for expert in experts:
            height = float(load[expert] / copies[expert])
            copied = expert in several
            look: dict[str, Any] = dict(color="#d5dadf")
            if copied:
                place = several.index(expert)
                look = dict(color=plots.COLORS[place % 7], hatch="//" * (place // 7))
            axes.bar(gpu, height, 0.8, bottom, edgecolor="white", **look)
            if height > float(load.sum()) / 150:
                ink = "white" if copied else "black"
                axes.text(
                    gpu, bottom + height / 2, f"E{expert}", ha="center", va="center", color=ink, size=9, weight="bold"
                )
            bottom += height
    mean = float(torch.as_tensor(load).sum()) / placement.gpus
    axes.axhline(mean, color="black", linewidth=1, linestyle="--")
    axes.annotate("mean", (placement.gpus - 0.55, mean), va="bottom", fontsize=8)
    axes.set(xticks=range(placement.gpus), xlim=(-0.6, placement.gpus - 0.1))
    return figure
