"""How torch's threads wait, and how many there are: environment variables, set before torch is imported.

OpenMP reads its variables once, when torch loads it. By default a thread that waits for others spins; where other
processes have the processors it spins in the place of the thread that it waits for, and training takes several times as
long (benchmarks/busy_machine.py). `OMP_WAIT_POLICY=passive` has it sleep. OpenMP starts a thread for each processor of
the process, also in a container whose quota is smaller; then the threads are throttled together.
"""

import os
from collections.abc import Mapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def openmp_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to `environment`; none that it has, since the user's own settings hold."""
    settings = {"OMP_WAIT_POLICY": "passive"}
    quota, processors = processor_quota(), _processors()
    if quota is not None and quota < processors:
        settings["OMP_NUM_THREADS"] = str(max(1, int(quota)))
    return {name: value for name, value in settings.items() if name not in environment}


def processor_quota(cgroup: Path = CGROUP) -> float | None:
    """Return how many processors a container may use on average (cgroup v2 or v1), or None where no limit is set."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
