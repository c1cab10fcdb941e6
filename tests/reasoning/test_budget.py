"""Thinking budgets, and the majority vote over several answers."""

import pytest
from small_reasoner import TASK, TOKENIZER, accept_most, small_model

from minids.inference.generate import Sampling, generate
from minids.reasoning import budget
from minids.reasoning.budget import answer_within, consensus, majority_vote
from minids.reasoning.rewards import Response, Score
from minids.reasoning.rollout import Sample
from minids.reasoning.tasks import Problem


def test_a_thought_is_cut_at_its_budget_and_answered():
    model, problems = small_model().eval(), TASK.held_out(4)
    thoughts = {}
    for tokens in (0, 3, 9):
        options = dict(thought_tokens=tokens, answer_tokens=5, temperature=0.0)
        groups = answer_within(model, TOKENIZER, problems, accept_most, 2, **options)
        assert [s.problem for group in groups for s in group] == [p for p in problems for _ in range(2)]
        thoughts[tokens] = []
        for sample in (group[0] for group in groups):
            begun, _, rest = sample.response.text.removeprefix("<think>").partition("</think><answer>")
            thoughts[tokens].append(begun)
            inside = TOKENIZER.encode(begun)
            assert len(inside) <= tokens and sample.response.text.startswith("<think>")
            asked = [TOKENIZER.bos_id, *TOKENIZER.encode(sample.problem.prompt), TOKENIZER.token_id("<think>"), *inside]
            asked += [TOKENIZER.token_id("</think>"), TOKENIZER.token_id("<answer>")]
            (alone,) = generate(model, [asked], max_new_tokens=5, sampling=Sampling(0.0), stop=[TOKENIZER.eos_id])
            assert TOKENIZER.decode(alone, skip_special=False).startswith(rest.removesuffix("<eos>"))
    assert thoughts[0] == [""] * 4 and any(thoughts[3])
    assert all(long.startswith(short) for short, long in zip(thoughts[3], thoughts[9], strict=True))


def test_a_thought_that_ends_by_itself_is_not_filled_up(monkeypatch):
    close, eos = TOKENIZER.token_id("</think>"), TOKENIZER.eos_id
    seven, eight, nine = map(TOKENIZER.encode, "789")
    drawn = iter([[[*seven, close], [*eight, eos, *nine]], [[eos]] * 2])
    monkeypatch.setattr(budget, "sample", lambda *args, **options: (next(drawn), []))
    problems = TASK.held_out(2)
    groups = answer_within(small_model(), TOKENIZER, problems, accept_most, 1, thought_tokens=9)
    texts = [group[0].response.text for group in groups]
    assert texts == ["<think>7</think><answer><eos>", "<think>8</think><answer><eos>"]


def sample_of(text, right=0.0):
    response = Response((), "", None, text, text is not None, True)
    return Sample(Problem("?"), [], response, [], Score({"accuracy": right}, right))


def test_what_cannot_be_read_has_no_vote():
    unreadable, five, six = sample_of(None), sample_of("5"), sample_of("6", 1.0)
    assert majority_vote([unreadable, unreadable, unreadable, six]) is six
    assert majority_vote([unreadable]) is None and majority_vote([]) is None
    assert majority_vote([five, six, sample_of(" 6 ")]) is six
    assert majority_vote([six, five]) is six and majority_vote([five, six]) is five


def test_consensus_counts_votes_of_disjoint_samples():
    five, six, nothing = sample_of("5"), sample_of("6", 1.0), sample_of(None)
    groups = [[six, five, six, five, five, six, six], [nothing, nothing, nothing, six, five, five, five]]
    assert consensus(groups, 1) == [pytest.approx(4 / 7), pytest.approx(1 / 7)]
    assert consensus(groups, 3) == [0.5, 0.0]
    assert consensus(groups, 2) == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    with pytest.raises(ValueError, match="voters=8: must be at least 1, and at most the 7 samples"):
        consensus(groups, 8)
