"""The pre-training text and the reward of R1-Zero."""

from small_reasoner import TASK

from minids.reasoning import r1_zero
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward


def test_every_row_of_the_web_begins_with_a_document():
    text = r1_zero.pretraining_text(TASK, rows=20)
    rows = text.train.tokens[: -r1_zero.BASE_RECIPE.seq_len].reshape(20, -1)
    assert (rows[:, 0] == TASK.tokenizer.bos_id).all()
    assert text.train.fingerprint == r1_zero.pretraining_text(TASK, rows=20).train.fingerprint
    assert text.train.fingerprint != r1_zero.pretraining_text(TASK, rows=20, seed=1).train.fingerprint


def test_the_reward_of_the_recipe_is_accuracy_and_a_tenth_for_the_form():
    reward = r1_zero.rule_reward("trace")
    assert reward == RuleReward(R1_ZERO_WEIGHTS) and reward.weights == {"accuracy": 1.0, "format": 0.1}
