"""Steps of multi-token prediction, correct and changed, and the known mistakes of chapter 4's exercises.

A dictionary maps the description of a mistake to the keywords with which the reference makes it.
"""

import torch
import torch.nn.functional as F
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


# 4.2 Joining ----------------------------------------------------------------------------------------------------------


def norm(x: Float[Tensor, "positions dim"], gain: Float[Tensor, "dim"]) -> Float[Tensor, "positions dim"]:
    return F.rms_norm(x, x.shape[-1:], gain, 1e-6)


def scaled(x, gain):
    return x * gain


def layer_norm(x, gain):
    return F.layer_norm(x, x.shape[-1:], gain, None, 1e-6)


def torch_layer_norm(x, gain):
    return F.layer_norm(x, x.shape[-1:], gain)


def unit_length(x, gain):
    return F.normalize(x, dim=-1) * gain


def norm_without_eps(x, gain):
    return F.rms_norm(x, x.shape[-1:], gain)


JOIN_MISTAKES: Changes = {
    "the embedding comes first": {"hidden_first": False},
    "the embedding is not normalised": {"norms": (norm, scaled)},
    "the hidden state is not normalised": {"norms": (scaled, norm)},
    "one norm is taken over both vectors together": {"norms": (norm, norm), "together": True},
    "the mean is subtracted too, as in LayerNorm": {"norms": (layer_norm, layer_norm)},
    "torch's layer_norm, with its eps=1e-5, stands in place of RMSNorm": {"norms": (torch_layer_norm,) * 2},
    "a vector is divided by its length, not by its root mean square": {"norms": (unit_length, unit_length)},
    "eps=1e-6 is left out": {"norms": (norm_without_eps, norm_without_eps)},
    "the gains are not used": {"norms": (lambda x, gain: norm(x, torch.ones_like(gain)),) * 2},
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
