"""One real run, watched: the command for the devices there are, its processes and steps, and one process killed.

Notable choices:
- the run is torchrun and the command line, as on a cluster; nothing of it happens in the notebook's own process;
- whatever ends the watching, an error or an interrupted kernel too, no process of the run is left;
- no time decides: the process is killed after a step that the metrics file shows.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # comes with ipykernel
from matplotlib.figure import Figure

from minids.course import plots

STEPS, EVERY, KILL_AFTER = 20, 5, 8  # of a run; between checkpoints; the step after which a process is killed
ATTEMPTS = 3
PATIENCE = 10  # seconds until processes that should end are killed
TRAIN = (
    "-m minids train --preset nano --name run --data stdlib --max-bytes 200000 --tokenizer bytes --warmup-steps 5 "
    f"--steps {STEPS} --checkpoint-every {EVERY} --evaluate-every {STEPS} --evaluation-batches 1 --seq-len 32"
)


@dataclass(frozen=True)
class Launch:
    """Processes of a run, and the device that they compute on."""

    processes: int
    device: str

    @property
    def backend(self) -> str:
        """The library of the collectives."""
        return "NCCL" if self.device == "cuda" else "gloo"

    @property
    def layout(self) -> str:
        """Expert and data parallel, as far as the number of processes allows."""
        return "ep=2" if self.processes % 2 == 0 else f"dp={self.processes}"

    @property
    def command(self) -> list[str]:
        """The command line, without the Python that runs it; two sequences per process and step."""
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={self.processes} --max-restarts=3"
        own = f"--device {self.device} --parallel {self.layout} --batch-size {2 * self.processes}"
        return f"{torchrun} {TRAIN} {own}".split()


def launches(gpus: int) -> list[Launch]:
    """Choose the runs for a machine: a process per GPU where there are several, otherwise four on the CPU.

    NCCL allows one process per GPU, so a single GPU cannot show several: it gets a run of one process in addition.
    """
    if gpus > 1:
        return [Launch(gpus, "cuda")]
    return [Launch(4, "cpu"), *[Launch(1, "cuda")] * gpus]


@dataclass
class Watched:
    """What was seen of a run. Times are seconds since its start; a process is a rank's, from one start to its end."""

    steps: list[tuple[float, int]] = field(default_factory=list)
    processes: dict[int, "Life"] = field(default_factory=dict)  # by process id
    killed: tuple[float, int, int] | None = None  # when, which rank, after which step
    code: int | None = None

    @property
    def seconds(self) -> float:
        """How long the run took."""
        return self.steps[-1][0]

    @property
    def resumed_from(self) -> int:
        """The step that the run fell back to after the kill, as far as it was seen."""
        assert self.killed is not None
        return min(step for when, step in self.steps if when >= self.killed[0])


@dataclass
class Life:
    """A process of a rank: when it was first and last seen."""

    rank: int
    first: float
    last: float


def watch(command: Sequence[str], folder: Path, kill: bool = True) -> Watched:
    """Run `python COMMAND` in `folder`, log to log.txt; with `kill`, kill a random rank's process in the middle.

    The metrics are expected in runs/run. A run that ended before it could be killed, as on a busy computer whose turns
    are long, is repeated. No process is left when this returns or raises.
    """
    for _ in range(ATTEMPTS):
        seen = _watch_once(command, folder, kill)
        if seen.killed is not None or not kill or seen.code != 0:
            break
        shutil.rmtree(folder / "runs")
    return seen


def _watch_once(command: Sequence[str], folder: Path, kill: bool) -> Watched:
    seen, began = Watched(), time.monotonic()
    all_processes: set[psutil.Process] = set()
    with open(folder / "log.txt", "w") as log:
        agent = psutil.Popen([sys.executable, *command], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            while agent.poll() is None:
                now = time.monotonic() - began
                ranks = _ranks(agent)
                all_processes.update(ranks)
                for process, rank in ranks.items():
                    seen.processes.setdefault(process.pid, Life(rank, now, now)).last = now
                seen.steps.append((now, _steps_in(folder / "runs/run/metrics.jsonl")))
                step = seen.steps[-1][1]
                if kill and seen.killed is None and KILL_AFTER <= step < STEPS and ranks:
                    victim = random.choice(list(ranks))
                    with suppress(psutil.NoSuchProcess):
                        victim.kill()
                        seen.killed = now, ranks[victim], step
                time.sleep(0.05)
        finally:
            _end(agent, all_processes)
    seen.code = agent.returncode
    return seen


def _ranks(agent: psutil.Process) -> dict[psutil.Process, int]:
    """Return the living processes that torchrun has started, with their ranks."""
    found = {}
    try:
        for process in agent.children():
            try:
                found[process] = int(process.environ()["RANK"])
            except (psutil.Error, KeyError, ValueError):  # it is just starting, or ending
                continue
    except psutil.Error:
        pass
    return found


def _steps_in(path: Path) -> int:
    """Return the last step in metrics.jsonl, whose last line may be half written."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    complete = [line for line in lines if line.endswith("\n")]
    return json.loads(complete[-1])["step"] if complete else 0


def _end(agent: psutil.Popen, others: Iterable[psutil.Process]) -> None:
    """End torchrun, which ends its processes; kill what is left after some seconds."""
    everybody = set(others)
    try:
        everybody |= set(agent.children(recursive=True))
        agent.terminate()
        agent.wait(PATIENCE)
    except psutil.Error:  # it has ended, or does not end
        pass
    for process in (agent, *everybody):
        try:
            process.kill()  # psutil knows a process from another one that got its number
        except psutil.Error:
            continue
    psutil.wait_procs([agent, *everybody], timeout=10)
    agent.wait()


def draw_run(seen: Watched, launch: Launch) -> Figure:
    """Draw the steps over time, and below them the processes of the ranks, with the kill marked."""
    figure = Figure(figsize=(7.5, 3.9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(*zip(*seen.steps, strict=True), color=plots.COLORS[0])
    above.set(ylabel="steps in the metrics", ylim=(0, STEPS + 2))
    for life in seen.processes.values():
        look: dict[str, Any] = dict(color=plots.COLORS[5], ec="black", lw=0.6)
        below.barh(life.rank, life.last - life.first, 0.7, life.first, **look)
    below.set(xlabel="time since the start (s)", ylabel="rank", yticks=range(launch.processes), xlim=(0, seen.seconds))
    below.invert_yaxis()
    below.set_title("a bar: a process, from its start to its end", fontsize=9)
    title = f"{launch.processes} processes, {launch.device}, {launch.backend}: {STEPS} steps"
    if seen.killed is not None:
        when, rank, _ = seen.killed
        for axes in (above, below):
            axes.axvline(when, color=plots.COLORS[1], linestyle="--")
        below.plot([when], [rank], "X", color=plots.COLORS[1], markersize=11)
        title = f"After the kill of rank {rank} all ranks restart from the newest checkpoint"
    above.set_title(title)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
