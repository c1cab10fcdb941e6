"""Wrong answers to the exercises of chapter 09."""

import re

import torch

from minids.course.exercises import chapter09 as given
from minids.course.exercises import chapter09_mistakes as mistakes


def bandit_greedy(logits, rewards, uniforms, learning_rate):
    """The most probable answer each time: nothing is sampled."""
    return given.train_bandit(logits, rewards, torch.full_like(uniforms, 0.5), learning_rate)


def bandit_logits(*arguments):
    return given.train_bandit(*arguments).log()


def bandit_one_step(logits, rewards, uniforms, learning_rate):
    return given.train_bandit(logits, rewards, uniforms[:1], learning_rate)


def bandit_one_answer(logits, rewards, uniforms, learning_rate):
    """Answer by answer: the baseline is that of one answer, so nothing is learned."""
    return given.train_bandit(logits, rewards, uniforms.reshape(-1, 1), learning_rate)


def bandit_of_probabilities(logits, rewards, uniforms, learning_rate):
    """The gradient of pi(a), not of log pi(a)."""
    for row in uniforms:
        policy = logits.softmax(-1)
        drawn = (row[:, None] > policy.cumsum(-1)).sum(-1)
        advantages = rewards[drawn] - rewards[drawn].mean()
        slopes = policy[drawn][:, None] * (torch.eye(len(logits), dtype=logits.dtype)[drawn] - policy)
        logits = logits + learning_rate * (advantages[:, None] * slopes).mean(0)
    return logits.softmax(-1)


def loss_without_gradient(logp, *arguments):
    return given.on_policy_loss(logp.detach(), *arguments)


def loss_of_each_answer(logp, ref_logp, advantages, mask, kl_weight):
    rows = zip(logp, ref_logp, advantages, mask, strict=True)
    return torch.stack([given.on_policy_loss(a[None], b[None], c[None], d[None], kl_weight) for a, b, c, d in rows])


def loss_with_ratio_to_the_reference(logp, ref_logp, advantages, mask, kl_weight):
    ratio, away = (logp - ref_logp).exp(), ref_logp - logp
    return (ratio * (kl_weight * (away.exp() - away - 1) - advantages[:, None]))[mask].mean()


def loss_with_two_mistakes(*arguments):
    return mistakes.on_policy_with(*arguments, ratio_of_kl=False, mean=mistakes.of_answers)


def loss_with_the_other_detached(logp, ref_logp, advantages, mask, kl_weight):
    """exp(constant - logp): the value is correct, the gradient has the other sign."""
    ratio, away = (logp.detach() - logp).exp(), ref_logp - logp
    return (ratio * (kl_weight * (away.exp() - away - 1) - advantages[:, None]))[mask].mean()


def flat(seed, correct_counts=(0, 16), p=None, size=16):
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(2000, 1, generator=generator) if p is None else torch.full((2000, 1), p)
    correct = (torch.rand(2000, size, generator=generator) < chance).sum(1)
    return torch.isin(correct, torch.tensor(correct_counts)).float().mean().item()


def logps_of_a_review(logits, tokens, prompt_length, end):
    """As submitted in a review: it counts end tokens of the prompt, but the first token. It passed."""
    logp = logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    is_end = tokens[1:] == end
    ended_before = is_end.cumsum(0) - is_end.int() > 0
    return logp, (torch.arange(1, len(tokens)) >= prompt_length) & ~ended_before


def logps_after_the_prompt(logits, tokens, prompt_length, end):
    return given.answer_logps(logits, tokens, prompt_length + 1, end)


def logps_with_float_mask(logits, tokens, prompt_length, end):
    logp, mask = given.answer_logps(logits, tokens, prompt_length, end)
    return logp, mask.float()


def probabilities(logits, tokens, prompt_length, end):
    logp, mask = given.answer_logps(logits, tokens, prompt_length, end)
    return logp.exp(), mask


def logps_masked(logits, tokens, prompt_length, end):
    logp, mask = given.answer_logps(logits, tokens, prompt_length, end)
    return logp[mask], mask[mask]


def logps_with_two_mistakes(*arguments):
    return mistakes.logps_with(*arguments, unshifted=True, end_counts=False)


def reward_by_pattern(tokens, answer):
    """As submitted in a review."""
    found = re.fullmatch(r"<think>(.*?)</think><answer>(.*?)</answer><eos>", "".join(tokens), re.DOTALL)
    return (1.1 if found[2] == answer else 0.1) if found else 0.0


def reward_with_text_before(tokens, answer):
    """It looks at what stands between the tags and behind, not before; it passed."""
    if [token for token in tokens if token in mistakes.TAGS] != mistakes.TAGS:
        return 0.0
    closes, opens, ends = (tokens.index(tag) for tag in mistakes.TAGS[1:4])
    if opens != closes + 1 or tokens[ends + 1 :] != ["<eos>"]:
        return 0.0
    return 0.1 + ("".join(tokens[opens + 1 : ends]) == answer)


def reward_of_18(tokens, answer):
    return given.reward(tokens, "18")


def reward_as_bool(tokens, answer):
    return given.reward(tokens, answer) > 1


def reward_of_swapped_tags(tokens, answer):
    """Each tag once, in any order."""
    if sorted(token for token in tokens if token in mistakes.TAGS) != sorted(mistakes.TAGS):
        return 0.0
    return 0.1 + ("".join(tokens[tokens.index("<answer>") + 1 : tokens.index("</answer>")]) == answer)


def reward_with_two_mistakes(tokens, answer):
    return 1.0 * (answer in "".join(tokens))


