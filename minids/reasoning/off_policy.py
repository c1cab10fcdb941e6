"""Off-policy updates: the importance ratio, what it tells of an update, and V3.2's mask of stale sequences.

A batch of answers is sampled from one policy. Its first update is on-policy: every ratio is 1, and no clip acts. Every
further update, by another mini-batch or another epoch, trains a policy that has changed since the answers were sampled.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Ratio = Literal["token", "sequence", "product"]


def log_ratio(logp: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return logp - other, 0 where both are -inf, clamped to where sums of squares of ratios are finite.

    Backward, an infinite ratio would give 0 * inf = NaN where its gradient is clipped to zero; beyond the clamp the
    gradient is zero. A NaN stays NaN, also backward, so that a diverged model is noticed.
    """
    same = (logp == other) & logp.isinf()
    return _clamped(logp.masked_fill(same, 0.0) - other.masked_fill(same, 0.0))


def _clamped(log_ratios: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    limit = math.log(torch.finfo(log_ratios.dtype).max) / 2 - 5
    return torch.where(log_ratios.abs() > limit, log_ratios.detach().clamp(-limit, limit), log_ratios)


def importance_ratio(
    log_ratios: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], ratio: Ratio
) -> Float[Tensor, "batch seq_or_1"]:
    """Return the importance ratio of each token, or one per sequence; `log_ratios` are 0 outside of the mask.

    "token": the token's probability now over that at sampling (DeepSeekMath eq. 3). "sequence": the geometric mean of
    these ratios over the sequence (GSPO). "product": their product, the probability of the whole answer now over that
    at sampling (R1 eq. 1); it grows and shrinks exponentially with the length.
    """
    if ratio == "token":
        return log_ratios.exp()
    total = log_ratios.sum(1, keepdim=True)
    return (_clamped(total) if ratio == "product" else total / mask.sum(1, keepdim=True).clamp(min=1)).exp()


def off_policy_mask(
    log_ratios: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch"],
    mask: Bool[Tensor, "batch seq"],
    threshold: float,
) -> Bool[Tensor, "batch"]:
    """Return which sequences keep their policy gradient (V3.2's off-policy sequence mask; FACTS.md section 10.2).

    A sequence is dropped if its advantage is negative and its mean of log(old / new) over the tokens, which estimates
    KL(old || new), exceeds `threshold`: the geometric mean of its token ratios is then below exp(-threshold).
    """
    divergence = -log_ratios.detach().sum(1) / mask.sum(1).clamp(min=1)
    return ~((advantages < 0) & (divergence > threshold))


def ratio_statistics(
    log_ratios: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    ratio: Ratio,
    clip_low: float,
    clip_high: float,
) -> dict[str, Float[Tensor, ""]]:
    """Return how far the policy has moved since sampling.

    Sums over the tokens: "outside_clip", the tokens whose ratio is below 1 - clip_low or above 1 + clip_high, clipped
    or not (the clip stops one side for each sign of the advantage), and "kl_old_new", the estimate rho - 1 - log(rho)
    of KL(old || new), from the token ratios. A maximum: "largest_ratio".
    """
    log_ratios = log_ratios.detach()
    rho = importance_ratio(log_ratios, mask, ratio).expand_as(log_ratios)
    outside = ((rho < 1 - clip_low) | (rho > 1 + clip_high)) & mask
    return {
        "outside_clip": outside.sum().to(rho.dtype),
        "kl_old_new": (torch.expm1(log_ratios) - log_ratios).masked_fill(~mask, 0.0).sum(),
        "largest_ratio": rho.masked_fill(~mask, 0.0).max(),
    }
