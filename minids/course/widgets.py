"""Interactive figures with controls, which show their first state where no kernel runs.

One output holds three forms: the live widget, a PNG of its first state, and a line of text. JupyterLab shows the first
form that it can, a page without a kernel shows the PNG, and the test of stored outputs compares the text.
"""

import base64
import html
from collections.abc import Callable
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from minids.course import plots

Range = tuple[float, float, float]


class Explorer:
    """An interactive figure: it shows `draw(**values)` and redraws when a control changes.

    A control is defined by its range: (low, high, start) is a slider, of integers if all three are integers; a list is
    a menu that starts at its first entry; True or False is a checkbox. `draw` has to return a new Figure that depends
    on nothing else. `controls` contains the ipywidgets, so that a test can change them.
    """

    def __init__(self, draw: Callable[..., Figure], **ranges: Range | list | bool):
        self.draw = draw
        self.controls = {name: _control(name, values) for name, values in ranges.items()}
        self._complaint = ipywidgets.HTML()
        self._image = ipywidgets.Image(
            format="png", layout=ipywidgets.Layout(max_width="100%", align_self="flex-start")
        )
        for control in self.controls.values():
            control.observe(self._moved, names="value")
        self._redraw()
        self._box = ipywidgets.VBox([*self.controls.values(), self._complaint, self._image])

    @property
    def values(self) -> dict[str, Any]:
        """Current values of the controls."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def png(self) -> bytes:
        """The figure as shown now, as PNG."""
        return self._image.value

    def _redraw(self) -> None:
        self._image.value, self._size = plots.png_and_size(self.draw(**self.values))
        self._image.layout.width = f"{self._size['width']}px"

    def _moved(self, _change: object) -> None:
        self._complaint.value = ""
        try:
            self._redraw()
        except Exception as error:  # JupyterLab would hide it
            self._complaint.value = f"<b>{html.escape(f'{type(error).__name__}: {error}')}</b>"

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        at = ", ".join(f"{name}={value}" for name, value in self.values.items())
        shown = dict(self._box._repr_mimebundle_()) | {
            "text/plain": f"Explorer({self.draw.__name__}: {at})",
            "image/png": base64.b64encode(self.png).decode(),
        }
        return shown, {"image/png": self._size}


def _control(name: str, values: Range | list | bool) -> ipywidgets.Widget:
    label = dict(description=name.replace("_", " "), style={"description_width": "initial"})
    if isinstance(values, bool):
        return ipywidgets.Checkbox(value=values, **label)
    if isinstance(values, list):
        return ipywidgets.Dropdown(options=values, value=values[0], **label)
    low, high, start = values
    slider = ipywidgets.IntSlider if all(isinstance(v, int) for v in values) else ipywidgets.FloatSlider
    return slider(min=low, max=high, value=start, continuous_update=False, **label)
