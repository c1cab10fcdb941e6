"""All pipeline schedules by name, and a comparison of their bubble and memory."""

from collections.abc import Iterable
from typing import Any, Literal

from minids.cost import BUBBLES
from minids.parallel.dualpipe import dualpipe, dualpipev
from minids.parallel.one_f_one_b import gpipe, interleaved_one_f_one_b, one_f_one_b
from minids.parallel.schedule import Schedule
from minids.parallel.zero_bubble import zb1p, zbv

GENERATORS = (gpipe, one_f_one_b, interleaved_one_f_one_b, zb1p, zbv, dualpipe, dualpipev)


SCHEDULES = {generator.__name__: generator for generator in GENERATORS}


ScheduleName = Literal["gpipe", "one_f_one_b", "interleaved_one_f_one_b", "zb1p", "zbv", "dualpipe", "dualpipev"]


def bubble_formula(schedule: Schedule, F: float = 1, B: float = 2, W: float = 1, FB: float = 3) -> float | None:
    """Return the bubble by closed formula (V3 Table 2; FACTS.md section 6) for these times of an action; None for ZB-V.

    GPipe and interleaved 1F1B have the formula of 1F1B. ZB1P's issue order agrees with its formula where W is at most F
    and at most B - W, DualPipe's where F = W = B / 2, for any FB; elsewhere the simulated bubble is smaller or larger.
    """
    formula_of = {"gpipe": "one_f_one_b", "interleaved_one_f_one_b": "one_f_one_b", "dualpipev": "dualpipe"}
    name = formula_of.get(schedule.name, schedule.name)
    stages = schedule.stages if name == "dualpipe" else len(schedule.actions)
    return BUBBLES[name](stages, F, B, W, FB) if name in BUBBLES else None


def compare(
    schedules: Iterable[Schedule], F: float = 1, B: float = 2, W: float = 1, FB: float = 3, transfer: float = 0
) -> list[dict[str, Any]]:
    """Compare parameters, activations, bubble and makespan of schedules for the same model on the same devices.

    The times are those of 1 / devices of the model, so where a rank holds n stages, an action takes 1 / n of them.
    Parameters and activations are multiples of 1 / devices of the model; the bubble is that of the worst rank.
    """
    rows = []
    for schedule in schedules:
        devices = len(schedule.actions)
        cut = schedule.stages / devices
        costs = {name: time / cut for name, time in dict(F=F, B=B, W=W, FB=FB).items()}
        timeline = schedule.simulate(**costs, transfer=transfer)
        rows.append({
            "schedule": schedule.name,
            "parameters": max(schedule.parameters) * devices,
            "activations": max(timeline.peak_activations) / cut,
            "bubble": max(timeline.bubble),
            "formula": bubble_formula(schedule, **costs),
            "makespan": timeline.makespan,
        })  # fmt: skip
    return rows
