"""`minids r1`: train R1 from a base model stage by stage, and distil it into a student."""

import dataclasses
import shlex
from pathlib import Path

from minids.cli.options import Device, call, check_resume, choose_device
from minids.reasoning.r1 import SHORT, STAGES, R1Recipe, R1Run, StageStopped, ledger_table
from minids.training.run import new_run

BESIDE_RESUME = {"--resume", "--stages", "--device"}


def run(command: str, arguments: list[str]) -> None:
    check_resume(arguments, BESIDE_RESUME, "a resumed run keeps its settings")
    call(r1_command, command, arguments)


def r1_command(
    short: bool = False,
    seed: int = 0,
    stages: tuple[str, ...] = tuple(STAGES),
    name: str | None = None,
    resume: Path | None = None,
    device: Device = "auto",
) -> None:
    """Train R1 from a base model stage by stage, distil it into a small student, and store the run under runs/.

    Args:
        short: Quick demonstration: fewer steps and problems in every stage.
        seed: Seed of the initial weights, the problems and the sampling; change it to measure the spread.
        stages: Run only these stages and those that they depend on; by default all.
        name: Name of the run's folder under runs/; by default r1, or r1-short.
        resume: Folder of a run to resume; short and seed are then read from there.
        device: Device to train on; auto selects CUDA where available.
    """
    device = choose_device(device)
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"stages: there is no {unknown[0]!r}, only {', '.join(STAGES)}")
    if not stages:
        raise ValueError(f"stages: name at least one of {', '.join(STAGES)}")
    directory = resume or new_run(name or ("r1-short" if short else "r1"))
    recipe = dataclasses.replace(SHORT if short else R1Recipe(), seed=seed)
    made = R1Run.load(directory, device) if resume else R1Run.begin(directory, recipe, device)
    try:
        print(ledger_table(made.run(stages)))
    except StageStopped:
        print(f"\nStopped. Resume with:\n    python -m minids r1 --resume {shlex.quote(str(directory))}")
        return
    print(f"Stored in {directory}/: ledger.json, and for each stage checkpoints, metrics, examples and answers")
