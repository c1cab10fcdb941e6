"""Exercises of chapter 9: advantages, the clipped loss, log-probabilities and their mask, a reward; a test."""

import re
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Function, SpotTheBug

# 9.1 Advantages -----------------------------------------------------------------------------------------------------


def advantages(rewards: Float[Tensor, "groups size"]) -> Float[Tensor, "groups size"]:
    """(r - mean) / (std + 1e-4) within each group, with the sample's standard deviation."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def advantages_over_batch(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def advantages_by_population(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)


def advantages_unscaled(rewards):
    return rewards - rewards.mean(1, keepdim=True)


def advantages_without_eps(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)


def advantage_examples(g: Generator) -> list[tuple]:
    by_hand = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    return [(by_hand,), (torch.rand(2, 7, generator=g),), (torch.rand(1, 2, generator=g),), (torch.zeros(3, 5),)]


# 9.2 The clipped loss -----------------------------------------------------------------------------------------------

Terms = Callable[[Tensor, Tensor, float], Tensor]


def clipped(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def clipped_swapped(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """The bounds change places for negative advantages."""
    inside = ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
    outside = ratio * advantage
    return torch.where(advantage < 0, torch.maximum(outside, inside), torch.minimum(outside, inside))


def clipped_always(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return ratio.clamp(1 - epsilon, 1 + epsilon) * advantage


def loss_with(terms: Terms, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """Minus the mean over answers of the mean of their tokens' terms."""
    gains = terms((logp - old_logp).exp(), advantages[:, None], epsilon)
    return -((gains * mask).sum(1) / mask.sum(1)).mean()


def clipped_loss(
    logp: Float[Tensor, "batch seq"],
    old_logp: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch"],
    mask: Bool[Tensor, "batch seq"],
    epsilon: float,
) -> Float[Tensor, ""]:
    """GRPO without its KL (DeepSeekMath eq. 3), to be minimised."""
    return loss_with(clipped, logp, old_logp, advantages, mask, epsilon)


def loss_over_all_tokens(logp, old_logp, advantages, mask, epsilon):
    return -clipped((logp - old_logp).exp(), advantages[:, None], epsilon)[mask].mean()


def loss_of_padding(logp, old_logp, advantages, mask, epsilon):
    return clipped_loss(logp, old_logp, advantages, torch.ones_like(mask), epsilon)


def loss_maximised(logp, old_logp, advantages, mask, epsilon):
    return -clipped_loss(logp, old_logp, advantages, mask, epsilon)


def loss_examples(g: Generator) -> list[tuple]:
    def example(batch, seq, epsilon):
        old_logp = -3 * torch.rand(batch, seq, generator=g)
        logp = old_logp + 0.5 * torch.randn(batch, seq, generator=g)
        lengths = torch.randint(1, seq, (batch, 1), generator=g)
        lengths[0] = seq
        return logp, old_logp, torch.randn(batch, generator=g), torch.arange(seq) < lengths, epsilon

    return [example(4, 6, 0.2), example(2, 9, 0.1), example(7, 3, 0.28)]


# 9.3 Log-probabilities of an answer ---------------------------------------------------------------------------------


def answer_logps(
    logits: Float[Tensor, "seq vocab"], tokens: Int[Tensor, "seq"], prompt_length: int, end: int
) -> tuple[Float[Tensor, "seq_minus_1"], Bool[Tensor, "seq_minus_1"]]:
    """Of each position but the last: log-probability of the next token; was that token sampled by the model?"""
    logp = logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    ended_before = ((tokens == end) & in_answer(tokens, prompt_length)).int().cumsum(0)[:-1] > 0
    return logp, in_answer(tokens, prompt_length)[1:] & ~ended_before


def in_answer(tokens: Int[Tensor, "seq"], prompt_length: int) -> Bool[Tensor, "seq"]:
    return torch.arange(len(tokens)) >= prompt_length


