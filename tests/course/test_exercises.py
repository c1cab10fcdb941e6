"""Each exercise can be solved, cannot be passed by doing nothing, and names the mistakes it knows."""

import contextlib
import inspect
import io
import re

import pytest
import torch
from notebooks import CHAPTERS, EXERCISES, SOLUTIONS, chapter_number

from minids.course.checks import Function, SpotTheBug, check, exercises, graded
from minids.course.compare import describe
from minids.course.notebooks import read

ALL = [exercise for path in SOLUTIONS for exercise in graded(chapter_number(path))]  # all but open tasks
FUNCTIONS = [exercise for exercise in ALL if isinstance(exercise, Function)]
MISTAKES = [(exercise, words) for exercise in FUNCTIONS for words in exercise.mistakes]


def names_in(paths):
    """Everything the notebooks define, by chapter."""
    spaces = {}
    for path in paths:
        space = spaces[chapter_number(path)] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            for cell in read(path).cells:
                if cell.cell_type == "code":
                    exec(compile(cell.source, path.name, "exec"), space)
    return spaces


@pytest.fixture(scope="module")
def solved():
    return names_in(SOLUTIONS)


@pytest.fixture(scope="module")
def empty():
    return names_in(EXERCISES)


def chapter(exercise):
    return int(exercise.id.split(".")[0])


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.name)
def test_a_chapter_asks_for_enough(path):
    number = chapter_number(path)
    asked = exercises(number)
    assert [exercise.id for exercise in asked] == [f"{number}.{i + 1}" for i in range(len(asked))]
    assert len(asked) >= 4
    assert number < 2 or any(isinstance(exercise, SpotTheBug) for exercise in asked)


@pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.id)
def test_the_solution_passes_and_the_hole_is_not_started(exercise, solved, empty):
    report = check(exercise.id, solved[chapter(exercise)][exercise.name])
    assert report.status == "passed" and report.points == exercise.points, report
    assert check(exercise.id, empty[chapter(exercise)][exercise.name]).status == "todo"


@pytest.mark.parametrize("exercise, words", MISTAKES, ids=[f"{e.id}: {words}" for e, words in MISTAKES])
def test_a_known_mistake_is_called_by_its_name(exercise, words):
    report = check(exercise.id, exercise.mistakes[words])
    assert (report.status, report.points) == ("failed", 0)
    assert f"this is what comes out when {words}" in repr(report), report


@pytest.mark.parametrize("exercise", FUNCTIONS, ids=lambda exercise: exercise.id)
def test_messages_name_the_arguments_as_the_notebook_does(exercise, solved):
    asked = list(inspect.signature(solved[chapter(exercise)][exercise.name]).parameters)
    assert exercise.parameters[: len(asked)] == asked
    assert set(exercise.gradients) <= set(asked)


HEADINGS = {
    chapter_number(path): {
        number
        for cell in read(path).cells
        if cell.cell_type == "markdown"
        for number in re.findall(r"^##+ (\d+(?:\.\d+)?)", cell.source, re.MULTILINE)
    }
    for path in CHAPTERS
}


@pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.id)
def test_two_hints_and_then_a_section_that_the_chapter_has(exercise):
    assert len(exercise.hints) == 2 and len(set(exercise.hints)) == 2
    assert exercise.section.startswith(f"chapter {chapter(exercise):02d}, section")
    places = re.findall(r"sections? ([\d., andto]+)", exercise.section)
    sections = re.findall(r"\d+(?:\.\d+)?", " ".join(places))
    assert sections and set(sections) <= HEADINGS[chapter(exercise)]


INTERNAL = re.compile(r"pitfall|\bbug [a-z]\b|FACTS|ERRATA|re-mak|\bdear\b|\breaders?\b", re.IGNORECASE)


@pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.id)
def test_a_learner_sees_no_internal_words(exercise):
    own = [*getattr(exercise, "mistakes", ()), *(bug.name + bug.hint for bug in getattr(exercise, "bugs", ()))]
    for text in (*own, *exercise.hints, *getattr(exercise, "outputs", ())):
        assert not INTERNAL.search(text), text


CONSTANTS = (None, NotImplemented, True, False, 0, 1, 0.0, 1.0, "", (), [], torch.tensor(0.0), torch.ones(1))


def zeros_like(value, zeros=torch.zeros_like):
    if isinstance(value, torch.Tensor):
        return zeros(value)
    return tuple(zeros_like(part, zeros) for part in value) if isinstance(value, tuple | list) else type(value)()


def right_answer(exercise):
    """The correct implementation; an experiment has none."""
    return getattr(exercise, "reference", getattr(exercise, "right", None))


def same_chapter(exercise, other):
    return chapter(exercise) == chapter(other) and right_answer(exercise) is not right_answer(other)


@pytest.mark.parametrize("exercise", FUNCTIONS, ids=lambda exercise: exercise.id)
def test_doing_nothing_earns_nothing(exercise):
    """Blank and constant answers, each result of the examples among them, and what is copied from another exercise."""
    results = [exercise.reference(*given) for given in exercise.examples(torch.Generator().manual_seed(0))]
    lazy = {f"always {describe(value)}": lambda *_, value=value: value for value in [*CONSTANTS, *results]}
    lazy |= {f"argument {i}": lambda *arguments, i=i: arguments[i] for i in (0, -1)}
    lazy["zeros"] = lambda *arguments: zeros_like(exercise.reference(*arguments))
    lazy["ones"] = lambda *arguments: zeros_like(exercise.reference(*arguments), torch.ones_like)
    lazy |= {f"that of {other.id}": right_answer(other) for other in ALL if same_chapter(exercise, other)}
    for name, answer in lazy.items():
        assert check(exercise.id, answer).points == 0, name


@pytest.mark.parametrize("exercise", [e for e in ALL if isinstance(e, SpotTheBug)], ids=lambda exercise: exercise.id)
def test_a_test_that_tests_nothing_earns_nothing(exercise):
    def rejects_all(implementation):
        raise AssertionError

    def only_calls(implementation):
        with contextlib.suppress(Exception):
            implementation()

    def asks_who_it_is(implementation):
        assert implementation.__name__ == "<lambda>" and not implementation.__defaults__ and implementation is not None

    for answer in (rejects_all, only_calls, asks_who_it_is, *(lambda implementation, v=v: v for v in CONSTANTS)):
        assert check(exercise.id, answer).points == 0, answer
    for other in (other for other in FUNCTIONS if same_chapter(exercise, other)):
        assert check(exercise.id, other.reference).points == 0, other.id


@pytest.mark.parametrize("exercise", [e for e in ALL if isinstance(e, SpotTheBug)], ids=lambda exercise: exercise.id)
def test_options_of_the_implementations_are_out_of_a_learners_reach(exercise):
    """An argument that only one of them takes would tell them apart."""
    everything = {name for each in implementations(exercise) for name in inspect.signature(each).parameters}
    public = {p.name for p in inspect.signature(exercise.right).parameters.values() if p.kind != p.KEYWORD_ONLY}
    for name in [*(everything - public), "no such option"]:

        def asks_for_an_option(implementation, name=name):
            try:
                implementation(**{name: None})
            except Exception as error:
                assert "implementation" not in str(error)

        assert check(exercise.id, asks_for_an_option).points == 0, name


def implementations(exercise):
    return [exercise.right, *(bug.implementation for bug in exercise.bugs)]


def test_every_exercise_module_has_its_notebook():
    import minids.course.exercises as package

    modules = sorted(path.stem for path in __import__("pathlib").Path(package.__path__[0]).glob("chapter[0-9][0-9].py"))
    assert modules == [f"chapter{chapter_number(path):02d}" for path in SOLUTIONS]
