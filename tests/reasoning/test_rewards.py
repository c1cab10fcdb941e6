import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from minids.data.tokenizer import ByteTokenizer, SymbolTokenizer
from minids.reasoning.rewards import (
    R1_ZERO_WEIGHTS,
    RuleReward,
    Score,
    apply_reward,
    exact_answer,
    has_format,
    language_consistency,
    read_response,
    unit_tests,
)
from minids.reasoning.tasks import Problem
from minids.reasoning.tasks.task import SYMBOLS
from minids.sandbox.judge import Verdict

PROBLEM = Problem("a7 b+8?", "15")


def read(text, tokenizer=None):
    tokenizer = tokenizer or ByteTokenizer()
    return read_response(tokenizer.encode(text, allow_special=True), tokenizer)


RIGHT = "<think>7+8=15</think><answer>15</answer><eos>"


def test_the_template_earns_both_rewards():
    response = read(RIGHT)
    assert response.thought == "7+8=15" and response.answer == "15" and response.ended
    assert exact_answer(PROBLEM, response) == 1 and has_format(response) == 1
    assert exact_answer(Problem("", "16"), response) == 0
    assert read("<think></think><answer>15</answer><eos>").well_formed  # an empty thought has the form


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<eos>",
        "15<eos>",
        "<think>7+8=15</think>15<eos>",
        "<think>7+8=15</think><answer>15<eos>",
        "<think>7+8=15<answer>15</answer><eos>",  # the thought is never closed, so the answer stands in it
        "<think><answer>15</answer></think><eos>",
        "<think><answer>15</answer></think><answer>16</answer><eos>",
        "<think></think><answer>14</answer><answer>15</answer><eos>",
        "<think></think><answer>15</answer><answer>15</answer><eos>",
        "<think></think><answer>15</answer>",  # cut off
        "<think></think><answer>15</answer> or 16<eos>",
        "<think></think><answer>15</answer><eos><eos>",
        "<eos><think></think><answer>15</answer><eos>",
        "<answer>15</answer><think></think><eos>",
        "<think></think><think></think><answer>15</answer><eos>",
        "</think><answer>15</answer><eos>",
        "<think>" + "7+8=15 " * 500,
        "<think></think><answer>" + "1" * 2000 + "</answer><eos>",
        "<think></think><answer></answer><eos>",
        "<think></think><answer>１５</answer><eos>",  # noqa: RUF001 - full-width digits, which int() reads as 15
        "<think></think><answer>١٥</answer><eos>",  # Arabic-Indic digits, which int() reads as 15
        "<think></think><answer>1 5</answer><eos>",
        "<think></think><answer>15.0</answer><eos>",
        "<think></think><answer>14 15 16</answer><eos>",
    ],
)
def test_no_answer_is_not_right(text):
    assert exact_answer(PROBLEM, read(text)) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<eos>",
        "<think></think><answer>15</answer>",
        "x<think></think><answer>15</answer><eos>",
        "<think></think>so<answer>15</answer><eos>",
        "<think></think><answer>15</answer>x<eos>",
        "<think></think><answer>15</answer><eos>x",
        "<answer>15</answer><eos>",
        "<think>7<think>8</think><answer>15</answer><eos>",
        "<think>7<eos></think><answer>15</answer><eos>",
    ],
)
def test_what_has_not_the_form(text):
    assert has_format(read(text)) == 0


def test_an_answer_without_a_thought_is_an_answer():
    response = read("<answer> 15\n</answer><eos>")
    assert exact_answer(PROBLEM, response) == 1 and has_format(response) == 0


def test_tags_that_are_spelt_out_are_no_tags():
    """Bytes that read <answer> are seven characters, not the token."""
    tokenizer = ByteTokenizer()
    forged = [*tokenizer.encode("<think></think><answer>15</answer>"), tokenizer.eos_id]
    response = read_response(forged, tokenizer)
    assert response.answer is None and not response.well_formed and response.ended


def test_a_token_beyond_the_tokenizer_spoils_the_answer():
    """A model's vocabulary may be padded."""
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(RIGHT, allow_special=True)
    at = tokens.index(tokenizer.token_id("</answer>"))
    spoilt = read_response([*tokens[:at], tokenizer.vocab_size, *tokens[at:]], tokenizer)
    assert exact_answer(PROBLEM, spoilt) == 0 and spoilt.answer == "15\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("thought", "english"),
    [
        ("b7+8=15 then c15-9=6", 1.0),
        ("b7+8=15 然后 c15-9=6", 0.0),
        ("b7+8=15 then c15-9=6 然后 d6*3=18 so 18", 2 / 3),
        ("7+8=15", 1.0),
        ("b c d", 1.0),
    ],
)
def test_language_consistency_counts_words(thought, english):
    response = read(f"<think>{thought}</think><answer>18</answer><eos>")
    assert language_consistency(response) == pytest.approx(english)


def test_without_a_thought_there_is_no_language():
    assert language_consistency(read("<answer>then</answer><eos>")) == 0


def program(text):
    return read(f"<think></think><answer>{text}</answer><eos>", SymbolTokenizer(SYMBOLS))