def logps_off_by_one(logits, tokens, prompt_length, end):
    _, mask = answer_logps(logits, tokens, prompt_length, end)
    return logits[1:].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0], mask


def logps_with_padding(logits, tokens, prompt_length, end):
    return answer_logps(logits, tokens, prompt_length, end)[0], in_answer(tokens, prompt_length)[1:]


def logps_without_end(logits, tokens, prompt_length, end):
    logp, mask = answer_logps(logits, tokens, prompt_length, end)
    return logp, mask & (tokens[1:] != end)


def logps_with_prompt(logits, tokens, prompt_length, end):
    logp, mask = answer_logps(logits, tokens, prompt_length, end)
    return logp, mask | ~in_answer(tokens, prompt_length)[1:]


def logps_unnormalised(logits, tokens, prompt_length, end):
    _, mask = answer_logps(logits, tokens, prompt_length, end)
    return logits[:-1].gather(-1, tokens[1:, None])[:, 0], mask


def logp_examples(g: Generator) -> list[tuple]:
    def example(tokens, prompt_length, vocab):
        return torch.randn(len(tokens), vocab, generator=g), torch.tensor(tokens), prompt_length, 0

    return [
        example([4, 1, 2, 3, 0, 0, 0], 2, 5),
        example([1, 5, 2, 2, 3], 3, 6),  # never ended
        example([0, 1, 0], 2, 3),  # a prompt that begins with the end token
        example([3, 1, 0, 0, 0, 0], 1, 4),
    ]


# 9.4 A reward that cannot be gamed ----------------------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<eos>"]


def reward(tokens: list[str], answer: str) -> float:
    """1.1 for the right answer in the right form, 0.1 for the form alone, 0 for all else."""
    if [token for token in tokens if token in TAGS] != TAGS:
        return 0.0
    starts, closes, opens, ends, _ = map(tokens.index, TAGS)
    if starts or opens != closes + 1 or tokens[ends + 1 :] != ["<eos>"]:
        return 0.0
    return 0.1 + ("".join(tokens[opens + 1 : ends]) == answer)


def reward_anywhere(tokens, answer):
    return 0.1 * (reward(tokens, "") > 0) + (answer in "".join(tokens))


def reward_spelled_out(tokens, answer):
    inside = re.fullmatch("<think>.*?</think><answer>(.*?)</answer><eos>", "".join(tokens))
    if inside is None or any("".join(tokens).count(tag) != 1 for tag in TAGS):
        return 0.0
    return 0.1 + (inside[1] == answer)


def reward_any_of_several(tokens, answer):
    found = re.findall("<answer>(.*?)</answer>", "".join(tokens))
    return max(reward(tokens, answer), float(len(found) > 1 and answer in found))


def reward_by_number(tokens, answer):
    inside = "".join(tokens).rpartition("<answer>")[2].partition("</answer>")[0]
    right = reward(tokens, inside) > 1 and inside.isdecimal() and int(inside) == int(answer)
    return 1.1 if right else reward(tokens, answer)


def reward_unended(tokens, answer):
    return reward(tokens if tokens[-1:] == ["<eos>"] else [*tokens, "<eos>"], answer)


def reward_examples(g: Generator) -> list[tuple]:
    thought, right = ["<think>", " b7+8=15", "</think>"], ["<answer>", "1", "8", "</answer>"]
    wrong, spelled = ["<answer>", "6", "</answer>"], ["<", "answer", ">", "1", "8", "<", "/answer", ">"]
    responses = [
        [*thought, *right, "<eos>"],
        ["<think>", "</think>", *right, "<eos>"],
        [*thought, *wrong, "<eos>"],
        [*thought, *spelled, "<eos>"],
        [*thought, *wrong, *right, "<eos>"],
        [*thought, *right, *wrong, "<eos>"],
        ["<think>", "18", *right, "</think>", *wrong, "<eos>"],
        ["<think>", "18", "</think>", *wrong, "<eos>"],
        ["<think>", *right, "<eos>"],
        [*thought, "18", *right, "<eos>"],
        [*thought, "<answer>", "018", "</answer>", "<eos>"],
        [*thought, "<answer>", "\uff11\uff18", "</answer>", "<eos>"],  # full-width digits
        [*thought, *right],
        [*thought, *right, "<eos>", "18"],
        [*right, "<eos>"],
        [],
    ]
    return [(response, "18") for response in responses]


