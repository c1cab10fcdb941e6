"""Judge a program in a given isolation, and find the processes that it leaves behind."""

import contextlib
import os
import sys
import textwrap
import time
from pathlib import Path

import pytest

from minids.sandbox import judge as module
from minids.sandbox.judge import Limits, Verdict, parse

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="untested on other systems")
PATIENT = Limits(seconds=20.0)
HASTY = Limits(seconds=0.5)


def judged_in(isolation, program, tests, limits=PATIENT) -> Verdict:
    return module.judge(textwrap.dedent(program), parse(tests), isolation, limits)


def descendants() -> set[int]:
    """Living processes below this one (dead ones are collected on the way)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                parents[int(entry.name)] = int(parent), state
    for pid, (parent, state) in list(parents.items()):
        if parent == os.getpid() and state == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            del parents[pid]
    found, edge = set(), {os.getpid()}
    while edge:
        edge = {pid for pid, (parent, _) in parents.items() if parent in edge} - found
        found |= edge
    return found


def gone_within(seconds: float, remaining) -> bool:
    deadline = time.monotonic() + seconds
    while remaining() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not remaining()
