"""The pipeline schedules: GPipe, 1F1B, interleaved 1F1B, ZB1P, ZB-V, DualPipe and DualPipeV, side by side.

Each is one program per rank in the words of the papers: "F0" is a forward through the shallowest of the rank's stages,
"B1" a full backward through the next, "I" and "W" are the input and weight halves of B, "F0B1" is an overlapped pair.
A program needs no micro-batch numbers: every stage takes its micro-batches in order.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from json import dumps
from pathlib import Path
from typing import Any, Literal

import tyro

from minids.config import require
from minids.cost import BUBBLES
from minids.parallel.timeline import Action, Pair, Route, Schedule, Stop, Timeline, draw, gantt
from minids.parallel.timeline import ScheduleError as ScheduleError  # who makes schedules finds their error here


def build(
    name: str, micro_batches: int, routes: tuple[Route, ...], max_activations: int, program: Callable[[int], list[str]]
) -> Schedule:
    """The schedule in which each rank follows `program(rank)`, written as the head of this file explains."""
    actions = []
    for rank in range(1 + max(stop.rank for route in routes for stop in route)):
        stops = sorted((stop for route in routes for stop in route if stop.rank == rank), key=lambda stop: stop.stage)
        actions.append(list(_actions(" ".join(program(rank)).split(), stops)))
    return Schedule(name, micro_batches, routes, max_activations, actions)


def _actions(words: list[str], stops: list[Stop]) -> Iterator[Action | Pair]:
    """Number the micro-batches of each stage; W is for the oldest I without one, of that stage if one is named."""
    count, waiting = Counter(), []

    def action(kind: str, chunk: str) -> Action:
        if kind == "W":
            oldest = next(each for each in waiting if not chunk or each.stage == stops[int(chunk)].stage)
            waiting.remove(oldest)
            return oldest._replace(kind="W")
        stop, forward = stops[int(chunk)], kind == "F"
        count[stop, forward] += 1
        new = Action(kind, count[stop, forward] - 1, stop.stage, stop.direction)
        if kind == "I":
            waiting.append(new)
        return new

    for word in words:
        parts = [action(*part) for part in re.findall(r"([FBIW])(\d*)", word)]
        yield Pair(*parts) if len(parts) == 2 else parts[0]


def _looped(ranks: int, stages_per_rank: int = 1) -> tuple[Route, ...]:
    """One route that visits all ranks in order, once per stage of a rank."""
    return (tuple(Stop(stage % ranks, stage, 0) for stage in range(ranks * stages_per_rank)),)


def _v_shaped(ranks: int) -> tuple[Route, ...]:
    """One route down the ranks and up again: rank r holds stages r and 2 * ranks - 1 - r."""
    return (tuple(Stop(min(s, 2 * ranks - 1 - s), s, int(s >= ranks)) for s in range(2 * ranks)),)


def _two_way(ranks: int) -> tuple[Route, ...]:
    """Opposite routes through two copies of the model: rank r holds stages r and ranks - 1 - r."""
    return (*_looped(ranks), tuple(Stop(ranks - 1 - stage, stage, 1) for stage in range(ranks)))


# The schedules -----------------------------------------------------------------------------------------------------


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """GPipe: all forwards, then all backwards, so that all activations are alive at once."""
    _check_size(ranks, micro_batches)
    program = micro_batches * ["F0"] + micro_batches * ["B0"]
    return build("gpipe", micro_batches, _looped(ranks), micro_batches, lambda rank: program)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B: forwards until the pipeline is full, then a forward and a backward in turn."""
    _check_size(ranks, micro_batches)

    def program(rank: int) -> list[str]:
        return _in_turn(micro_batches * ["F0"], micro_batches * ["B0"], ahead=ranks - 1 - rank)

    return build("one_f_one_b", micro_batches, _looped(ranks), ranks, program)


