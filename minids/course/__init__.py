"""Basis of the notebooks: `start` for the first cell, `show` for source, `between` for measured values."""

import inspect
import textwrap
from collections.abc import Callable

import torch
from IPython import get_ipython
from IPython.display import Markdown
from matplotlib.figure import Figure

from minids.course import plots


def start(minutes: float, gigabytes: float = 1, reading: int | None = None) -> None:
    """Set seed 0, one thread and two printed decimals, for the same values everywhere; print what the notebook needs.

    `minutes` is the time of the whole notebook on two CPU cores, `gigabytes` its memory in GB, `reading` the minutes
    that it takes to read.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_printoptions(precision=2, sci_mode=False)
    shell = get_ipython()
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(Figure, plots.png_and_size)
    unit = "minute" if minutes == 1 else "minutes"
    if reading is not None:
        print(f"Takes about {reading} minutes to read.")
    print(f"Needs about {minutes:g} {unit} on two CPU cores and {gigabytes:g} GB of memory.")


def show(*objects: Callable) -> Markdown:
    """Return the source of classes, functions or methods as highlighted Markdown."""
    source = "\n\n".join(textwrap.dedent(inspect.getsource(item)).rstrip() for item in objects)
    return Markdown(f"```python\n{source}\n```")


def between(value: float, low: float, high: float) -> float:
    """Return a measured `value` to print. Raises `AssertionError` outside of [low, high], the band that holds anywhere.

    For cells with the tag `nbval-ignore-output`: what they print may differ between processors, but only so much.
    """
    assert low <= value <= high, f"{value:g} was measured, where {low:g} to {high:g} is expected"
    return value
