"""The checker says what is wrong in words, recognises known mistakes, and never raises."""

import functools
import math

import pytest
import torch

from minids.course import checks
from minids.course.answers import LocalAnswer
from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.compare import Wrong, compare


def double(x):
    return 2 * x


def in_place(x):
    return x.mul_(2)


def crash(x):
    return x @ x


DOUBLE = Function(
    id="0.1",
    name="double",
    reference=double,
    examples=lambda generator: [(torch.randn(2, 3, generator=generator),), (torch.randn(4, generator=generator),)],
    mistakes={"x is squared": lambda x: x * x, "the sign is lost": lambda x: 2 * x.abs()},
    hints=("what is one and one?", "add x to itself"),
    section="chapter 00, section 1",
    points=2,
)
ADD = SpotTheBug(
    id="0.2",
    name="test_add",
    right=lambda a, b: a + b,
    bugs=(
        Bug("it subtracts", lambda a, b: a - b, "try 1 and 2"),
        Bug("it forgets to carry", lambda a, b: (a + b) % 10, "try large numbers"),
    ),
)


def checked(exercise, answer, careful=False):
    return exercise.check(LocalAnswer(exercise.name, answer), careful)


def test_a_right_answer_earns_its_points():
    report = checked(DOUBLE, lambda x: x + x)
    assert (report.status, report.points, report.out_of) == ("passed", 2, 2)
    assert repr(report) == "✓ 0.1 double: passed"


def test_a_hole_is_not_started_yet():
    def hole(x):
        raise NotImplementedError("your turn")

    assert repr(checked(DOUBLE, hole)) == "○ 0.1 double: not started yet"
    assert checked(DOUBLE, hole).points == 0
    assert checked(ADD, hole).status == "todo"


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda x: x, "6 of 6 values differ; the first at [0, 0]"),
        (lambda x: x, 'for a hint, run hint("0.1")'),
        (lambda x: x * x, "this is what comes out when x is squared"),
        (lambda x: 2 * x.abs(), "this is what comes out when the sign is lost"),
        (lambda x: 2 * x[:1], "should have shape (2, 3), got (1, 3)"),
        (lambda x: (2 * x).double(), "should be of torch.float32, got torch.float64"),
        (lambda x: None, "should be a tensor, got None"),
        (in_place, "your code changed the argument `x`; return a new value instead"),
        (crash, "your code raised RuntimeError"),
        (7, "double should be a function, got 7"),
        (lambda x: 2 * x if x.ndim == 2 else x, "on example 2 of 2, x = a tensor of shape (4,)"),
    ],
)
def test_a_wrong_answer_is_told_why(answer, words):
    report = checked(DOUBLE, answer)
    assert (report.status, report.points) == ("failed", 0)
    assert words in repr(report)


def test_a_mistake_on_some_examples_only_is_not_given_its_name():
    sometimes = checked(DOUBLE, lambda x: x * x if x.ndim == 2 else x)
    assert "squared" not in repr(sometimes)


def careful(add):
    assert add(1, 2) == 3
    assert add(17, 5) == 22


def too_small(add):
    assert add(1, 2) == 3


@pytest.mark.parametrize(
    "test, points, words",
    [
        (careful, 2, "✓ it catches: it forgets to carry"),
        (too_small, 1, "✗ it misses a bug; hint: try large numbers"),
        (lambda add: None, 0, "it accepts everything so far"),
        (lambda add: 1 / 0, 0, "it rejects the correct implementation"),
        ("a test", 0, "test_add should be a function"),
    ],
)
def test_a_test_is_judged_by_the_bugs_it_catches(test, points, words):
    report = checked(ADD, test)
    assert report.points == points and words in repr(report)
    assert (report.status == "passed") == (points == report.out_of)


def test_a_missed_bug_is_not_given_away():
    assert "forgets to carry" not in repr(checked(ADD, too_small))


@pytest.mark.parametrize(
    "got, wanted, words",
    [
        (
            torch.ones(3),
            (torch.ones(3), torch.ones(3)),
            r"a tuple of 2: indices, weights; got a tensor of shape \(3,\)",
        ),
        ((torch.ones(3), torch.ones(2)), (torch.ones(3), torch.ones(3)), "weights should have shape"),
        (1152, 70272, "got 1152, expected 70272"),
        (None, 0.5, "should be a number, got None"),
        (0.25, 0.5, "got 0.25, expected 0.5"),
        (3.0, 3, "the value is correct, but return an int, not a float"),
        (torch.tensor(3), 3, "the value is correct, but return an int, not a tensor"),
        (1, True, "the value is correct, but return a bool, not an int"),
        ([1, 2, 4], [1, 2, 3], r"result\[2\]: got 4, expected 3\n  got      \[1, 2, 4\]\n  expected \[1, 2, 3\]"),
        ([1, 2], [1, 2, 3], r"should have 3 parts, not 2: got \[1, 2\], expected \[1, 2, 3\]"),
        (torch.tensor([1.0, 2]), torch.tensor([1.0, 3]), r"got      \[1.0, 2.0\]\n  expected \[1.0, 3.0\]"),
        (torch.tensor([1j]), torch.tensor([-1j]), r"the first at \[0, 1\]: got 1, expected -1"),
    ],
)
def test_a_difference_in_words(got, wanted, words):
    parts = ("indices", "weights") if isinstance(wanted, tuple) else ()
    with pytest.raises(Wrong, match=words):
        compare(got, wanted, "the result", parts)


