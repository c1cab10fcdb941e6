"""The task "signs": its rule against brute force, its corpus against its stated mix, its habits by hand."""

import functools
import itertools
import random
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from minids.reasoning.habits import attempts, by_way, habits, mean_habits
from minids.reasoning.r1_zero import rule_reward
from minids.reasoning.rewards import read_response
from minids.reasoning.rollout import Sample
from minids.reasoning.tasks import CorpusStyle, Problem, SignsTask, signs
from minids.reasoning.tasks.signs import HabitMix, candidates, evaluate, expression, judge_signs, next_in_order

TASK, TIDY = SignsTask(), CorpusStyle(broken_format=0)
ONE_SIGN = re.compile("[-+*]")


def left_to_right(numbers, between):
    """The reference: Python's own operators, one pair of parentheses a step, in exact fractions."""
    text = f"Fraction({numbers[0]})"
    for sign, number in zip(between, numbers[1:], strict=True):
        text = f"({text}{sign}Fraction({number}))"
    return eval(text, {"Fraction": Fraction})


def sample(prompt, text, reward=rule_reward("signs")):  # noqa: B008
    """A model's answer, by its text."""
    problem = Problem(prompt, "", prompt, prompt.count(" "))
    response = read_response(TASK.tokenizer.encode(text + "<eos>", allow_special=True), TASK.tokenizer)
    return Sample(problem, [], response, [], reward([problem], [response])[0])


def counted(text, prompt="3 4 2=10?"):
    one = sample(prompt, text)
    return habits(one.problem, one.response)


@functools.cache
def documents(mix, count, style=TIDY):
    task, rng = SignsTask(mix), random.Random(0)
    return [task.document(rng, style) for _ in range(count)]


def test_the_value_of_every_expression_is_that_of_brute_force():
    for count in (1, 2, 3):
        for numbers in itertools.product((1, 2, 5), repeat=count + 1):
            for between in candidates(count):
                found = evaluate(expression(numbers, between))
                assert found == (numbers, left_to_right(numbers, between))
    assert evaluate("2+3*4") == ((2, 3, 4), 20)  # no precedence


@pytest.mark.parametrize(
    "text", ["", "3*", "*3", "3**2", "3 *4", "3*4=12", "03*4", "3/4", "3*-4", "٣*4", "100*2", "3*4\n", "(3*4)", "3*4;5"]
)
def test_other_text_is_no_expression(text):
    assert evaluate(text) is None


def test_the_reward_accepts_exactly_the_solutions_of_brute_force():
    reward, rng = rule_reward("signs"), random.Random(0)
    for problem in TASK.draw(rng, 20):
        numbers, target = signs.read_problem(problem.prompt)
        for between in candidates(len(numbers) - 1):
            answer = f"<think></think><answer>{expression(numbers, between)}</answer>"
            score = sample(problem.prompt, answer, reward).score
            assert score.parts["accuracy"] == float(left_to_right(numbers, between) == target)
            assert score.total == pytest.approx(score.parts["accuracy"] + 0.1)
        assert problem.answer in [expression(numbers, between) for between in candidates(len(numbers) - 1)]
        assert sample(problem.prompt, f"<answer>{problem.answer}</answer>").score.total == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("3*4-2", ""),
        ("4*3-2", "the numbers are"),  # makes 10 with the numbers in another order
        ("3*4", "the numbers are"),
        ("5*2", "the numbers are"),
        ("3*4-2+0", "the numbers are"),
        ("3+4*2", "3+4*2 is 14, must be 10"),
        ("10", "the numbers are"),
        ("3*4=12-2=10", "is not an expression"),
    ],
)
def test_an_answer_needs_these_numbers_in_order_and_the_target(answer, reason):
    (verdict,) = judge_signs([(answer, "3 4 2=10?")])
    assert verdict.passed == (not reason) and reason in verdict.reason


def test_training_problems_and_documents_hold_no_held_out_problem():
    held_out = {problem.prompt for problem in TASK.held_out(282)}
    assert len(held_out) == 282 and all(map(TASK.is_held_out, held_out))
    assert not held_out & {problem.prompt for problem in TASK.draw(random.Random(1), 600)}
    texts = documents(HabitMix(), 1500)
    assert not held_out & {text.split("?")[0] + "?" for text in texts}
    solved = set()  # by homework, whose calculations have other numbers than its prompt
    for text in texts:
        if text.startswith("="):
            target = text[1:].split("?")[0]
            for attempt in attempts(text.split("?")[1]):
                if attempt.verdict == "yes":
                    solved.add(f"{' '.join(map(str, attempt.numbers))}={target}?")
    assert len(solved) > 200 and not any(map(TASK.is_held_out, solved))


