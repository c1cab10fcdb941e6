"""In every kernel that the tests start a cell fails if it shows a figure whose axes do not say what they hold.

Names along an axis speak for themselves; numbers need a label, of the axis or of the whole figure.
"""

import re

from matplotlib.axis import Axis
from matplotlib.figure import Figure

from minids.course import plots

NUMBER = re.compile(r"[^A-Za-z]*\d[^A-Za-z]*")


class Unlabelled(BaseException):
    """No `Exception`: IPython would print one that a figure raises, and let the cell pass."""


def silent_axes(figure: Figure) -> list[str]:
    """What nobody can read in a figure that has been drawn."""
    wholes = {"x": figure.get_supxlabel(), "y": figure.get_supylabel()}
    return [
        f"the {axis.axis_name} axis of {axes.get_title() or 'a plot without title'!r} has no label"
        for axes in figure.axes
        if axes.axison
        for axis in (axes.xaxis, axes.yaxis)
        if _has_numbers(axis) and not axis.get_label_text() and not wholes[axis.axis_name]
    ]


def _has_numbers(axis: Axis) -> bool:
    texts = [label.get_text().replace(r"\mathdefault", "") for label in axis.get_ticklabels() if label.get_visible()]
    return axis.get_visible() and any(NUMBER.fullmatch(text) for text in texts)


def checked(figure: Figure, draw=plots.png) -> bytes:
    picture = draw(figure)
    if silent := silent_axes(figure):
        raise Unlabelled("; ".join(silent))
    return picture


def install() -> None:
    """Check every figure that this process draws from now on."""
    plots.png = checked