def test_nan_equals_nan():
    compare((1, torch.tensor([math.nan])), (1, torch.tensor([math.nan])), "equal values")


def test_an_error_in_the_answer_gives_no_hint_about_the_algorithm():
    report = checked(DOUBLE, crash)
    assert len(report.lines) == 1 and report.lines[0].startswith("your code raised RuntimeError")


SQUARE = Function(
    id="0.3", name="square", reference=lambda x: (x * x).sum(), hints=(), mistakes={},
    examples=lambda generator: [(torch.randn(3, generator=generator),)], gradients=("x",),
    cost=lambda arguments, seen: "loops are asked for, not einsum" if "einsum" in seen.functions else None,
)  # fmt: skip


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda x: (x * x.detach()).sum(), "the gradient of the result with respect to `x`"),
        (lambda x: (x * x).sum().detach(), "the gradient of the result with respect to `x`"),
        (lambda x: torch.einsum("i,i->", x, x), "the result is correct, but loops are asked for, not einsum"),
    ],
)
def test_gradients_and_costs_are_compared(answer, words):
    assert checked(SQUARE, lambda x: (x**2).sum()).status == "passed"
    report = checked(SQUARE, answer)
    assert report.status == "failed" and words in repr(report)


def test_a_test_that_counts_its_calls_earns_nothing_where_that_matters():
    def counting(add, calls=[]):  # noqa: B006 - it remembers
        calls.append(1)
        assert len(calls) == 1

    assert checked(ADD, counting).points == 2, "in a learner's own notebook, nobody is deceived but the learner"
    earned = [checked(ADD, functools.partial(counting, calls=[]), careful=True).points for _ in range(50)]
    assert sum(earned) == 0
    assert checked(ADD, careful, careful=True).points == 2


def test_an_error_of_an_implementation_does_not_say_which_one_it_is():
    def named(add):
        try:
            add()
        except Exception as error:
            assert "right" in str(error) or "lambda" in str(error) or "add" in str(error)

    assert checked(ADD, named).points == checked(ADD, named, careful=True).points == 0

    def unfinished(a, b):
        raise NotImplementedError

    bug = Bug("it is not written", unfinished, "call it")
    report = checked(SpotTheBug("0.6", "test_add", lambda a, b: a + b, (bug,)), careful)
    assert report.status == "passed", "an error of the bug is no sign that the learner has not started"


MEASURE = Experiment("0.4", "measure", "share of heads", low=0.4, high=0.6, seeds=(0, 1, 2), section="section 1")


@pytest.mark.parametrize(
    "answer, status, words",
    [
        (lambda seed: 0.5 + 0.04 * seed, "passed", "share of heads: median 0.54, from 0.5 to 0.58 over 3 seeds"),
        (lambda seed: 0.7, "failed", "expected: a median between 0.4 and 0.6"),
        (lambda seed: "0.5", "failed", "the function should return a float, got '0.5'"),
        (lambda seed: math.nan, "failed", "the function should return a float, got nan"),
        (lambda seed: 1 / 0, "failed", "your code raised ZeroDivisionError"),
    ],
)
def test_an_experiment_is_judged_by_its_median(answer, status, words):
    report = checked(MEASURE, answer)
    assert report.status == status and words in repr(report) and report.points == 2 * (status == "passed")


def test_an_open_task_shows_its_rubric_and_has_no_points():
    report = checked(OpenTask("0.5", "essay", ("names the price", "names the gain")), None)
    assert report.status == "open" and report.out_of == 0
    assert repr(report) == "○ 0.5 essay: an open task, without points\n  - names the price\n  - names the gain"


def test_hints_come_one_by_one_and_end_with_the_section(monkeypatch, capsys):
    monkeypatch.setattr(checks, "exercises", lambda chapter: [DOUBLE])
    for _ in range(4):
        checks.hint("0.1")
    first, second, *last = capsys.readouterr().out.splitlines()
    assert first == "0.1, hint 1 of 2: what is one and one?" and second == "0.1, hint 2 of 2: add x to itself"
    assert last == ["0.1: chapter 00, section 1"] * 2


def test_a_prediction_is_compared_with_what_was_measured(capsys):
    prediction = checks.predict("How many bytes?", 50)
    assert repr(prediction) == "How many bytes? Your prediction: 50. Now run the next cell."
    prediction.compare(100.0)
    assert capsys.readouterr().out == "How many bytes? You predicted 50 (0.5 times it); it is 100.\n"


def test_a_check_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(checks, "exercises", lambda chapter: [DOUBLE])
    state = torch.get_rng_state()
    checks.check("0.1", lambda x: torch.randn(2, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="chapter 99 has no exercises"):
        checks.check("99.1", double)
    with pytest.raises(ValueError, match="there is no exercise '0.99'"):
        checks.check("0.99", double)


def test_the_report_shows_in_colour_and_escapes_what_it_quotes():
    page = checked(DOUBLE, lambda x: f"<b>{x.shape}</b>")._repr_html_()
    assert page.startswith("<pre style=") and "<b>" not in page
