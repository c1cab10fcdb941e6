"""The checker says what is wrong in words, recognises known mistakes, and never raises."""

import pytest
import torch

from minids.course import checks
from minids.course.checks import Bug, Function, SpotTheBug, Wrong, compare


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
    hint="what is one and one?",
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


def test_a_right_answer_earns_its_points():
    report = DOUBLE.check(lambda x: x + x)
    assert (report.status, report.points, report.out_of) == ("passed", 2, 2)
    assert repr(report) == "✓ 0.1 double: passed"


def test_a_hole_is_not_started_yet():
    def hole(x):
        raise NotImplementedError("your turn")

    assert repr(DOUBLE.check(hole)) == "○ 0.1 double: not started yet"
    assert DOUBLE.check(hole).points == 0
    assert ADD.check(hole).status == "todo"


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda x: x, "6 of 6 values differ; the first at [0, 0]"),
        (lambda x: x, "hint: what is one and one?"),
        (lambda x: x * x, "this is what comes out when x is squared"),
        (lambda x: 2 * x.abs(), "this is what comes out when the sign is lost"),
        (lambda x: 2 * x[:1], "should have shape (2, 3), got (1, 3)"),
        (lambda x: (2 * x).double(), "should be of torch.float32, got torch.float64"),
        (lambda x: None, "should be a tensor, got None"),
        (in_place, "changed in place"),
        (crash, "your code raised RuntimeError"),
        (7, "double should be a function, got 7"),
        (lambda x: 2 * x if x.ndim == 2 else x, "on example 2 of 2, (a tensor of shape (4,))"),
    ],
)
def test_a_wrong_answer_is_told_why(answer, words):
    report = DOUBLE.check(answer)
    assert (report.status, report.points) == ("failed", 0)
    assert words in repr(report)


def test_a_mistake_on_some_examples_only_is_not_given_its_name():
    sometimes = DOUBLE.check(lambda x: x * x if x.ndim == 2 else x)
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
        (lambda add: 1 / 0, 0, "it rejects the right implementation"),
        ("a test", 0, "test_add should be a function"),
    ],
)
def test_a_test_is_judged_by_the_bugs_it_catches(test, points, words):
    report = ADD.check(test)
    assert report.points == points and words in repr(report)
    assert (report.status == "passed") == (points == report.out_of)


def test_a_missed_bug_is_not_given_away():
    assert "forgets to carry" not in repr(ADD.check(too_small))


def test_comparison_explains_the_kind_first():
    with pytest.raises(Wrong, match=r"2 things \(indices, weights\), got a tensor of shape \(3,\)"):
        compare(torch.ones(3), (torch.ones(3), torch.ones(3)), "the result", ("indices", "weights"))
    pair = torch.ones(3), torch.ones(3)
    with pytest.raises(Wrong, match="weights should have shape"):
        compare((torch.ones(3), torch.ones(2)), pair, "the result", ("indices", "weights"))
    with pytest.raises(Wrong, match="should be 70272, got 1152"):
        compare(1152, 70272, "the result")
    with pytest.raises(Wrong, match="should be a number, got None"):
        compare(None, 0.5, "the result")
    with pytest.raises(Wrong, match="should be 0.5, got 0.25"):
        compare(0.25, 0.5, "the result")
    quarter_turn = torch.tensor([1j])
    with pytest.raises(Wrong, match=r"the first at \[0, 1\]: got 1, expected -1"):
        compare(quarter_turn, quarter_turn.conj().resolve_conj(), "the rotation")
    compare((1, torch.tensor([float("nan")])), (1, torch.tensor([float("nan")])), "equal things")


def test_a_check_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(checks, "exercises", lambda chapter: [DOUBLE])
    state = torch.get_rng_state()
    checks.check("0.1", lambda x: torch.randn(2, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="chapter 99 has no exercises"):
        checks.check("99.1", double)


def test_the_report_shows_in_colour_and_escapes_what_it_quotes():
    page = DOUBLE.check(lambda x: f"<b>{x.shape}</b>")._repr_html_()
    assert page.startswith("<pre style=") and "<b>" not in page
