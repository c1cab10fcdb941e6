"""Exercises of chapter 9: train a bandit, the detached ratio, log-probabilities and their mask, a reward; a test."""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises.chapter09_mistakes import (
    TAGS,
    answer_loss_with,
    bandit_with,
    clipped_swapped,
    equal_numbers,
    equal_without_spaces,
    k1,
    logps_end_is_zero,
    logps_with,
    maximised,
    of_answers,
    of_padding_too,
    on_policy_with,
    reward_any_of_several,
    reward_anywhere,
    reward_of_text,
    reward_of_text_with_counts,
    reward_with,
)

# 9.1 Train a bandit -------------------------------------------------------------------------------------------------


def train_bandit(
    logits: Float[Tensor, "answers"],
    rewards: Float[Tensor, "answers"],
    uniforms: Float[Tensor, "steps size"],
    learning_rate: float,
) -> Float[Tensor, "answers"]:
    """The policy after as many steps of policy gradient as `uniforms` has rows, with the group's mean as baseline."""
    for row in uniforms:
        policy = logits.softmax(-1)
        drawn = (row[:, None] > policy.cumsum(-1)).sum(-1)
        advantages = rewards[drawn] - rewards[drawn].mean()
        log_gradients = torch.eye(len(logits), dtype=logits.dtype)[drawn] - policy
        logits = logits + learning_rate * (advantages[:, None] * log_gradients).mean(0)
    return logits.softmax(-1)


def bandit_examples(g: Generator) -> list[tuple]:
    def example(answers, steps, size, learning_rate, rewards=None):
        logits = torch.randn(answers, generator=g, dtype=torch.float64)
        rewards = torch.rand(answers, generator=g, dtype=torch.float64) if rewards is None else rewards
        return logits, rewards, torch.rand(steps, size, generator=g, dtype=torch.float64), learning_rate

    some_correct = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    equal = torch.ones(4, dtype=torch.float64)
    return [example(6, 1, 4, 1.0, some_correct), example(6, 40, 8, 0.5, 3 + some_correct), example(4, 5, 3, 1.0, equal),
            example(5, 20, 16, 2.0)]  # fmt: skip


# 9.2 The detached ratio ---------------------------------------------------------------------------------------------


def on_policy_loss(
    logp: Float[Tensor, "batch seq"],
    ref_logp: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch"],
    mask: Bool[Tensor, "batch seq"],
    kl_weight: float,
) -> Float[Tensor, ""]:
    """Mean over sampled tokens of -rho A + kl_weight * rho * k3, where rho is 1 and has the gradient of logp."""
    ratio, away = (logp - logp.detach()).exp(), ref_logp - logp
    terms = ratio * (kl_weight * (away.exp() - away - 1) - advantages[:, None])
    return terms[mask].mean()


def on_policy_examples(g: Generator) -> list[tuple]:
    def example(batch, seq, kl_weight):
        logp = -3 * torch.rand(batch, seq, generator=g)
        lengths = torch.randint(1, seq, (batch, 1), generator=g)
        lengths[0] = seq
        ref_logp = logp + 0.5 * torch.randn(batch, seq, generator=g)
        return logp, ref_logp, torch.randn(batch, generator=g), torch.arange(seq) < lengths, kl_weight

    return [example(4, 6, 0.0), example(2, 9, 0.1), example(7, 3, 1.0)]


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
    alphabet = [*TAGS, "18", "6"]
    tries = torch.randint(len(alphabet), (200, 7), generator=g).tolist()  # of a policy that tries everything
    found = [[alphabet[i] for i in row[:length]] for length, row in zip((5, 6, 7) * 67, tries, strict=False)]
    return [*((response, "18") for response in responses + found), (responses[0], "8"), (responses[2], "6")]


