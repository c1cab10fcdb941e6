"""Exercises of chapter 9: advantages, the clipped loss, log-probabilities and their mask, a reward; a test."""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Function, SpotTheBug
from minids.course.exercises.chapter09_mistakes import (
    TAGS,
    advantages_with,
    answer_loss_with,
    clipped_always,
    clipped_swapped,
    equal_numbers,
    equal_without_spaces,
    inverted,
    k1,
    logps_end_is_zero,
    logps_with,
    loss_of_whole_answers,
    loss_with,
    maximised,
    of_padded_length,
    of_padding_too,
    of_tokens,
    reward_any_of_several,
    reward_anywhere,
    reward_of_text,
    reward_of_text_with_counts,
    reward_with,
    unclipped,
)

# 9.1 Advantages -----------------------------------------------------------------------------------------------------


def advantages(rewards: Float[Tensor, "groups size"]) -> Float[Tensor, "groups size"]:
    """(r - mean) / (std + 1e-4) within each group, with the sample's standard deviation."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def advantage_examples(g: Generator) -> list[tuple]:
    by_hand = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    close = 1e-3 * torch.rand(2, 4, generator=g)  # here 1e-4 is no longer small
    random = [(torch.rand(*size, generator=g),) for size in ((2, 7), (1, 2))]
    return [(by_hand,), *random, (torch.zeros(3, 5),), (close,)]


# 9.2 The clipped loss -----------------------------------------------------------------------------------------------


def clipped_loss(
    logp: Float[Tensor, "batch seq"],
    old_logp: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch"],
    mask: Bool[Tensor, "batch seq"],
    epsilon: float,
) -> Float[Tensor, ""]:
    """GRPO without its KL (DeepSeekMath eq. 3), to be minimised."""
    ratio, advantage = (logp - old_logp).exp(), advantages[:, None]
    gains = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
    return -((gains * mask).sum(1) / mask.sum(1)).mean()


def loss_examples(g: Generator) -> list[tuple]:
    def example(batch, seq, epsilon, prompt=0):
        old_logp = -3 * torch.rand(batch, seq, generator=g)
        logp = old_logp + 0.5 * torch.randn(batch, seq, generator=g)
        lengths = torch.randint(prompt + 1, seq, (batch, 1), generator=g)
        lengths[0] = seq
        place = torch.arange(seq)
        return logp, old_logp, torch.randn(batch, generator=g), (place >= prompt) & (place < lengths), epsilon

    return [example(4, 6, 0.2), example(2, 9, 0.1), example(7, 3, 0.28), example(3, 8, 0.2, prompt=3)]


# 9.3 Log-probabilities of an answer ---------------------------------------------------------------------------------


def answer_logps(
    logits: Float[Tensor, "seq vocab"], tokens: Int[Tensor, "seq"], prompt_length: int, end: int
) -> tuple[Float[Tensor, "seq_minus_1"], Bool[Tensor, "seq_minus_1"]]:
    """Of each position but the last: log-probability of the next token; was that token sampled by the model?"""
    logp = logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    in_answer = torch.arange(len(tokens)) >= prompt_length
    ended_before = ((tokens == end) & in_answer).int().cumsum(0)[:-1] > 0
    return logp, in_answer[1:] & ~ended_before


def logp_examples(g: Generator) -> list[tuple]:
    def example(tokens, prompt_length, vocab, end=0):
        return torch.randn(len(tokens), vocab, generator=g), torch.tensor(tokens), prompt_length, end

    return [
        example([4, 1, 2, 3, 0, 0, 0], 2, 5),
        example([1, 5, 2, 2, 3], 3, 6),  # never ended
        example([4, 0, 2, 3, 0], 2, 5),  # an end token in the prompt
        example([3, 1, 0, 0, 0, 0], 1, 4),
        example([2, 1, 0, 0], 2, 3),  # an empty answer
        example([1, 3, 0, 2, 3, 0, 0], 2, 4, end=3),  # padding that is not the end token, which is also in the prompt
    ]


# 9.4 A reward that cannot be gamed ----------------------------------------------------------------------------------


def reward(tokens: list[str], answer: str) -> float:
    """1.1 for the correct answer in the correct format, 0.1 for the format alone, 0 for everything else."""
    if [token for token in tokens if token in TAGS] != TAGS:
        return 0.0
    starts, closes, opens, ends, _ = map(tokens.index, TAGS)
    if starts or opens != closes + 1 or tokens[ends + 1 :] != ["<eos>"]:
        return 0.0
    return 0.1 + ("".join(tokens[opens + 1 : ends]) == answer)


def reward_examples(g: Generator) -> list[tuple]:
    thought, correct = ["<think>", "a", "</think>"], ["<answer>", "1", "8", "</answer>"]
    wrong, spelled = ["<answer>", "6", "</answer>"], ["<answer", ">18</", "answer>"]  # short: messages show them
    responses = [
        [*thought, *correct, "<eos>"],
        ["<think>", "</think>", *correct, "<eos>"],
        [*thought, *wrong, "<eos>"],
        [*thought, *spelled, "<eos>"],
        ["<think>", *spelled, "</think>", *wrong, "<eos>"],
        [*thought, *wrong, *correct, "<eos>"],
        [*thought, *correct, *wrong, "<eos>"],
        ["<think>", "18", *correct, "</think>", *wrong, "<eos>"],
        ["<think>", "18", "</think>", *wrong, "<eos>"],
        ["<think>", *thought, *correct, "<eos>"],
        ["<think>", *correct, "<eos>"],
        ["18", *thought, *correct, "<eos>"],
        [*thought, "18", *correct, "<eos>"],
        [*thought, *correct, "18", "<eos>"],
        [*thought, *correct, "<eos>", "18"],
        [*thought, *correct, "<eos>", "<eos>"],
        [*correct, *thought, "<eos>"],
        [*thought, "<answer>", "</answer>", "<eos>"],
        [*thought, "<answer>", " 18", "</answer>", "<eos>"],
        [*thought, "<answer>", "018", "</answer>", "<eos>"],
        [*thought, "<answer>", "\uff11\uff18", "</answer>", "<eos>"],  # full-width digits
        [*thought, *correct],
        [*correct, "<eos>"],
        [],
    ]
    return [*((response, "18") for response in responses), (responses[0], "8"), (responses[2], "6")]


EXERCISES = [
    Function(
        "9.1", "advantages", advantages, advantage_examples,
        mistakes={
            "mean and deviation are taken over the whole batch": partial(advantages_with, whole_batch=True),
            "the standard deviation is divided by the group's size, not by one less":
                partial(advantages_with, correction=0),
            "the division by the standard deviation is left out": partial(advantages_with, scaled=False),
            "nothing protects a group of equals from a division by zero": partial(advantages_with, eps=0.0),
            "the number added to the standard deviation is much smaller than 1e-4":
                partial(advantages_with, eps=1e-8),
            "1e-4 is added to the variance, inside the root": partial(advantages_with, inside=True),
            "mean and deviation are taken over the whole batch, and the deviation is divided by its size":
                partial(advantages_with, whole_batch=True, correction=0),
            "the mean is taken over the whole batch, and the division by the deviation is left out":
                partial(advantages_with, whole_batch=True, scaled=False),
        },
        hints=(
            "one row is one group: which dimension do mean and deviation run along?",
            "mean(1, keepdim=True) and std(1, keepdim=True), which divides by G - 1; 1e-4 is added to the deviation",
        ),
        section="chapter 09, section 2.2: the advantages of one group",
    ),
    Function(
        "9.2", "clipped_loss", clipped_loss, loss_examples, gradients=("logp",),
        mistakes={
            "the bounds are swapped for negative advantages": partial(loss_with, terms=clipped_swapped),
            "the ratio is always clipped, without the minimum": partial(loss_with, terms=clipped_always),
            "nothing is clipped": partial(loss_with, terms=unclipped),
            "long answers weigh more, as all tokens are averaged together": partial(loss_with, mean=of_tokens),
            "the terms of an answer are divided by the padded length, not by the number of its tokens":
                partial(loss_with, mean=of_padded_length),
            "padding is counted": partial(loss_with, mean=of_padding_too),
            "the objective is returned, which is to be maximised": maximised(clipped_loss),
            "the ratio is that of the log-probabilities": partial(loss_with, ratio=torch.div),
            "the ratio is inverted": partial(loss_with, ratio=inverted),
            "one ratio is used for a whole answer, as in R1's equation": loss_of_whole_answers,
            "the objective is returned, and padding is counted": maximised(partial(loss_with, mean=of_padding_too)),
            "nothing is clipped, and all tokens are averaged together":
                partial(loss_with, terms=unclipped, mean=of_tokens),
            "the ratio is always clipped, and padding is counted":
                partial(loss_with, terms=clipped_always, mean=of_padding_too),
        },
        hints=(
            "three steps: a term for each token, a mean within each answer over its own tokens, a mean over answers",
            "minimum(ratio * A, clamp(ratio) * A) with A of shape [batch, 1]; (terms * mask).sum(1) / mask.sum(1)",
        ),
        section="chapter 09, section 2.3 (the clip) and section 2.5 (from answers to tokens)",
        points=2,
    ),
    Function(
        "9.3", "answer_logps", answer_logps, logp_examples,
        mistakes={
            "position t scores token t, its own input": partial(logps_with, unshifted=True),
            "the tokens after the end token are counted": partial(logps_with, padding=True),
            "the end token is left out, though the model sampled it": partial(logps_with, end_counts=False),
            "the prompt is counted": partial(logps_with, prompt=True),
            "logits are taken for log-probabilities": partial(logps_with, normalised=False),
            "an end token in the prompt ends the answer": partial(logps_with, prompt_ends=True),
            "the mask tells of each position's own token, not of the next one": partial(logps_with, late=True),
            "token 0 ends the answer, whatever `end` is": logps_end_is_zero,
            "the prompt and the tokens after the end token are counted":
                partial(logps_with, prompt=True, padding=True),
            "logits are taken for log-probabilities, and the tokens after the end token are counted":
                partial(logps_with, normalised=False, padding=True),
            "the end token is left out, and an end token in the prompt ends the answer":
                partial(logps_with, end_counts=False, prompt_ends=True),
        },
        hints=(
            "decide for each token: is it part of the answer, and did an end token of the answer come before it?",
            "logits[:-1] and tokens[1:] belong together; the first end token from prompt_length on still counts",
        ),
        section="chapter 09, section 2.5: from answers to tokens",
        points=2, outputs=("the log-probabilities", "the mask"),
    ),
    Function(
        "9.4", "reward", reward, reward_examples,
        mistakes={
            "the correct answer may stand anywhere": reward_anywhere,
            "the tokens are joined, so that tags spelled out in several tokens count as tags": reward_of_text,
            "tags are counted in the joined text, so that those spelled out count as tags": reward_of_text_with_counts,
            "one correct answer among several is enough": reward_any_of_several,
            "numbers are compared, so that 018 and full-width digits pass": partial(reward_with, same=equal_numbers),
            "spaces around the answer are ignored": partial(reward_with, same=equal_without_spaces),
            "an output that never ended is taken for complete": partial(reward_with, unended=True),
            "text outside the tags is allowed": partial(reward_with, text_outside=True),
            "a correct answer gets 1.0, without the 0.1 for the format": partial(reward_with, full=1.0),
            "an output that never ended is taken for complete, and text outside the tags is allowed":
                partial(reward_with, unended=True, text_outside=True),
            "an output that never ended is taken for complete, and numbers are compared":
                partial(reward_with, unended=True, same=equal_numbers),
        },
        hints=(
            "work on the list of tokens: once they are joined, a tag and its spelling are the same text",
            "the tokens that are tags must be the five tags in order; then their places say what stands outside",
        ),
        section="chapter 09, section 3.2: rewards that are rules",
        points=3,
    ),
    SpotTheBug(
        "9.5", "test_answer_loss", answer_loss_with(),
        (
            Bug("the clip's bounds are swapped for negative advantages", answer_loss_with(terms=clipped_swapped),
                "A < 0, ratio 2 or 1/2"),
            Bug("log-probabilities are off by one", answer_loss_with(read=partial(logps_with, unshifted=True)),
                "does row t predict token t + 1?"),
            Bug("k1 as the KL loss", answer_loss_with(kl=k1), "can the penalty be negative? k3 never is"),
            Bug("tokens after the end count", answer_loss_with(read=partial(logps_with, padding=True)),
                "add padding: the loss must not change"),
        ),
        hints=(
            "compute the loss yourself in a loop over the sampled tokens, for both signs of the advantage",
            "choose old_logp so that ratios lie above 1.2, below 0.8 and near 1, ref_logp unlike logp, and padding",
        ),
        section="chapter 09, sections 2.3 to 2.5: the clip, the KL penalty, tokens",
    ),
]  # fmt: skip
