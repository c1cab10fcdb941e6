"""How a check calls an answer, and the report that it makes."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from minids.course.compare import Wrong, describe
from minids.course.observation import Observation, observe, place
from minids.course.wire import Broken, NotDefined, Raised

Implementation = Callable[..., Any]


class Answer(Protocol):
    """What a check may do with an answer. Both methods raise what the answer raises."""

    def observe(self, arguments: tuple, differentiate: tuple[int, ...] = (), watch: bool = False) -> Observation: ...

    def test(self, implementation: Implementation) -> None: ...


@dataclass(frozen=True)
class LocalAnswer:
    """An answer in this process: a learner's own notebook."""

    name: str
    answer: Any

    def observe(self, arguments: tuple, differentiate: tuple[int, ...] = (), watch: bool = False) -> Observation:
        return observe(self._callable(), arguments, differentiate, watch)

    def test(self, implementation: Implementation) -> None:
        self._callable()(implementation)

    def _callable(self) -> Implementation:
        if not callable(self.answer):
            raise Wrong(f"{self.name} should be a function, got {describe(self.answer)}")
        return self.answer


@dataclass(frozen=True)
class Report:
    """Outcome of one check: `status` is passed, failed, todo, error or open; `lines` explain it."""

    id: str
    name: str
    status: str
    points: int
    out_of: int
    lines: tuple[str, ...] = ()

    def __repr__(self) -> str:
        words = {
            "passed": "✓ {}: passed",
            "failed": "✗ {}: not yet",
            "error": "✗ {}: could not be checked",
            "todo": "○ {}: not started yet",
            "open": "○ {}: an open task, without points",
        }[self.status]
        return "\n".join((words.format(f"{self.id} {self.name}"), *(f"  {line}" for line in self.lines)))

    def _repr_html_(self) -> str:
        color = {"passed": "#009E73", "failed": "#D55E00", "error": "#D55E00"}.get(self.status, "#888888")
        return f'<pre style="border-left: 4px solid {color}; padding-left: 8px">{html.escape(repr(self))}</pre>'


class CodeRaised(Wrong):
    """The answer raised an error of its own."""


def carefully(call: Callable[[], Observation]) -> Observation:
    """Observe a call. Raises `CodeRaised` for an error in the answer, with the line of the learner's code."""
    try:
        return call()
    except (NotImplementedError, NotDefined, Broken, Wrong):
        raise
    except Exception as error:
        raise CodeRaised(in_words(error)) from None


def complaint(answer: Answer, implementation: Implementation) -> str | None:
    """Return the error of a learner's test on an implementation, None if it passes."""
    try:
        answer.test(implementation)
    except (NotImplementedError, NotDefined, Broken, Wrong):
        raise
    except Exception as error:
        words = in_words(error)
        if "TimeoutError: took too long" in words:
            raise Wrong("your test took too long") from None
        return words
    return None


def in_words(error: Exception) -> str:
    words = str(error) if isinstance(error, Raised) else f"{type(error).__name__}: {error}{place(error)}"
    return f"your code raised {words}".replace("\n", " ")
