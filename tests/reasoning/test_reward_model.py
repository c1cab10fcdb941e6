"""A learned reward: Bradley-Terry by hand, the fit at its optimum, and what its annotator prefers."""

import random

import pytest
import torch
from small_reasoner import TASK, TOKENIZER

from minids.reasoning.reward_model import LearnedReward, agreement, bradley_terry_loss, counts, fit, preference
from minids.reasoning.rewards import RuleReward, read_response
from minids.reasoning.rollout import Sample
from minids.reasoning.tasks import template

PROBLEM = TASK.held_out(1)[0]
RULES = RuleReward({"accuracy": 1.0})
VOCAB = TOKENIZER.vocab_size


def response(text):
    return read_response([*TOKENIZER.encode(text, allow_special=True), TOKENIZER.eos_id], TOKENIZER)


def sample(text):
    read = response(text)
    return Sample(PROBLEM, [], read, [], RULES([PROBLEM], [read])[0])


SHORT = sample(template("", PROBLEM.answer))
LONG = sample(template(" b1+1=2 then c2+1=3", PROBLEM.answer))
WRONG = sample(template(" b1+1=2 then c2+1=3 then d3+1=4", "1"))


def test_bradley_terry_loss_is_the_log_of_the_odds():
    good, bad = torch.tensor([[3.0, 0.0, 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    expected = -(torch.sigmoid(good - bad).log()).mean()
    assert bradley_terry_loss(good, bad).item() == pytest.approx(expected.item(), rel=1e-12)
    assert bradley_terry_loss(good, good).item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    assert bradley_terry_loss(good, bad) < bradley_terry_loss(bad, good)


def test_an_annotator_prefers_the_correct_answer_and_a_careless_one_the_longer():
    rng = random.Random(0)
    assert preference(SHORT, WRONG, rng, careless=0.0) == (SHORT, WRONG)
    assert preference(WRONG, SHORT, rng, careless=0.0) == (SHORT, WRONG)
    assert preference(SHORT, LONG, rng, careless=0.0) == (LONG, SHORT)  # both correct
    assert preference(SHORT, WRONG, rng, careless=1.0) == (WRONG, SHORT)
    careless = sum(preference(SHORT, WRONG, rng, careless=0.3)[0] is WRONG for _ in range(2000))
    assert 520 < careless < 680


def test_the_fit_is_the_minimum_and_finds_the_rewards_that_made_the_preferences():
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(VOCAB, dtype=torch.float64)
    true[5:9] = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    pairs = []
    for _ in range(1500):
        texts = torch.randint(5, 9, (2, 12), generator=generator)
        a, b = (Sample(PROBLEM, [], read_response(row.tolist(), TOKENIZER), [], SHORT.score) for row in texts)
        gap = (counts([a.response, b.response], VOCAB) @ true).diff().neg()
        pairs.append((a, b) if torch.rand(1, generator=generator) < torch.sigmoid(gap) else (b, a))
    rewards = fit(pairs, VOCAB).requires_grad_()
    good, bad = (counts([pair[i].response for pair in pairs], VOCAB) @ rewards for i in (0, 1))
    (bradley_terry_loss(good, bad) + 1e-3 * (rewards**2).sum()).backward()
    assert rewards.grad.abs().max() < 1e-10
    found = rewards.detach()[5:9] - rewards.detach()[8]  # the length is always 12: only differences are determined
    torch.testing.assert_close(found, true[5:9], atol=0.15, rtol=0)
    assert agreement(rewards.detach(), pairs) > 0.8 > 0.2 > agreement(-rewards.detach(), pairs)


def test_learned_reward_is_what_training_gets_and_the_rules_are_reported():
    rewards = torch.zeros(VOCAB, dtype=torch.float64)
    rewards[TOKENIZER.encode("=")] = 2.0
    scores = LearnedReward(rewards, RULES)([PROBLEM] * 2, [LONG.response, WRONG.response])
    assert [score.total for score in scores] == [4.0, 6.0]
    assert [score.parts["accuracy"] for score in scores] == [1.0, 0.0]
    assert [score.parts["learned"] for score in scores] == [4.0, 6.0]
