"""A reward that is learned from preferences: Bradley-Terry on the counts of an answer's tokens.

Notable choices: the reward is linear in the counts, so its parameters can be read, one per token of the vocabulary, and
it has no upper bound; it sees no correctness, which is what a policy trained on it can exploit. R1's reward models are
language models with a scalar head (FACTS.md section 8.2).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minids.reasoning.rewards import Response, RuleReward, Score
from minids.reasoning.rollout import Sample
from minids.reasoning.tasks import Problem

Pair = tuple[Sample, Sample]
"""The preferred answer and the other one."""


def preference(a: Sample, b: Sample, rng: random.Random, careless: float) -> Pair:
    """Return two answers to one problem, the preferred one first, as an annotator would who likes long answers.

    The annotator prefers the correct one; the longer one if both or none are, or, with probability `careless`, without
    looking at the answer.
    """
    by_length = rng.random() < careless or a.score.parts["accuracy"] == b.score.parts["accuracy"]
    quality = [len(s.response.tokens) if by_length else s.score.parts["accuracy"] for s in (a, b)]
    return (a, b) if quality[0] > quality[1] else (b, a)


def counts(responses: Sequence[Response], vocab_size: int) -> Float[Tensor, "responses vocab"]:
    """Return how often each token occurs in each response, in float64."""
    rows = [torch.bincount(torch.tensor(r.tokens), minlength=vocab_size) for r in responses]
    return torch.stack(rows).double()


def bradley_terry_loss(preferred: Float[Tensor, "pairs"], other: Float[Tensor, "pairs"]) -> Float[Tensor, ""]:
    """Return the mean of -log sigmoid(preferred - other), in nats: P(a preferred to b) = sigmoid(r(a) - r(b))."""
    return -F.logsigmoid(preferred - other).mean()


def fit(pairs: Sequence[Pair], vocab_size: int, decay: float = 1e-3) -> Float[Tensor, "vocab"]:
    """Return the rewards per token that minimise the Bradley-Terry loss + `decay` * |rewards|^2, by Newton's method."""
    preferred, other = (counts([pair[i].response for pair in pairs], vocab_size) for i in (0, 1))
    difference = preferred - other
    rewards = difference.new_zeros(vocab_size)
    for _ in range(30):
        p = torch.sigmoid(-difference @ rewards)  # of the pairs that the model would order the other way
        gradient = -difference.T @ p / len(pairs) + 2 * decay * rewards
        hessian = difference.T @ (difference * (p * (1 - p))[:, None]) / len(pairs)
        rewards = rewards - torch.linalg.solve(hessian + 2 * decay * torch.eye(vocab_size), gradient)
    return rewards


def agreement(rewards: Float[Tensor, "vocab"], pairs: Sequence[Pair]) -> float:
    """Return the fraction of pairs whose preferred answer has the higher reward."""
    preferred, other = (counts([pair[i].response for pair in pairs], len(rewards)) @ rewards for i in (0, 1))
    return (preferred > other).double().mean().item()


@dataclass(frozen=True)
class LearnedReward:
    """The learned reward, usable where a `RuleReward` is; the parts of `rules` are reported, and not trained on."""

    rewards: Float[Tensor, "vocab"]
    rules: RuleReward

    def __call__(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[Score]:
        totals = (counts(responses, len(self.rewards)) @ self.rewards).tolist()
        scores = self.rules(problems, responses)
        return [Score(dict(score.parts) | {"learned": t}, t) for score, t in zip(scores, totals, strict=True)]
