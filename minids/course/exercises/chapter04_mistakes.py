"""Steps of multi-token prediction, correct and changed, and the known mistakes of chapter 4's exercises.

A dictionary maps the description of a mistake to the keywords with which the reference makes it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minids.course.exercises.mistakes import Changes

# 4.1 Inputs and labels ------------------------------------------------------------------------------------------------

ALIGN_MISTAKES: Changes = {
    "the module receives its own label": {"inputs": lambda t, k: t[k + 1 :]},
    "the module receives the token of its own position": {"inputs": lambda t, k: t[: len(t) - k - 1]},
    "the label is the main model's": {"labels": lambda t, k: t[1 : len(t) - k]},
    "every depth is aligned like depth 1": {"inputs": lambda t, k: t[1:-1], "labels": lambda t, k: t[2:]},
    "the text wraps around at its end": {
        "inputs": lambda t, k: t.roll(-k)[:-1],
        "labels": lambda t, k: t.roll(-k - 1)[:-1],
    },
}


# 4.2 Importing a projection -------------------------------------------------------------------------------------------


def by_column(part: Float[Tensor, "dim dim"], gain: Float[Tensor, "dim"]) -> Float[Tensor, "dim dim"]:
    """Scale the inputs of a projection."""
    return part * gain


IMPORT_MISTAKES: Changes = {
    "the halves keep the released order": {"swapped": False},
    "each half is scaled by the gain of the other norm": {"gains": lambda enorm, hnorm: (hnorm, enorm)},
    "the columns are divided by the gains": {"gains": lambda enorm, hnorm: (1 / enorm, 1 / hnorm)},
    "the gains scale the rows, the outputs of the projection": {"scale": lambda part, gain: part * gain[:, None]},
    "the gains are left out": {
        "gains": lambda enorm, hnorm: (torch.ones_like(enorm), torch.ones_like(hnorm)),
        "scale": by_column,
    },
}


# 4.3 The loss ---------------------------------------------------------------------------------------------------------

LOSS_MISTAKES: Changes = {
    "each depth is divided by its own number of labels": {"divisor": lambda tokens, labels: labels},
    "it is divided by the T + 1 tokens, not by the T labels of the main model": {
        "divisor": lambda tokens, labels: tokens
    },
    "a depth is not divided by anything": {"divisor": lambda tokens, labels: 1},
    "the depths are added up and not averaged": {"average": False},
    "the labels are one place too early": {"ahead": 0},
    "the labels are one place too late": {"ahead": 2},
    "the loss is not multiplied by `mtp_weight`": {"weighted": False},
}


# 4.4 Verifying a draft ------------------------------------------------------------------------------------------------


def by_ratio(p: Tensor, q: Tensor, u: Tensor | float) -> Tensor:
    """Accept with probability min(1, p / q); u is uniform in [0, 1)."""
    return u * q < p


def by_inverse_ratio(p, q, u):
    return u * p < q


DRAFT_MISTAKES: Changes = {
    "the ratio is inverted, q / p": {"accepts": by_inverse_ratio},
    "the draft model's probability q is not used": {"accepts": lambda p, q, u: u < p},
    "the draft is accepted only where p >= q, never by chance": {"accepts": lambda p, q, u: p >= q},
    "the draft is accepted where `u` equals the probability, so that u = 0 accepts a token of probability 0": {
        "accepts": lambda p, q, u: u * q <= p
    },
    "the draft is accepted where `u` is above the probability": {"accepts": lambda p, q, u: u * q >= p},
    "a rejection is drawn from p itself": {"rest": lambda p, q, draft: p, "normalised": True},
    "a rejection is drawn from |p - q|": {"rest": lambda p, q, draft: (p - q).abs()},
    "a rejection is drawn from max(q - p, 0)": {"rest": lambda p, q, draft: (q - p).clamp(min=0)},
    "a rejection is drawn from p without the rejected token": {
        "rest": lambda p, q, draft: p * (torch.arange(len(p)) != draft)
    },
    "the distribution does not sum to 1": {"normalised": False},
}


# 4.5 The loop ---------------------------------------------------------------------------------------------------------

LOOP_MISTAKES: Changes = {
    "the drafts are accepted without verification": {"verified": False, "wrong_kept": False},
    "the model's token after the last accepted draft is not used": {"bonus": 0},
    "the last round runs over the limit": {"cut": False},
    "the first incorrect draft is kept, before the model's token": {"wrong_kept": True},
    "the passes are counted per token, not per round": {"passes_per_round": 0},
}
