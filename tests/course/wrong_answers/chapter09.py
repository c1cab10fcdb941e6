"""Wrong answers to the exercises of chapter 09."""

import re

import torch

from minids.course.exercises import chapter09 as given
from minids.course.exercises import chapter09_mistakes as mistakes


def advantages_without_nan(rewards):
    """As submitted in a review: the number in the denominator is what matters."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / rewards.std(1, keepdim=True)).nan_to_num(0.0)


def advantages_against_others(rewards):
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return (rewards - others) / (rewards.std(1, keepdim=True) + 1e-4)


def advantages_over_variance(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.var(1, keepdim=True) + 1e-4)


def advantages_by_column(rewards):
    return (rewards - rewards.mean(0)) / (rewards.std(1, keepdim=True) + 1e-4)


def advantages_with_three_mistakes(rewards):
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)


def loss_of_prefix(logp, old_logp, advantages, mask, epsilon):
    """The mask is taken for one that begins at the first token; it passed until an example had a prompt."""
    lengths = mask.sum(1)
    means = []
    for row, old, advantage, length in zip(logp, old_logp, advantages, lengths, strict=True):
        ratio = (row[:length] - old[:length]).exp()
        means.append(mistakes.clipped(ratio, advantage, epsilon).mean())
    return -torch.stack(means).mean()


def loss_without_gradient(logp, old_logp, advantages, mask, epsilon):
    return given.clipped_loss(logp.detach(), old_logp, advantages, mask, epsilon)


def loss_with_detached_ratio(logp, old_logp, advantages, mask, epsilon):
    """The value is correct; the gradient is that of REINFORCE, without a clip."""
    value = given.clipped_loss(logp, old_logp, advantages, mask, epsilon).detach()
    surrogate = -((logp * advantages[:, None] * mask).sum(1) / mask.sum(1)).mean()
    return value + surrogate - surrogate.detach()


def loss_of_each_answer(logp, old_logp, advantages, mask, epsilon):
    gains = mistakes.clipped((logp - old_logp).exp(), advantages[:, None], epsilon)
    return -(gains * mask).sum(1) / mask.sum(1)


def loss_clipped_around_zero(logp, old_logp, advantages, mask, epsilon):
    ratio, advantage = (logp - old_logp).exp(), advantages[:, None]
    gains = torch.minimum(ratio * advantage, ratio.clamp(-epsilon, epsilon) * advantage)
    return -((gains * mask).sum(1) / mask.sum(1)).mean()


def loss_with_two_mistakes(*arguments):
    return mistakes.loss_with(*arguments, terms=mistakes.clipped_swapped, mean=mistakes.of_padded_length)


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
        (
            "NaN replaced",
            advantages_without_nan,
            r"the number added to the standard deviation is much smaller than 1e-4",
        ),
        ("the others' mean", advantages_against_others, r"8 of 12 values differ; the first at \[0, 0\]: got 1\.15"),
        (
            "variance",
            advantages_over_variance,
            r"8 of 12 values differ; the first at \[0, 0\]: got 1\.5, expected 0\.8659",
        ),
        ("the mean by column", advantages_by_column, r"values differ; the first at \[0, 0\]"),
        ("three mistakes", advantages_with_three_mistakes, r"values differ; the first at \[0, 0\]"),
        ("a list", lists(given.advantages), r"the result should be a tensor, got \[\["),
    ],
    "9.2": [
        ("a prefix", loss_of_prefix, r"example 4 of 4.*\n.*the result: got \S+, expected"),
        ("no gradient", loss_without_gradient, r"the gradient of the result with respect to `logp`"),
        ("another gradient", loss_with_detached_ratio, r"the gradient of the result with respect to `logp`"),
        ("no mean over answers", loss_of_each_answer, r"the result should have shape \(\), got \(4,\)"),
        ("clipped around 0", loss_clipped_around_zero, r"the result: got \S+, expected"),
        ("two mistakes", loss_with_two_mistakes, r"the result: got \S+, expected"),
        ("a float", lambda *a: given.clipped_loss(*a).item(), r"the result should be a tensor, got 1\.28"),
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
}