def test_unit_tests_ask_the_judge_once_for_each_program():
    asked = []

    def judge(jobs):
        asked.append(jobs)
        return [Verdict("a+2" in program, "", 0.0) for program, _ in jobs]

    good, bad, empty = program("def f(a): b=a+2; return b"), program("def f(a): return 3"), program("")
    cut = read("<think></think><answer>", SymbolTokenizer(SYMBOLS))
    problem, other = Problem("", tests="assert f(1) == 3"), Problem("", tests="assert f(5) == 7")
    verdicts = unit_tests([problem] * 5 + [other], [good, bad, good, empty, cut, good], judge)
    assert verdicts == [1, 0, 1, 0, 0, 1]
    assert asked == [[(good.answer, problem.tests), (bad.answer, problem.tests), (good.answer, other.tests)]]
    assert unit_tests([problem], [empty], judge) == [0] and len(asked) == 1


def test_the_sum_weighs_the_parts():
    right, wrong_form = RuleReward(R1_ZERO_WEIGHTS)([PROBLEM] * 2, [read(RIGHT), read("<answer>15</answer><eos>")])
    assert right.total == pytest.approx(1.1) and wrong_form.total == 1.0
    assert right.parts == {"accuracy": 1, "format": 1, "language": 1}
    (score,) = RuleReward({"language": 0.5})([PROBLEM], [read("<think>wait 等等</think><eos>")])
    assert score.parts == {"accuracy": 0, "format": 0, "language": 0.5} and score.total == 0.25
    with pytest.raises(ValueError, match="there is no part 'lenght'"):
        RuleReward({"lenght": 1.0})


# What a reward may return --------------------------------------------------------------------------------------------


def unchecked(parts, total):
    """A Score as a user makes it, without the run-time check of types that these tests put on minids."""
    score = object.__new__(Score)
    vars(score).update(parts=parts, total=total)
    return score


FINE = Score({"x": 1.0}, 0.5)
RETURNED = {
    "None": (lambda n: None, "returned a NoneType, must return a list of 4 Scores, one per response"),
    "one float": (lambda n: 0.5, "returned a float, must return a list"),
    "one score": (lambda n: FINE, "returned a Score, must return a list"),
    "a tensor": (lambda n: torch.zeros(n), "returned a Tensor, must return a list"),
    "an array": (lambda n: np.zeros(n), "returned a ndarray, must return a list"),
    "a generator": (lambda n: (FINE for _ in range(n)), "returned a generator, must return a list"),
    "text": (lambda n: "good", "returned a str, must return a list"),
    "half": (lambda n: [FINE] * (n // 2), "returned 2 scores for 4 responses, must return one each"),
    "one too few": (lambda n: [FINE] * (n - 1), "returned 3 scores for 4 responses"),
    "twice": (lambda n: [FINE] * n * 2, "returned 8 scores for 4 responses"),
    "none": (lambda n: [], "returned 0 scores for 4 responses"),
    "floats": (lambda n: [0.5] * n, "returned float 0.5 for response 0, must return Score(parts, total)"),
    "a None": (lambda n: [FINE] * (n - 1) + [None], "returned NoneType None for response 3, must return Score"),
    "NaN": (lambda n: [unchecked({}, math.nan)] * n, "the total of response 0 is float nan, must be a finite number"),
    "infinity": (lambda n: [unchecked({"x": math.inf}, 1.0)] * n, "the part 'x' of response 0 is float inf, must be"),
    "beyond float32": (lambda n: [unchecked({}, 1e39)] * n, "the total of response 0 is float 1e+39, must be"),
    "a huge integer": (lambda n: [unchecked({}, 10**999)] * n, "the total of response 0 is int 1000000"),
    "None as total": (lambda n: [unchecked({}, None)] * n, "the total of response 0 is NoneType None, must be"),
    "a tensor as total": (
        lambda n: [unchecked({}, torch.ones(()))] * n,
        "the total of response 0 is Tensor tensor(1.)",
    ),
    "a complex total": (lambda n: [unchecked({}, 1j)] * n, "the total of response 0 is complex 1j, must be"),
    "no parts": (lambda n: [unchecked(None, 1.0)] * n, "the parts of response 0 are NoneType None, must map names"),
    "numbered parts": (lambda n: [unchecked({1: 1.0}, 1.0)] * n, "the parts of response 0 are dict {1: 1.0}, must map"),
    "other parts": (
        lambda n: [FINE] * (n - 1) + [unchecked({"y": 1.0, "z": 0.0}, 1.0)],
        "response 3 has the parts y, z, response 0 has x: must be the same",
    ),
    "lost parts": (lambda n: [FINE, Score({}, 1.0), *[FINE] * (n - 2)], "response 1 has the parts none, response 0"),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_is_no_score_per_response_is_one_line_that_names_the_reward(kind):
    made, message = RETURNED[kind]

    def my_reward(problems, responses):
        return made(len(responses))

    with pytest.raises(ValueError) as caught:
        apply_reward(my_reward, [PROBLEM] * 4, [read(RIGHT)] * 4)
    assert str(caught.value).startswith(f"reward my_reward: {message}") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("number", [1, True, np.float32(1), np.float64(1), np.int64(1), Fraction(1)])
def test_numbers_of_any_kind_become_floats(number):
    (score,) = apply_reward(lambda problems, responses: [unchecked({"x": number}, number)], [PROBLEM], [read(RIGHT)])
    assert score == Score({"x": 1.0}, 1.0) and {type(score.total), type(score.parts["x"])} == {float}


def test_a_reward_without_a_name_is_named_by_its_class():
    with pytest.raises(ValueError, match="^reward RuleReward: returned 1 scores for 0 responses"):
        apply_reward(type("RuleReward", (), {"__call__": lambda self, problems, responses: [FINE]})(), [], [])
