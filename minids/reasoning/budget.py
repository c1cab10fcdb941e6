"""Thinking bought at test time: answers after a thought cut off at a budget, and the vote of several answers."""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from minids.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from minids.model.transformer import MiniDS
from minids.reasoning.rewards import Reward, read_response
from minids.reasoning.rollout import Sample, sample
from minids.reasoning.tasks import Problem


def answer_within(
    model: MiniDS,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    group_size: int,
    *,
    thought_tokens: int,
    answer_tokens: int = 24,
    **options,
) -> list[list[Sample]]:
    """A group of scored answers to each problem, given after at most `thought_tokens` of thought.

    The tags are forced: <think>, a thought of the model's that may be cut off, </think><answer>, and again the model.
    Options as in `rollout.sample`. The samples have no log-probabilities: a part of each was never drawn.
    """
    special = {tokenizer.token_id(name) for name in SPECIAL_TOKENS}
    think, think_no_more, reply = (tokenizer.token_id(name) for name in ("<think>", "</think>", "<answer>"))
    repeated = [problem for problem in problems for _ in range(group_size)]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(problem.prompt)] for problem in repeated]
    thoughts: list[list[int]] = [[] for _ in prompts]
    if thought_tokens:
        thinking = [[*prompt, think] for prompt in prompts]
        thoughts, _ = sample(model, thinking, max_new_tokens=thought_tokens, stop=think_no_more, **options)
    written = [[think, *takewhile(lambda token: token not in special, t), think_no_more, reply] for t in thoughts]
    asked = [prompt + begun for prompt, begun in zip(prompts, written, strict=True)]
    replies, _ = sample(model, asked, max_new_tokens=answer_tokens, stop=tokenizer.eos_id, **options)
    responses = [read_response(begun + rest, tokenizer) for begun, rest in zip(written, replies, strict=True)]
    scores = reward(repeated, responses)
    samples = [Sample(*fields, [], score) for *fields, score in zip(repeated, prompts, responses, scores, strict=True)]
    return [samples[i : i + group_size] for i in range(0, len(samples), group_size)]


def majority_vote(samples: Sequence[Sample]) -> Sample | None:
    """The first of the samples that give the commonest answer; of equally common ones, that given first.

    What cannot be read as an answer has no vote; None where nothing can.
    """
    voters = [sample for sample in samples if sample.response.answer is not None]
    votes = Counter(sample.response.answer.strip() for sample in voters)
    return max(voters, key=lambda sample: votes[sample.response.answer.strip()], default=None)


def consensus(groups: Sequence[Sequence[Sample]], voters: int) -> list[float]:
    """cons@`voters`: for each problem, how often a vote is right, of as many votes as its samples have room for."""
    samples = min(map(len, groups))
    if not 1 <= voters <= samples:
        raise ValueError(f"voters={voters}: must be at least 1, and at most the {samples} samples of a problem")
    shares = []
    for group in groups:
        winners = [majority_vote(group[i : i + voters]) for i in range(0, len(group) - voters + 1, voters)]
        right = sum(winner is not None and winner.score.parts["accuracy"] == 1 for winner in winners)
        shares.append(right / len(winners))
    return shares