EXERCISES = [
    Function(
        "9.1", "train_bandit", train_bandit, bandit_examples,
        mistakes={
            "no baseline is subtracted": partial(bandit_with, baseline="none"),
            "the baseline is the mean reward of all answers, not of the sampled ones":
                partial(bandit_with, baseline="all"),
            "every group is sampled from the first policy": partial(bandit_with, fresh=False),
            "the policy moves down the gradient": partial(bandit_with, sign=-1.0),
            "the terms of a group are added, not averaged": partial(bandit_with, added=True),
            "advantages are divided by the standard deviation": partial(bandit_with, scaled=True),
            "no baseline is subtracted, and every group is sampled from the first policy":
                partial(bandit_with, baseline="none", fresh=False),
            "the terms of a group are added, and the policy moves down the gradient":
                partial(bandit_with, added=True, sign=-1.0),
        },
        hints=(
            "per step: policy, sampled answers, their rewards minus the mean of these, gradient, new logits",
            "the gradient of log pi(a) is one-hot(a) - policy; average its products with the advantages over the group",
        ),
        section="chapter 09, section 2.1: reward minus baseline, and section 2.2: a hundred steps",
        points=2,
    ),
    Function(
        "9.2", "on_policy_loss", on_policy_loss, on_policy_examples, gradients=("logp",),
        mistakes={
            "the ratio has no gradient: both of its log-probabilities are detached, or none":
                partial(on_policy_with, ratio=False),
            "the KL term has no ratio with a gradient in front of it": partial(on_policy_with, ratio_of_kl=False),
            "log-probabilities stand in place of the ratio": partial(on_policy_with, plain=True),
            "k1 stands in place of k3": partial(on_policy_with, kl=k1),
            "the reference and the policy are exchanged in k3": partial(on_policy_with, exchanged=True),
            "padding is counted": partial(on_policy_with, mean=of_padding_too),
            "an answer's tokens are averaged first, so that those of long answers weigh less":
                partial(on_policy_with, mean=of_answers),
            "the objective is returned, which is to be maximised": maximised(on_policy_loss),
            "the KL term has no ratio with a gradient in front of it, and padding is counted":
                partial(on_policy_with, ratio_of_kl=False, mean=of_padding_too),
            "the objective is returned, and padding is counted":
                maximised(partial(on_policy_with, mean=of_padding_too)),
        },
        hints=(
            "the ratio is 1, but it must have a gradient: which of its two log-probabilities is a constant?",
            "ratio = exp(logp - logp.detach()); it multiplies the advantage and the k3, and keeps its gradient in both",
        ),
        section="chapter 09, section 4.2: a loss of zero, and section 4.3: the KL penalty",
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
        section="chapter 09, section 5.1: shift, mask and average",
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
        section="chapter 09, section 5.2: rewards by rule",
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
        section="chapter 09, sections 4.1, 4.3 and 5.1: the clip, the KL penalty, tokens",
    ),
    Experiment(
        "9.6", "flat_share", "share of groups without advantage", 0.09, 0.145,
        hints=(
            "draw a probability for every question, then 16 answers with it; a group is flat if it has 0 or 16 correct",
            "p = torch.rand(2000, 1); correct = torch.rand(2000, 16) < p; then compare each row's sum with 0 and 16",
        ),
        section="chapter 09, section 3: the advantages of a group",
    ),
    OpenTask(
        "9.7", "hack",
        (
            "the reward pays for something that a person would accept as a sign of a correct answer",
            "it says before the run what the policy will do, and how accuracy, format and length will change",
            "training reward and accuracy (pass@1 by the chapter's rule) are both shown, at step 0 and at the end",
            "it quotes three answers from the end, and says what the policy has learned",
            "it names the smallest change of the reward that prevents this, and runs it",
        ),
        hints=(
            "for example: 1 if the correct number occurs anywhere in the output; or 0.3 for each written step",
            "a reward is a function of lists of problems and responses that returns Score(parts, total) for each",
        ),
        section="chapter 09, section 8.4: another reward, and section 9: a weak test",
    ),
]  # fmt: skip
