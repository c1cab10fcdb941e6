"""GRPO: group-relative advantages, the clipped surrogate loss, the KL penalty to the reference policy.

Notable choices: the loss is a sum of per-token terms times weights that depend on the whole batch (`token_weights`), so
a batch can be split into micro-batches; GRPO, R1's equation, Dr. GRPO, DAPO and GSPO are the same function with other
settings (`VARIANTS`), and so are V3.2's unbiased KL penalty and mask; a mask, never a length, marks the sampled tokens.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minids.reasoning.off_policy import Ratio, importance_ratio, log_ratio, off_policy_mask

Averaging = Literal["sequence", "token", "constant"]
Variant = Literal["grpo", "r1", "dr_grpo", "dapo", "gspo"]

VARIANTS: dict[Variant, dict[str, Any]] = {
    "grpo": dict(averaging="sequence", ratio="token", scale_by_std=True),
    "r1": dict(averaging="sequence", ratio="product", scale_by_std=True, clip_low=10.0, clip_high=10.0,
               kl_weight=0.001),
    "dr_grpo": dict(averaging="constant", ratio="token", scale_by_std=False, kl_weight=0.0),
    "dapo": dict(averaging="token", ratio="token", scale_by_std=True, clip_high=0.28, kl_weight=0.0,
                 dynamic_sampling=True),
    "gspo": dict(averaging="sequence", ratio="sequence", scale_by_std=True, clip_low=3e-4, clip_high=4e-4,
                 kl_weight=0.0),
}  # fmt: skip
"""Settings of each variant in a recipe (FACTS.md sections 8.1 and 8.6): DeepSeekMath eq. 3; R1 eq. 1 as printed, with
the clip and the KL weight of R1's first RL stage; Dr. GRPO; DAPO; GSPO.

Clips act from the second update on a batch: "gspo" needs one (`RLRecipe.mini_batches`), and with one update only the
higher clip of "dapo" is idle.
"""


def group_advantages(
    rewards: Float[Tensor, "groups size"], *, scale_by_std: bool = True, eps: float = 1e-4
) -> Float[Tensor, "groups size"]:
    """Return the group-relative advantages: (r - mean) / (std + eps), or r - mean (Dr. GRPO).

    The papers do not define the standard deviation; here it is the sample standard deviation, as in TRL (PITFALLS 24).
    A group of equal rewards has advantage 0. Computed in float64, where squares of large rewards are finite. Raises
    `ValueError` for groups of one, which have no standard deviation, and for rewards that are not finite.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"group_size={rewards.shape[1]}: must be at least 2, to compare answers")
    if not rewards.isfinite().all():
        raise ValueError(f"rewards hold {rewards[~rewards.isfinite()][0].item()}: every reward must be a finite number")
    exact = rewards.double()
    advantages = exact - exact.mean(1, keepdim=True)
    advantages = advantages.masked_fill(is_flat(rewards)[:, None], 0.0)  # the mean of equal values has rounding error
    scaled = advantages / (exact.std(1, keepdim=True) + eps) if scale_by_std else advantages
    return scaled.to(rewards.dtype)


def is_flat(rewards: Float[Tensor, "groups size"]) -> Bool[Tensor, "groups"]:
    """Return which groups have equal rewards, hence advantage 0 and no gradient."""
    return (rewards == rewards[:, :1]).all(1)


def kl_estimate(
    logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"], kind: Literal["k1", "k2", "k3"] = "k3"
) -> Float[Tensor, "*shape"]:
    """Estimate KL(policy || reference) per sampled token of the policy; its expectation is the KL (k2: approximately).

    k3 = r - log r - 1 with r = reference / policy, never negative (DeepSeekMath eq. 4). As losses the three differ: the
    expected gradient of k1 is zero, of k2 that of the KL, of k3 that of KL(reference || policy) (PITFALLS 25). Ratios
    that would overflow are clamped and have no gradient.
    """
    to_reference = log_ratio(ref_logp, logp)
    if kind == "k1":
        return -to_reference
    return to_reference**2 / 2 if kind == "k2" else torch.expm1(to_reference) - to_reference