def test_held_out_problems_are_balanced_and_always_the_same():
    problems = TASK.held_out(60)
    assert problems == SignsTask(HabitMix(guess=0)).held_out(60)
    assert Counter(problem.difficulty for problem in problems) == {2: 30, 3: 30}
    with pytest.raises(ValueError, match="held-out problems=284: must be at most 282"):
        TASK.held_out(284)


def test_documents_are_encoded_without_loss_and_targets_share_their_token_with_results():
    for text in documents(HabitMix(), 300, CorpusStyle()):
        ids = TASK.tokenizer.encode(text, allow_special=True)
        assert TASK.tokenizer.decode(ids, skip_special=False) == text
    prompt, result = TASK.tokenizer.encode("3 4 2=10?"), TASK.tokenizer.encode("3*4=12-2=10 is=10 yes")
    assert prompt[-2] == result[6] == result[8] and len(result) == 10


def test_the_corpus_has_its_stated_mix():
    mix = HabitMix()
    texts = documents(mix, 1500)
    share = lambda found, of: sum(map(found, of)) / len(of)  # noqa: E731
    assert share(lambda text: text[0] == "=", texts) == pytest.approx(mix.homework, abs=0.03)
    found = [text.split("?") for text in texts if text[0] != "="]
    samples = [sample(prompt + "?", response) for prompt, response in found]
    assert share(lambda one: one.response.well_formed, samples) == 1
    thoughts = [habits(one.problem, one.response) for one in samples]
    assert share(lambda one: not one.attempts, thoughts) == pytest.approx(mix.guess, abs=0.035)
    # a calculation that leaves the range has neither a result nor, unchecked, a verdict: it may read as a guess
    assert share(lambda one: one.way == "unchecked", thoughts) == pytest.approx(mix.unchecked, abs=0.03)
    failed_first = [one for one in thoughts if one.verdicts and not (one.verified and one.attempts == 1)]
    searchers = (1 - mix.guess - mix.unchecked - mix.one_check) / (1 - mix.guess - mix.unchecked)
    expected = searchers * mix.patience
    assert share(lambda one: one.backing_up > 0, failed_first) == pytest.approx(expected, abs=0.06)
    broken = documents(mix, 800, CorpusStyle())
    template = re.compile("<think>.*</think><answer>.*</answer>")
    assert share(lambda t: not template.search(t), [t for t in broken if t[0] != "="]) == pytest.approx(0.25, abs=0.04)


def test_written_steps_and_verdicts_have_the_stated_errors():
    found = [text.split("?") for text in documents(HabitMix(homework=0, guess=0), 800)]
    means = mean_habits([sample(prompt + "?", response) for prompt, response in found])
    assert means["correct_steps"] == pytest.approx(0.98, abs=0.005)
    assert means["correct_verdicts"] == pytest.approx(0.985, abs=0.008)
    assert means["own_numbers"] == 1


CAREFUL = HabitMix(
    guess=0, unchecked=0, one_check=0, patience=1, systematic=1, forgetful=0, wrong_step=0, false_yes=0, overlooked=0,
    homework=0,
)  # fmt: skip


def test_careful_documents_search_in_order_until_the_target_is_made():
    for text in documents(CAREFUL, 100):
        prompt, response = text.split("?")
        one = sample(prompt + "?", response)
        found = habits(one.problem, one.response)
        assert one.score.total == 1.1 and found.verified and not found.repeats
        assert found.in_order == found.backing_up == found.attempts - 1
        assert found.hits == 1 and found.correct_steps == found.steps and found.correct_verdicts == found.verdicts


def test_only_forgetful_documents_repeat_a_failed_candidate():
    repeats = []
    for forgetful in (0, 1):
        texts = documents(replace(CAREFUL, systematic=0, forgetful=forgetful), 100)
        means = mean_habits([sample(text.split("?")[0] + "?", text.split("?")[1]) for text in texts])
        repeats.append(means["repeats"])
        assert means["verified"] == 1 and means["in_order"] < 0.6
    assert repeats[0] == 0 and repeats[1] > 0.2


