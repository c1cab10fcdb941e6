"""The sandbox: a program from a model in a process of its own, and the judge outside."""

from minids.course.diagrams import Diagram
from minids.sandbox.judge import Limits


def sandbox(limits: Limits | None = None) -> Diagram:
    """Draw how a program is judged; the numbers are the default limits."""
    limit = limits or Limits()
    d = Diagram(17.2, 6.4, "Expected results stay outside, so a program has no verdict to forge")
    d.frame(0.2, 0.3, 7.2, 6.1, "judge: a process that runs nothing of the model's")
    d.box("tests", 2.2, 4.6, "hidden tests", "inputs, results", "tensor", 3.0, 0.9)
    d.box("compare", 4.9, 1.3, "equal?", "", "operation", 2.4, 0.9)
    d.box("verdict", 1.7, 1.3, "verdict", "reward 1 or 0", "tensor", 2.4, 0.9)
    d.frame(10.9, 0.3, 17.0, 6.1, "isolated process, killed after the verdict", "cache")
    d.box("program", 13.9, 3.1, "program", "written by the model", "tensor", 3.6, 1.0)
    d.note(11.2, 1.0, f"no network, none of your files,\n{limit.memory // 2**20} MiB, {limit.seconds:g} s")
    d.box("call", 5.6, 4.6, "one call", "f(3)", "operation", 2.2, 0.9)
    d.arrow("tests", "call")
    d.path([(6.7, 4.6), (13.9, 4.6), (13.9, 3.6)])
    d.note(9.05, 4.9, "input only", align="center")
    d.path([(12.1, 3.1), (4.9, 3.1), (4.9, 1.75)])
    d.note(9.05, 3.4, "plain data back", align="center")
    d.path([(2.2, 4.15), (2.2, 2.6), (4.2, 2.6), (4.2, 1.75)])
    d.note(2.35, 3.5, "expected")
    d.arrow("compare", "verdict")
    return d
