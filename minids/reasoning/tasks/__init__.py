"""Families of problems whose answers a rule can verify."""

from typing import Literal

from minids.reasoning.tasks.program import ProgramTask
from minids.reasoning.tasks.task import CorpusStyle, Problem, Task, template
from minids.reasoning.tasks.trace import TraceTask

__all__ = ["TASKS", "CorpusStyle", "Problem", "ProgramTask", "Task", "TaskName", "TraceTask", "template"]

TASKS: dict[str, type[Task]] = {"trace": TraceTask, "program": ProgramTask}


TaskName = Literal["trace", "program"]