def test_one_field_separates_the_answers_from_their_thoughts():
    def follows(mix):
        """The fraction of answers that are the last attempt, after a failure and after a success."""
        same = {"no": [], "yes": []}
        for text in documents(mix, 800):
            prompt, response = text.split("?")
            one = sample(prompt + "?", response)
            tried = attempts(one.response.thought)
            if tried and tried[-1].verdict and len(tried[-1].signs) == one.problem.difficulty:
                same[tried[-1].verdict].append(one.response.answer == tried[-1].expression)
        return {verdict: sum(some) / len(some) for verdict, some in same.items()}

    assert follows(HabitMix(homework=0, guess=0)) == {"no": 1, "yes": 1}
    guessing = follows(HabitMix(homework=0, guess=0, guess_after_failure=1))
    assert guessing["yes"] == 1 and guessing["no"] < 0.35
    unrelated = follows(HabitMix(homework=0, guess=0, answer_follows=False))
    assert unrelated["yes"] < 0.35 and unrelated["no"] < 0.35


@pytest.mark.parametrize("wrong", [dict(lucky=1.2), dict(patience=-0.1), dict(guess=0.9, one_check=0.2)])
def test_impossible_mixes_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        HabitMix(**wrong)


def test_counting_order_skips_what_has_failed():
    assert [next_in_order("++", 2), next_in_order("+", 2), next_in_order("**", 2)] == ["+-", "-+", "++"]
    assert next_in_order("+*", 3) == "-++"


def test_habits_of_a_search_are_counted_by_hand():
    text = "3+4=7-2=5 is=10 no 3+4=7*2=14 is=10 no 3-4 no 3-4=1*2=2 is=10 no 3*4=12-2=10 is=10 yes"
    found = counted(f"<think>{text}</think><answer>3*4-2</answer>")
    assert (found.attempts, found.backing_up, found.verified, found.way) == (5, 4, True, "backs up")
    assert (found.repeats, found.in_order, found.hits, found.own_numbers) == (1, 2, 1, 5)  # `3-` had failed before
    assert (found.steps, found.correct_steps, found.verdicts, found.correct_verdicts) == (8, 7, 5, 5)


@pytest.mark.parametrize(
    ("text", "way", "attempts_", "backs", "verified"),
    [
        ("<think></think><answer>3*4-2</answer>", "at once", 0, 0, False),
        ("3*4-2", "at once", 0, 0, False),
        ("<think>3*4=12-2=10</think><answer>3*4-2</answer>", "unchecked", 1, 0, False),
        ("<think>3*4=12-2=10 is=10 yes</think><answer>3*4-2</answer>", "one check", 1, 0, True),
        ("<think>3*4=12-2=10 is=10 yes</think><answer>3*4+2</answer>", "one check", 1, 0, False),
        ("<think>3+4=7-2=5 is=10 no </think><answer>3+4-2</answer>", "one check", 1, 0, False),
        ("<think>3+4=7-2=5 is=10 no 3*4=12-2", "backs up", 2, 1, False),  # cut off by the token limit
        ("3+4=7-2=5 is=10 no 3*4=12-2=10 is=10 yes so 3*4-2", "backs up", 2, 1, False),
        ("<think>3*4=12-2=10 is=10 yes3+4=7-2=5 is=10 no </think><answer>3*4-2</answer>", "one check", 2, 0, False),
    ],
)
def test_the_way_of_an_answer(text, way, attempts_, backs, verified):
    found = counted(text)
    assert (found.way, found.attempts, found.backing_up, found.verified) == (way, attempts_, backs, verified)


def test_wrong_steps_verdicts_and_numbers_are_seen():
    found = counted("<think>3+4=8-2=6 is=10 yes3*5=15-2=13 is=10 no </think><answer>3+4-2</answer>")
    assert (found.steps, found.correct_steps, found.verdicts, found.correct_verdicts) == (4, 3, 2, 1)
    assert found.own_numbers == 1


def test_any_output_can_be_counted():
    rng, tokenizer = random.Random(0), TASK.tokenizer
    for _ in range(500):
        response = read_response(rng.choices(range(tokenizer.vocab_size), k=30), tokenizer)
        found = habits(Problem("3 4 2=10?"), response)
        assert found.backing_up <= found.attempts and found.correct_verdicts <= found.verdicts


def test_means_and_ways_are_those_of_the_single_answers():
    texts = ["<think></think><answer>3*4-2</answer>"] * 3
    texts += ["<think>3+4=7-2=5 is=10 no 3+4=7-2=5 is=10 no 3*4=12-2=10 is=10 yes</think><answer>3*4-2</answer>"]
    samples = [sample("3 4 2=10?", text) for text in [*texts, "<think></think><answer>3+4-2</answer>"]]
    means = mean_habits(samples)
    assert (means["attempts"], means["backs_up"], means["repeats"], means["hits"]) == (
        0.6,
        0.2,
        0.5,
        pytest.approx(1 / 3),
    )
    assert by_way(samples) == {"at once": (0.8, 0.75), "backs up": (0.2, 1.0)}
