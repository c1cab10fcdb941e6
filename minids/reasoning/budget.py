"""Test-time compute: a thinking budget, and majority voting (cons@k)."""

import functools
from collections.abc import Sequence
from itertools import takewhile

import torch

from minids.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from minids.model.transformer import MiniDS
from minids.reasoning.rewards import Reward, apply_reward, read_response
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
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    max_cache_bytes: int = 2**28,
) -> list[list[Sample]]:
    """Sample a group of scored answers to each problem with a thinking budget of `thought_tokens` tokens.

    The tags are forced: <think>, the model's thought (truncated at the budget), </think><answer>, the model's answer.
    The other arguments are those of `rollout.sample`. The samples have no log-probabilities, because the tags were not
    sampled.
    """
    draw = functools.partial(
        sample, model, temperature=temperature, generator=generator, max_cache_bytes=max_cache_bytes
    )
    special = {tokenizer.token_id(name) for name in SPECIAL_TOKENS}
    think, end_think, begin_answer = (tokenizer.token_id(name) for name in ("<think>", "</think>", "<answer>"))
    repeated = [problem for problem in problems for _ in range(group_size)]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(problem.prompt)] for problem in repeated]
    thoughts: list[list[int]] = [[] for _ in prompts]
    if thought_tokens:
        thinking = [[*prompt, think] for prompt in prompts]
        thoughts, _ = draw(thinking, max_new_tokens=thought_tokens, stop=end_think)
    prefixes = [[think, *takewhile(lambda token: token not in special, t), end_think, begin_answer] for t in thoughts]
    prompts_so_far = [prompt + prefix for prompt, prefix in zip(prompts, prefixes, strict=True)]
    answers, _ = draw(prompts_so_far, max_new_tokens=answer_tokens, stop=tokenizer.eos_id)
    responses = [read_response(prefix + rest, tokenizer) for prefix, rest in zip(prefixes, answers, strict=True)]
    scores = apply_reward(reward, repeated, responses)
    parts = zip(repeated, prompts, responses, scores, strict=True)
    samples = [Sample(problem, prompt, response, [], score) for problem, prompt, response, score in parts]
    return [samples[i : i + group_size] for i in range(0, len(samples), group_size)]


def majority_vote(samples: Sequence[Sample]) -> Sample | None:
    """Return the first sample with the most frequent answer; of equally frequent answers, the one given first.

    A sample without a readable answer has no vote; None if there is no vote.
    """
    voters: dict[str, list[Sample]] = {}
    for voter in samples:
        if voter.response.answer is not None:
            voters.setdefault(voter.response.answer.strip(), []).append(voter)
    return max(voters.values(), key=len)[0] if voters else None


def consensus(groups: Sequence[Sequence[Sample]], voters: int) -> list[float]:
    """Return cons@`voters`: for each problem, the fraction of correct votes over disjoint groups of its samples.

    Raises `ValueError` for more voters than samples of a problem.
    """
    samples = min(map(len, groups))
    if not 1 <= voters <= samples:
        raise ValueError(f"voters={voters}: must be at least 1, and at most the {samples} samples of a problem")
    shares = []
    for group in groups:
        winners = [majority_vote(group[i : i + voters]) for i in range(0, len(group) - voters + 1, voters)]
        correct = sum(winner is not None and winner.score.parts["accuracy"] == 1 for winner in winners)
        shares.append(correct / len(winners))
    return shares
