"""Implementations with the mistakes of the exercises of chapter 09: without an option each of them is correct."""

import operator
import re
from collections.abc import Callable

import torch
from torch import Tensor

# 9.1 Train a bandit -------------------------------------------------------------------------------------------------


def bandit_with(
    logits, rewards, uniforms, learning_rate, *, baseline="group", fresh=True, sign=1.0, added=False, scaled=False
):
    first, identity = logits.softmax(-1), torch.eye(len(logits), dtype=logits.dtype)
    for row in uniforms:
        policy = logits.softmax(-1)
        drawn = (row[:, None] > (policy if fresh else first).cumsum(-1)).sum(-1)
        advantages = rewards[drawn] - {"group": rewards[drawn].mean(), "all": rewards.mean(), "none": 0.0}[baseline]
        if scaled:
            advantages = advantages / (rewards[drawn].std() + 1e-4)
        terms = advantages[:, None] * (identity[drawn] - policy)
        logits = logits + sign * learning_rate * (terms.sum(0) if added else terms.mean(0))
    return logits.softmax(-1)


# 9.2 The detached ratio ---------------------------------------------------------------------------------------------

Terms = Callable[[Tensor, Tensor, float], Tensor]
Mean = Callable[[Tensor, Tensor], Tensor]  # of terms, by a mask


def of_tokens(terms: Tensor, mask: Tensor) -> Tensor:
    return terms[mask].mean()


def of_answers(terms: Tensor, mask: Tensor) -> Tensor:
    return ((terms * mask).sum(1) / mask.sum(1)).mean()


def of_padding_too(terms: Tensor, mask: Tensor) -> Tensor:
    return terms.mean()


def k3(away: Tensor) -> Tensor:
    return away.exp() - away - 1


def k1(away: Tensor) -> Tensor:
    return -away


def on_policy_with(
    logp, ref_logp, advantages, mask, kl_weight,
    *, ratio=True, ratio_of_kl=True, plain=False, exchanged=False, kl=k3, mean: Mean = of_tokens,
):  # fmt: skip
    moving = (logp - logp.detach()).exp()
    gain = logp if plain else moving if ratio else torch.ones_like(logp)
    penalty = kl(logp - ref_logp if exchanged else ref_logp - logp)
    if ratio and ratio_of_kl and not plain:
        penalty = moving * penalty
    return mean(kl_weight * penalty - gain * advantages[:, None], mask)


def maximised(function):
    return lambda *arguments: -function(*arguments)


# The clip, of exercise 9.5 ------------------------------------------------------------------------------------------


def clipped(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def clipped_swapped(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """The bounds change places for negative advantages."""
    inside = ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
    outside = ratio * advantage
    return torch.where(advantage < 0, torch.maximum(outside, inside), torch.minimum(outside, inside))


# 9.3 Log-probabilities of an answer ---------------------------------------------------------------------------------


def logps_with(
    logits, tokens, prompt_length, end,
    *, unshifted=False, normalised=True, padding=False, end_counts=True, prompt=False, prompt_ends=False, late=False,
):  # fmt: skip
    rows = (logits[1:] if unshifted else logits[:-1]).log_softmax(-1) if normalised else logits[:-1]
    in_answer = torch.arange(len(tokens)) >= prompt_length
    ends = ((tokens == end) & (in_answer | prompt_ends)).int()
    ended = ends.cumsum(0) - ends > 0
    mask = (in_answer | prompt) & (~ended | padding) & ((ends == 0) | end_counts)
    return rows.gather(-1, tokens[1:, None])[:, 0], mask[:-1] if late else mask[1:]


def logps_end_is_zero(logits, tokens, prompt_length, end):
    return logps_with(logits, tokens, prompt_length, 0)


# 9.4 A reward that cannot be gamed ----------------------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<eos>"]


def reward_with(
    tokens: list[str],
    answer: str,
    *,
    same: Callable[[str, str], bool] = operator.eq,
    unended: bool = False,
    text_outside: bool = False,
    full: float = 1.1,
) -> float:
    tokens = [*tokens, "<eos>"] if unended and tokens[-1:] != ["<eos>"] else tokens
    if [token for token in tokens if token in TAGS] != TAGS:
        return 0.0
    starts, closes, opens, ends, _ = map(tokens.index, TAGS)
    outside = starts or opens != closes + 1 or tokens[ends + 1 :] != ["<eos>"]
    if outside and not text_outside:
        return 0.0
    return full if same("".join(tokens[opens + 1 : ends]), answer) else 0.1


def equal_numbers(one: str, other: str) -> bool:
    return one.isdecimal() and int(one) == int(other)


def equal_without_spaces(one: str, other: str) -> bool:
    return one.strip() == other


def reward_anywhere(tokens, answer):
    return 0.1 * (reward_with(tokens, "") > 0) + (answer in "".join(tokens))


def reward_of_text(tokens, answer):
    """The output is joined first."""
    inside = re.fullmatch("<think>.*</think><answer>(.*)</answer><eos>", "".join(tokens))
    return 0.0 if inside is None else 0.1 + (inside[1] == answer)


def reward_of_text_with_counts(tokens, answer):
    once = all("".join(tokens).count(tag) == 1 for tag in TAGS)
    return reward_of_text(tokens, answer) if once else 0.0


def reward_any_of_several(tokens, answer):
    found = re.findall("<answer>(.*?)</answer>", "".join(tokens))
    return max(reward_with(tokens, answer), float(len(found) > 1 and answer in found))


# 9.5 A test for the whole loss --------------------------------------------------------------------------------------


def answer_loss_with(read=logps_with, terms: Terms = clipped, kl=k3):
    """GRPO's loss of one answer: the mean over its tokens of -clipped + kl_weight * k3. Bugs replace a part of it."""

    def answer_loss(logits, tokens, prompt_length, end, old_logp, ref_logp, advantage, epsilon, kl_weight):
        logp, mask = read(logits, tokens, prompt_length, end)
        gains = terms((logp - old_logp).exp(), torch.tensor(advantage), epsilon)
        return -(gains - kl_weight * kl(ref_logp - logp))[mask].mean()

    return answer_loss
