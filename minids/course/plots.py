"""The figures, as functions of plain data. Each returns a matplotlib Figure and touches no global state."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure


def loss_curve(metrics: Sequence[dict[str, Any]]) -> Figure:
    """The losses of a run in nats per token, and its validation in bits per byte, over the tokens read."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [m["tokens"] / 1e6 for m in metrics]
    axes.plot(tokens, [m["loss"] for m in metrics], color="#4477AA", linewidth=1, label="training loss, next token")
    if any(m["mtp_loss"] for m in metrics):
        mtp_loss = [m["mtp_loss"] for m in metrics]
        axes.plot(tokens, mtp_loss, color="#CCBB44", linewidth=1, zorder=1, label="training loss, the token after it")
    axes.set_xlabel("tokens read (millions)")
    axes.set_ylabel("loss (nats per token)")
    validated = [m for m in metrics if "validation_bits_per_byte" in m]
    if validated:
        right = axes.twinx()
        bits = [m["validation_bits_per_byte"] for m in validated]
        places = [m["tokens"] / 1e6 for m in validated]
        right.plot(places, bits, "o--", color="#AA3377", label="validation (right axis)")
        right.set_ylabel("validation (bits per byte)")
        right.set_ylim(bottom=0)
        right.legend(loc="lower right", frameon=False)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left", frameon=False)
    return figure