def token_weights(
    mask: Bool[Tensor, "batch seq"], averaging: Averaging, max_length: int | None = None
) -> Float[Tensor, "batch seq"]:
    """Return the weight of each token in the loss; `mask` marks the sampled tokens of the whole batch.

    "sequence": mean over each sequence's tokens, then over sequences (GRPO). "token": mean over all tokens (DAPO).
    "constant": sum divided by sequences * `max_length`, so that the weight is independent of the length (Dr. GRPO).
    Raises `ValueError` for "constant" without `max_length`.
    """
    ones = mask.double()
    if averaging == "sequence":
        return ones / (ones.sum(1, keepdim=True).clamp(min=1) * len(mask))
    if averaging == "token":
        return ones / ones.sum().clamp(min=1)
    if max_length is None:
        raise ValueError("max_length=None: averaging='constant' needs the maximum length of an answer")
    return ones / (len(mask) * max_length)


def grpo_loss(
    logp: Float[Tensor, "batch seq"],
    old_logp: Float[Tensor, "batch seq"],
    ref_logp: Float[Tensor, "batch seq"] | None,
    advantages: Float[Tensor, "batch"],
    mask: Bool[Tensor, "batch seq"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.001,
    averaging: Averaging = "sequence",
    ratio: Ratio = "token",
    max_length: int | None = None,
    weights: Float[Tensor, "batch seq"] | None = None,
    unbiased_kl: bool = False,
    off_policy_threshold: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return the loss to minimise (R1 eq. 1 per token, in the form of DeepSeekMath eq. 3) and statistics.

    -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_weight * k3, averaged over tokens. rho is the importance
    ratio: a token's probability now over that at sampling; for `ratio` see `off_policy.importance_ratio`. `ref_logp`
    None omits the KL penalty. For a micro-batch, pass its rows of the whole batch's `token_weights` as `weights`; the
    losses of the micro-batches then add up to the batch's.
    V3.2 (FACTS.md section 10.2): with `unbiased_kl` the penalty is k3 times the token's ratio, which has a gradient
    too: value and gradient are then those of KL(policy || reference) for each token, whichever policy sampled it.
    `off_policy_threshold` drops the clipped terms of the sequences of `off_policy.off_policy_mask`.
    Statistics, sums over the tokens: "clipped", the tokens whose gradient is clipped to zero, "kl", the sum of k3, and
    with a threshold "masked", the tokens of dropped sequences.
    What stands outside the mask, infinities and NaN too, changes neither loss nor gradient; a ratio that would overflow
    has no gradient.
    """
    if weights is None:
        weights = token_weights(mask, averaging, max_length)
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    log_ratios = log_ratio(logp, old_logp)
    rho = importance_ratio(log_ratios, mask, ratio)
    advantage = advantages[:, None]
    clipped = rho.clamp(1 - clip_low, 1 + clip_high) * advantage
    terms = -torch.minimum(rho * advantage, clipped)
    stats = {"clipped": ((rho * advantage > clipped) & mask).sum().to(logp.dtype)}
    if off_policy_threshold is not None:
        dropped = ~off_policy_mask(log_ratios, advantages, mask, off_policy_threshold)[:, None]
        terms = terms.masked_fill(dropped, 0.0)
        stats["masked"] = (dropped & mask).sum().to(logp.dtype)
    if ref_logp is not None:
        kl = kl_estimate(logp, ref_logp.masked_fill(~mask, 0.0))
        stats["kl"] = kl.detach().sum()
        terms = terms + kl_weight * (log_ratios.exp() * kl if unbiased_kl else kl)
    return (terms.masked_fill(~mask, 0.0) * weights.to(logp.dtype)).sum(), stats