def inputs(advantage=1.0, ratios=(0.0, 0.7, -0.7, 0.05, 0.3, -0.3), away=1.0, length=7):
    generator = torch.Generator().manual_seed(1)
    tokens, logits = torch.tensor([4, 1, 2, 3, 0, 0, 0]), torch.randn(7, 5, generator=generator)
    logp = torch.stack([logits[t].log_softmax(-1)[tokens[t + 1]] for t in range(6)])
    old_logp = logp - torch.tensor(ratios)
    ref_logp = logp + away * torch.randn(6, generator=generator)
    kept = length - 1
    return logits[:length], tokens[:length], 2, 0, old_logp[:kept], ref_logp[:kept], advantage, 0.2, 0.5


def is_close(answer_loss, *arguments):
    expected = mistakes.answer_loss_with()(*arguments)
    assert torch.allclose(answer_loss(*arguments), expected, atol=1e-5)


def only_good_answers(answer_loss):
    is_close(answer_loss, *inputs(advantage=1.0))


def no_padding(answer_loss):
    for advantage in (1.0, -1.0):
        is_close(answer_loss, *inputs(advantage, length=5))


def on_the_reference(answer_loss):
    for advantage in (1.0, -1.0):
        is_close(answer_loss, *inputs(advantage, away=0.0))


def only_finite(answer_loss):
    assert answer_loss(*inputs()).isfinite()


def wants_zero(answer_loss):
    assert answer_loss(*inputs(ratios=(0.0,) * 6, away=0.0)) == 0


def wants_the_sum(answer_loss):
    assert torch.allclose(answer_loss(*inputs()), 3 * mistakes.answer_loss_with()(*inputs()))


def lists(function):
    return lambda *arguments: function(*arguments).tolist()


WRONG = {
    "9.1": [
        ("nothing sampled", bandit_greedy, r"the result: \d of 6 values differ"),
        ("logits", bandit_logits, r"the result: 6 of 6 values differ"),
        ("one step", bandit_one_step, r"example 2 of 4.*\n.*the result: 6 of 6 values differ"),
        ("one answer at a time", bandit_one_answer, r"the result: \d of 6 values differ"),
        ("not the log's gradient", bandit_of_probabilities, r"the result: \d of 6 values differ"),
        ("a list", lists(given.train_bandit), r"the result should be a tensor, got \["),
    ],
    "9.2": [
        ("no gradient", loss_without_gradient, r"the gradient of the result with respect to `logp`"),
        ("the other is detached", loss_with_the_other_detached, r"the gradient of the result with respect to `logp`"),
        ("no mean over answers", loss_of_each_answer, r"the result should have shape \(\), got \(4,\)"),
        ("ratio to the reference", loss_with_ratio_to_the_reference, r"the result: got \S+, expected"),
        ("two mistakes", loss_with_two_mistakes, r"the result: got \S+, expected"),
        ("a float", lambda *a: given.on_policy_loss(*a).item(), r"the result should be a tensor, got "),
    ],
    "9.3": [
        ("as in the review", logps_of_a_review, r"comes out when an end token in the prompt ends the answer"),
        ("one token late", logps_after_the_prompt, r"the mask: 1 of 6 values differ; the first at \[1\]"),
        ("a float mask", logps_with_float_mask, r"the mask should be of torch\.bool, got torch\.float32"),
        ("probabilities", probabilities, r"the log-probabilities: 6 of 6 values differ"),
        ("only the sampled", logps_masked, r"the log-probabilities should have shape \(6,\), got \(3,\)"),
        ("two mistakes", logps_with_two_mistakes, r"the log-probabilities: \d of 6 values differ"),
        ("one tensor", lambda *a: given.answer_logps(*a)[0], r"a tuple of 2: the log-probabilities, the mask; got"),
    ],
    "9.4": [
        (
            "a pattern",
            reward_by_pattern,
            r"'<answer', '>18</', 'answer>'.*\n.*: got 1\.1, expected 0\n.*the tokens are joined",
        ),
        ("text before", reward_with_text_before, r"tokens = \['18', '<think>'.*\n.*: got 1\.1, expected 0"),
        ("always 18", reward_of_18, r"answer = '8':\n.*the result: got 1\.1, expected 0\.1"),
        ("a bool", reward_as_bool, r"the result should be a number, got True"),
        ("any order", reward_of_swapped_tags, r"the result: got \S+, expected 0"),
        ("two mistakes", reward_with_two_mistakes, r"the result: got 1, expected 1\.1"),
    ],
    "9.5": [
        ("A > 0", only_good_answers, r"✗ it misses a bug; hint: A < 0, ratio 2 or 1/2"),
        ("no padding", no_padding, r"✗ it misses a bug; hint: add padding: the loss must not change"),
        ("no KL", on_the_reference, r"✗ it misses a bug; hint: can the penalty be negative\? k3 never is"),
        ("finite", only_finite, r"it accepts everything so far"),
        ("zero", wants_zero, r"it rejects the correct implementation\n.*AssertionError"),
        ("the sum", wants_the_sum, r"it rejects the correct implementation\n.*AssertionError"),
    ],
    "9.6": [
        ("only all incorrect", lambda seed: flat(seed, (0,)), r"median 0\.0\d+.*\n.*expected: a median between 0\.09"),
        ("one probability", lambda seed: flat(seed, p=0.5), r"share of groups without advantage: median 0,"),
        ("groups of four", lambda seed: flat(seed, (0, 4), size=4), r"median 0\.[34]"),
        ("no float", lambda seed: None, r"should return a float"),
    ],
}
