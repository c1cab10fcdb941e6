"""`minids schedule`: check, simulate and draw a pipeline schedule."""

from json import dumps
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from minids.cli.options import call
from minids.parallel.gantt import gantt
from minids.parallel.schedule import Action, Pair, Schedule, Timeline
from minids.parallel.schedules import SCHEDULES, ScheduleName, compare
from minids.validation import require

MOST_RANKS, MOST_ROWS = 1024, 2**15  # some ten seconds of simulation; the chart is full far below


def run(command: str, arguments: list[str]) -> None:
    call(schedule_command, command, arguments)


def schedule_command(
    name: Positional[ScheduleName] = "dualpipe",
    ranks: int = 8,
    micro_batches: int = 20,
    F: float = 1,
    B: float = 2,
    W: float = 1,
    FB: float = 3,
    transfer: float = 0,
    all: bool = False,
    json: bool = False,
    png: Path | None = None,
) -> None:
    """Check and simulate a pipeline schedule; print its timeline, and compare its bubble and memory with others.

    Args:
        name: Schedule to simulate.
        ranks: Number of devices in the pipeline.
        micro_batches: Micro-batches per step, both directions together.
        F: Time of a forward, in any unit; all times share it.
        B: Time of a full backward.
        W: Time of the weight-gradient half of a backward.
        FB: Time of an overlapped pair of a forward and a full backward.
        transfer: Time of a transfer from one rank to another; 0 neglects it.
        all: Compare with every schedule that allows this size, not only with 1F1B and ZB1P.
        json: Print actions and simulation as JSON, for a program to read.
        png: File to which a chart of the timeline is also written, as PNG; requires matplotlib.
    """
    require(ranks <= MOST_RANKS, "ranks", ranks, f"must be at most {MOST_RANKS:,}: every action is simulated")
    most = MOST_ROWS // max(ranks, 1)
    require(micro_batches <= most, "micro_batches", micro_batches, f"must be at most {most:,} with {ranks} ranks")
    schedule = SCHEDULES[name](ranks, micro_batches)
    schedule.check()
    costs = dict(F=F, B=B, W=W, FB=FB, transfer=transfer)
    timeline = schedule.simulate(**costs)
    if png is not None:
        from minids.course.pipeline_chart import draw  # with matplotlib

        title = f"{name}: {ranks} ranks, {micro_batches} micro-batches"
        figure = draw(timeline, title, f"forward = {F:g}", size=(14, 1.2 + 0.45 * ranks))
        figure.savefig(png, format="png", dpi=120)
    compared, refused = [], []
    for other in SCHEDULES if all else dict.fromkeys((name, "one_f_one_b", "zb1p")):
        try:
            compared.append(SCHEDULES[other](ranks, micro_batches))
        except ValueError as error:
            refused.append(f"{other} does not allow this size: {error}")
    rows = compare(compared, **costs)
    if json:
        print(dumps(_as_json(schedule, timeline) | ({"comparison": rows} if all else {})))
        return
    print(gantt(timeline))
    print(f"\nThe same model on {ranks} devices: where a rank holds n stages, an action takes 1/n of the time.")
    print(f"Parameters and activations are in units of 1/{ranks} of the model.")
    print(f"{'schedule':25}{'parameters':>10}{'activations':>13}{'bubble':>8}{'formula':>9}{'makespan':>10}")
    for row in rows:
        formula = "-" if row["formula"] is None else f"{row['formula']:g}"
        print(f"{row['schedule']:25}{row['parameters']:>9g}x{row['activations']:>13g}{row['bubble']:>8g}", end="")
        print(f"{formula:>9}{row['makespan']:>10g}")
    for line in refused:
        print(line)


def _as_json(schedule: Schedule, timeline: Timeline) -> dict[str, Any]:
    def place(action: Action) -> dict[str, int]:
        return {"direction": action.direction, "micro_batch": action.micro_batch, "stage": action.stage}

    def describe(action: Action | Pair) -> dict[str, Any]:
        if isinstance(action, Pair):
            return {"kind": "FB", "forward": place(action.forward), "backward": place(action.backward)}
        return {"kind": action.kind, **place(action)}

    return {
        "actions": [[describe(action) for action in actions] for actions in schedule.actions],
        "simulation": {
            "makespan": timeline.makespan,
            "bubble": timeline.bubble,
            "peak_activations": timeline.peak_activations,
            "parameters": schedule.parameters,
            "start": [[span.start for span in spans] for spans in timeline.spans],
            "end": [[span.end for span in spans] for spans in timeline.spans],
        },
    }