def interleaved_one_f_one_b(ranks: int, micro_batches: int, stages_per_rank: int = 2) -> Schedule:
    """1F1B on ranks that hold several stages each and turn to the next stage after every group of micro-batches.

    All groups are equal, of as many micro-batches as there are ranks, or the few more that leave no remainder.
    """
    _check_size(ranks, micro_batches)
    require(stages_per_rank >= 1, "stages_per_rank", stages_per_rank, "must be at least 1")
    groups = max(1, micro_batches // ranks)
    require(micro_batches % groups == 0, "micro_batches", micro_batches, f"must divide into {groups} equal groups")
    group = micro_batches // groups
    chunks = [i // group % stages_per_rank for i in range(micro_batches * stages_per_rank)]
    forwards = [f"F{chunk}" for chunk in chunks]
    backwards = [f"B{stages_per_rank - 1 - chunk}" for chunk in chunks]
    first_round = (stages_per_rank - 1) * group

    def program(rank: int) -> list[str]:
        return _in_turn(forwards, backwards, ahead=first_round + 2 * (ranks - 1 - rank))

    routes = _looped(ranks, stages_per_rank)
    return build("interleaved_one_f_one_b", micro_batches, routes, first_round + 2 * ranks - 1, program)


def zb1p(ranks: int, micro_batches: int) -> Schedule:
    """ZB1P (ZB-H1 in the zero-bubble paper): 1F1B with halved backwards; rank r does its W r micro-batches late.

    The W that are left at the end fill the bubble there.
    """
    _check_size(ranks, micro_batches)

    def program(rank: int) -> list[str]:
        late = min(rank, micro_batches)
        backwards = late * ["I0"] + (micro_batches - late) * ["I0 W"]
        return _in_turn(micro_batches * ["F0"], backwards, ahead=ranks - 1 - rank) + late * ["W"]

    return build("zb1p", micro_batches, _looped(ranks), ranks, program)


def zbv(ranks: int, micro_batches: int) -> Schedule:
    """ZB-V: two stages per rank along a V, halved backwards; without a bubble between actions where F = I = W."""
    _check_size(ranks, micro_batches)
    least = 2 * ranks - 1
    require(micro_batches >= least, "micro_batches", micro_batches, f"must be at least 2 * ranks - 1 = {least}")

    def program(rank: int) -> list[str]:
        return (
            (2 * (ranks - rank) - 1) * ["F0"]
            + rank * ["F1 F0"]
            + (ranks - rank) * ["F1 I1 W1"]
            + (micro_batches - least + rank) * ["F0 I0 W0 F1 I1 W1"]
            + (ranks - rank - 1) * ["I0 W0 F1 I1 W1"]
            + rank * ["I0 I1"]
            + (ranks - rank) * ["I0 W0"]
            + rank * ["W1"]
            + rank * ["W0"]
        )

    return build("zbv", micro_batches, _v_shaped(ranks), 2 * ranks, program)


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe: half of the micro-batches enters at each end (V3 section 3.2.1; FACTS.md section 6.1)."""
    _check_size(ranks, micro_batches)
    require(ranks % 2 == 0, "ranks", ranks, "must be even")
    require(micro_batches % 2 == 0, "micro_batches", micro_batches, "must be even, half for each direction")
    require(micro_batches >= 2 * ranks, "micro_batches", micro_batches, f"must be at least 2 * ranks = {2 * ranks}")

    def program(rank: int) -> list[str]:
        return _eight_steps(ranks // 2, min(rank, ranks - 1 - rank), micro_batches // 2)

    return build("dualpipe", micro_batches, _two_way(ranks), ranks + 1, program)


def dualpipev(ranks: int, micro_batches: int) -> Schedule:
    """DualPipeV: one half of DualPipe, its other direction folded back into a V (FACTS.md section 6.1)."""
    _check_size(ranks, micro_batches)
    require(micro_batches >= 2 * ranks, "micro_batches", micro_batches, f"must be at least 2 * ranks = {2 * ranks}")

    def program(rank: int) -> list[str]:
        return _eight_steps(ranks, rank, micro_batches)

    return build("dualpipev", micro_batches, _v_shaped(ranks), 2 * ranks + 1, program)


def _eight_steps(half: int, k: int, micro_batches: int) -> list[str]:
    """The program of the k-th of `half` ranks between an end and the middle; `micro_batches` enter at each end."""
    main = (micro_batches - 2 * half + k + 1) * ["F0B1 F1B0"]
    if k == half - 1:
        main[0] = "F0 B1 F1B0"  # the published order leaves the first pair of the middle ranks apart
    full, halved = (["B1", "B0"] * (k + 1))[: k + 1], (["I1", "I0"] * (k + 1))[k + 1 :]
    return (
        2 * (half - k - 1) * ["F0"]  # 1
        + (k + 1) * ["F0 F1"]  # 2
        + (half - k - 1) * ["I1 W F1"]  # 3
        + main  # 4
        + (half - k - 1) * ["B1 F1B0"]  # 5
        + full + halved  # 6
        + (half - k - 1) * ["W I0"]  # 7
        + (k + 1) * ["W"]  # 8
    )  # fmt: skip


def _in_turn(forwards: list[str], backwards: list[str], ahead: int) -> list[str]:
    """`ahead` forwards, then a forward and a backward in turn, then the backwards that are left."""
    ahead = min(ahead, len(forwards))
    steady = [word for turn in zip(forwards[ahead:], backwards, strict=False) for word in turn]
    return forwards[:ahead] + steady + backwards[len(forwards) - ahead :]


def _check_size(ranks: int, micro_batches: int) -> None:
    require(ranks >= 1, "ranks", ranks, "must be at least 1")
    require(micro_batches >= 1, "micro_batches", micro_batches, "must be at least 1")


# Side by side ------------------------------------------------------------------------------------------------------

GENERATORS = (gpipe, one_f_one_b, interleaved_one_f_one_b, zb1p, zbv, dualpipe, dualpipev)
SCHEDULES = {generator.__name__: generator for generator in GENERATORS}


def bubble_formula(schedule: Schedule, F: float = 1, B: float = 2, W: float = 1, FB: float = 3) -> float | None:
    """The bubble by closed formula (V3 Table 2; FACTS.md section 6) for these times of one action; None for ZB-V.

    GPipe and interleaved 1F1B wait as 1F1B does. ZB1P's order keeps to its formula where W is at most F and at most
    B - W, DualPipe's where F = W = B / 2, whatever FB is; elsewhere they do better or worse.
    """
    waits_as = {"gpipe": "one_f_one_b", "interleaved_one_f_one_b": "one_f_one_b", "dualpipev": "dualpipe"}
    name = waits_as.get(schedule.name, schedule.name)
    stages = schedule.stages if name == "dualpipe" else len(schedule.actions)
    return BUBBLES[name](stages, F, B, W, FB) if name in BUBBLES else None


def compare(
    schedules: Iterable[Schedule], F: float = 1, B: float = 2, W: float = 1, FB: float = 3, transfer: float = 0
) -> list[dict[str, Any]]:
    """What each schedule costs with the same model on the same devices.

    The times are those of a device's even share of the model, so that where a rank holds n stages, its actions take an
    n-th. Parameters and activations are multiples of that share, the bubble is that of the worst rank.
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


def schedule_command(
    name: tyro.conf.Positional[Literal[*SCHEDULES]] = "dualpipe",
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
    """Check and simulate a pipeline schedule; print who does what when, and what it costs beside others.

    Args:
        name: The schedule.
        ranks: Devices in the pipeline.
        micro_batches: Micro-batches in a step, those of both directions together.
        F: Time of a forward.
        B: Time of a full backward.
        W: Time of its weight-gradient part.
        FB: Time of an overlapped forward and backward.
        transfer: Time from one rank to another.
        all: Compare with every schedule that takes this size, not only with 1F1B and ZB1P.
        json: Print actions and simulation as JSON.
        png: Write a picture of it here too.
    """
    schedule = SCHEDULES[name](ranks, micro_batches)
    schedule.check()
    costs = dict(F=F, B=B, W=W, FB=FB, transfer=transfer)
    timeline = schedule.simulate(**costs)
    if png is not None:
        title = f"{name}: {ranks} ranks, {micro_batches} micro-batches"
        figure = draw(timeline, title, f"forward = {F:g}", size=(14, 1.2 + 0.45 * ranks))
        figure.savefig(png, format="png", dpi=120)
    compared, refused = [], []
    for other in SCHEDULES if all else dict.fromkeys((name, "one_f_one_b", "zb1p")):
        try:
            compared.append(SCHEDULES[other](ranks, micro_batches))
        except ValueError as error:
            refused.append(f"{other} does not take this size: {error}")
    rows = compare(compared, **costs)
    if json:
        print(dumps(_as_json(schedule, timeline) | ({"comparison": rows} if all else {})))
        return
    print(gantt(timeline))
    print(f"\nThe same model on {ranks} devices; where a rank holds n stages, actions are n times as short.")
    print("Parameters and activations are in even shares of the model.")
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
