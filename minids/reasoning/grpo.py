"""Group relative policy optimization: advantages without a critic, the clipped loss, the penalty for leaving home.

Notable choices: the loss is a sum of per-token terms times weights that a whole batch determines (`token_weights`), so
a batch may be cut into micro-batches; GRPO, Dr. GRPO, DAPO and GSPO are the same function with other settings
(`VARIANTS`); a mask, never a length, says which tokens were sampled.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Averaging = Literal["sequence", "token", "constant"]
Ratio = Literal["token", "sequence"]
Variant = Literal["grpo", "dr_grpo", "dapo", "gspo"]

VARIANTS: dict[Variant, dict[str, Any]] = {
    "grpo": dict(averaging="sequence", ratio="token", scale_by_std=True),
    "dr_grpo": dict(averaging="constant", ratio="token", scale_by_std=False, kl_weight=0.0),
    "dapo": dict(averaging="token", ratio="token", scale_by_std=True, clip_high=0.28, kl_weight=0.0,
                 dynamic_sampling=True),
    "gspo": dict(averaging="sequence", ratio="sequence", scale_by_std=True),
}  # fmt: skip
"""What each variant sets in a recipe (DeepSeekMath eq. 3; Dr. GRPO and DAPO: FACTS.md section 8.6)."""


def group_advantages(
    rewards: Float[Tensor, "groups size"], *, scale_by_std: bool = True, eps: float = 1e-4
) -> Float[Tensor, "groups size"]:
    """How much better each answer is than its group: (r - mean) / (std + eps), or r - mean (Dr. GRPO).

    The papers leave the standard deviation open; here it is the sample's, as in TRL (PITFALLS 24). A group whose
    rewards are all equal has advantage 0. Raises ValueError for groups of one, which have no standard deviation.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"group_size={rewards.shape[1]}: a group needs at least 2 answers to be compared")
    advantages = rewards - rewards.mean(1, keepdim=True)
    advantages = advantages.masked_fill(is_flat(rewards)[:, None], 0.0)  # the mean of equal numbers is rounded
    return advantages / (rewards.std(1, keepdim=True) + eps) if scale_by_std else advantages


def is_flat(rewards: Float[Tensor, "groups size"]) -> Bool[Tensor, "groups"]:
    """Which groups teach nothing, because all their rewards are equal."""
    return (rewards == rewards[:, :1]).all(1)


def kl_estimate(
    logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"], kind: Literal["k1", "k2", "k3"] = "k3"
) -> Float[Tensor, "*shape"]:
    """KL(policy || reference) estimated from a token that the policy drew: its mean is the KL (k2: nearly).

    k3 = r - log r - 1 with r = reference / policy, never negative (DeepSeekMath eq. 4). As a loss the three differ: the
    expected gradient of k1 is zero, of k2 the KL's own, of k3 that of KL(reference || policy) (PITFALLS 25).
    """
    log_ratio = ref_logp - logp
    if kind == "k1":
        return -log_ratio
    return log_ratio**2 / 2 if kind == "k2" else torch.expm1(log_ratio) - log_ratio


def token_weights(
    mask: Bool[Tensor, "batch seq"], averaging: Averaging, max_length: int | None = None
) -> Float[Tensor, "batch seq"]:
    """What each token's term counts in the loss; `mask` marks the sampled tokens of the whole batch.

    "sequence": the mean over each sequence's tokens, then over sequences (GRPO). "token": the mean over all tokens
    (DAPO). "constant": the sum divided by sequences * `max_length`, so that no length is favoured (Dr. GRPO).
    """
    ones = mask.double()
    if averaging == "sequence":
        return ones / (ones.sum(1, keepdim=True).clamp(min=1) * len(mask))
    if averaging == "token":
        return ones / ones.sum().clamp(min=1)
    if max_length is None:
        raise ValueError("max_length=None: averaging by a constant needs the longest answer allowed")
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
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The loss to minimise (R1 eq. 1 per token, as DeepSeekMath eq. 3 writes it) and statistics.

    -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_weight * k3, averaged over tokens. rho is the ratio of
    the probabilities of a token now and when it was sampled; with ratio="sequence" the geometric mean of these over the
    sequence (GSPO). `ref_logp` None leaves the KL out. For a micro-batch pass its rows of the whole batch's
    `token_weights` as `weights`; then the losses of the micro-batches add up to the batch's.
    Statistics, sums over the tokens: "clipped", those whose gradient the clip took away, and "kl".
    """
    if weights is None:
        weights = token_weights(mask, averaging, max_length)
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0)
    if ratio == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    rho = log_ratio.exp()
    advantage = advantages[:, None]
    clipped = rho.clamp(1 - clip_low, 1 + clip_high) * advantage
    terms = -torch.minimum(rho * advantage, clipped)
    stats = {"clipped": ((rho * advantage > clipped) & mask).sum().to(logp.dtype)}
    if ref_logp is not None:
        kl = kl_estimate(logp, ref_logp)
        terms = terms + kl_weight * kl
        stats["kl"] = kl.detach().masked_fill(~mask, 0.0).sum()
    return (terms.masked_fill(~mask, 0.0) * weights.to(logp.dtype)).sum(), stats
