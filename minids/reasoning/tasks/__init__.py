"""Families of problems whose answers a rule can verify."""

from typing import Literal

from minids.reasoning.tasks.program import ProgramTask
from minids.reasoning.tasks.signs import SignsTask
from minids.reasoning.tasks.task import CorpusStyle, Problem, Task, template
from minids.reasoning.tasks.trace import TraceTask

__all__ = ["TASKS", "CorpusStyle", "Problem", "ProgramTask", "SignsTask", "Task", "TaskName", "TraceTask", "template"]

TASKS: dict[str, type[Task]] = {"trace": TraceTask, "program": ProgramTask, "signs": SignsTask}


TaskName = Literal["trace", "program", "signs"]