# 9.5 A test for the whole loss --------------------------------------------------------------------------------------


def k3(away: Tensor) -> Tensor:
    return away.exp() - away - 1


def k1(away: Tensor) -> Tensor:
    return -away


def answer_loss(
    logits, tokens, prompt_length, end, old_logp, ref_logp, advantage, epsilon, kl_weight,
    *, read=answer_logps, terms: Terms = clipped, kl=k3,
):  # fmt: skip
    """GRPO's loss of one answer: the mean over its tokens of -clipped + kl_weight * k3. Bugs replace a part of it."""
    logp, mask = read(logits, tokens, prompt_length, end)
    gains = terms((logp - old_logp).exp(), torch.tensor(advantage), epsilon)
    return -(gains - kl_weight * kl(ref_logp - logp))[mask].mean()


EXERCISES = [
    Function(
        "9.1", "advantages", advantages, advantage_examples,
        mistakes={
            "mean and deviation are taken over the whole batch": advantages_over_batch,
            "the standard deviation is divided by the group's size, not by one less": advantages_by_population,
            "the division by the standard deviation is left out": advantages_unscaled,
            "nothing protects a group of equals from a division by zero": advantages_without_eps,
        },
        hint="one row is one group: mean and std along dimension 1, with keepdim=True",
    ),
    Function(
        "9.2", "clipped_loss", clipped_loss, loss_examples,
        mistakes={
            "the bounds are swapped for negative advantages": partial(loss_with, clipped_swapped),
            "the ratio is always clipped, without the minimum": partial(loss_with, clipped_always),
            "long answers weigh more, as all tokens are averaged together": loss_over_all_tokens,
            "padding is counted": loss_of_padding,
            "the objective is returned, which is to be maximised": loss_maximised,
        },
        hint="ratio, then the smaller of two products, then the mean over each answer's own tokens",
        points=2,
    ),
    Function(
        "9.3", "answer_logps", answer_logps, logp_examples,
        mistakes={
            "position t is asked for token t, which it has just read": logps_off_by_one,
            "what stands after the end token is counted": logps_with_padding,
            "the end token is left out, though the model chose it": logps_without_end,
            "the prompt is counted": logps_with_prompt,
            "logits are taken for log-probabilities": logps_unnormalised,
        },
        hint="logits[:-1] and tokens[1:] belong together; the first end token of the answer still counts",
        points=2, outputs=("the log-probabilities", "the mask"),
    ),
    Function(
        "9.4", "reward", reward, reward_examples,
        mistakes={
            "the right number may stand anywhere": reward_anywhere,
            "tags that are spelled out in several tokens count as tags": reward_spelled_out,
            "one right answer among several is enough": reward_any_of_several,
            "numbers are compared, so that 018 and full-width digits pass": reward_by_number,
            "an output that never ended is taken for complete": reward_unended,
        },
        hint="list the tags that occur, in order: all five, once each; then ask what stands outside of them",
        points=3,
    ),
    SpotTheBug(
        "9.5", "test_answer_loss", answer_loss,
        (
            Bug("the clip's bounds are swapped for negative advantages", partial(answer_loss, terms=clipped_swapped),
                "A < 0, ratio 2 or 1/2"),
            Bug("log-probabilities are off by one", partial(answer_loss, read=logps_off_by_one),
                "does row t predict token t + 1?"),
            Bug("k1 as the KL loss", partial(answer_loss, kl=k1), "can the penalty be negative? k3 never is"),
            Bug("tokens after the end count", partial(answer_loss, read=logps_with_padding),
                "add padding: the loss must not move"),
        ),
    ),
]  # fmt: skip
