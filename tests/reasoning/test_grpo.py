import math

import pytest
import torch
from trl_loss import trl_loss

from minids.reasoning.grpo import VARIANTS, group_advantages, grpo_loss, is_flat, kl_estimate, token_weights

LENGTHS = (3, 5, 1, 4)
FIRST = (2, 0, 1, 1)  # where each row's sampled tokens begin


@pytest.fixture
def batch():
    """Ratios on both sides of both clips for advantages of both signs, and rubbish where nothing was sampled."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, 7)
    logp, old, ref = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4 - 1 for _ in range(3))
    position = torch.arange(7)
    mask = torch.stack([(position >= f) & (position < f + n) for f, n in zip(FIRST, LENGTHS, strict=True)])
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.5], dtype=torch.float64)
    return logp.requires_grad_(), old, ref, advantages, mask


def by_hand(batch, *, averaging, ratio, clip_low=0.2, clip_high=0.2, kl_weight=0.0, max_length=None):
    """The formulas, a token at a time: DeepSeekMath eq. 3 and 4, R1 eq. 1, Dr. GRPO, DAPO, GSPO."""
    logp, old, ref, advantages, mask = batch
    total_tokens, loss = sum(LENGTHS), 0.0
    for i, n in enumerate(LENGTHS):
        tokens = range(FIRST[i], FIRST[i] + n)
        mean_log_ratio = sum(logp[i, t] - old[i, t] for t in tokens) / n
        for t in tokens:
            log_rho = {"token": logp[i, t] - old[i, t], "sequence": mean_log_ratio, "product": n * mean_log_ratio}
            rho = torch.exp(log_rho[ratio])
            a = advantages[i].item()
            if a > 0:
                objective = a * min(rho, torch.tensor(1 + clip_high, dtype=torch.float64))
            else:
                objective = a * max(rho, torch.tensor(1 - clip_low, dtype=torch.float64))
            r = torch.exp(ref[i, t] - logp[i, t])
            term = -(objective - kl_weight * (r - torch.log(r) - 1))
            divisor = {
                "sequence": n * len(LENGTHS),
                "token": total_tokens,
                "constant": len(LENGTHS) * (max_length or 0),
            }[averaging]
            loss = loss + term / divisor
    return loss


SETTINGS = {
    "grpo": dict(averaging="sequence", ratio="token", kl_weight=0.04),
    "r1": dict(averaging="sequence", ratio="product", clip_low=0.5, clip_high=0.5),
    "dr_grpo": dict(averaging="constant", ratio="token", max_length=9),
    "dapo": dict(averaging="token", ratio="token", clip_high=0.28),
    "gspo": dict(averaging="sequence", ratio="sequence", clip_low=0.03, clip_high=0.04),
}


@pytest.mark.parametrize("variant", SETTINGS)
def test_every_variant_is_its_formula(batch, variant):
    settings = {"kl_weight": 0.0} | SETTINGS[variant]
    logp, old, ref, advantages, mask = batch
    loss, _ = grpo_loss(logp, old, ref, advantages, mask, **settings)
    expected = by_hand(batch, **settings)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logp)
    (expected_gradient,) = torch.autograd.grad(expected, logp)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


def test_the_named_variants_are_those_of_the_formulas():
    """What VARIANTS sets is what the formulas above say; clips and KL weight of GRPO are left to the recipe."""
    for name, settings in SETTINGS.items():
        assert all(VARIANTS[name][key] == settings[key] for key in ("averaging", "ratio"))
    assert set(VARIANTS) == set(SETTINGS)
    assert [name for name in VARIANTS if not VARIANTS[name]["scale_by_std"]] == ["dr_grpo"]
    published = {  # clip_low, clip_high, kl_weight
        "grpo": (None, None, None), "r1": (10, 10, 0.001), "dr_grpo": (None, None, 0), "dapo": (None, 0.28, 0),
        "gspo": (3e-4, 4e-4, 0),
    }  # fmt: skip
    keys = ("clip_low", "clip_high", "kl_weight")
    assert {name: tuple(map(VARIANTS[name].get, keys)) for name in VARIANTS} == published


def test_r1_s_equation_has_one_ratio_per_answer(batch):
    """R1 eq. 1: the mean over answers of min(rho A, clip(rho) A), where rho compares probabilities of whole answers."""
    logp, old, _, advantages, mask = batch
    rho = (((logp - old) * mask).sum(1)).exp()
    objective = torch.minimum(rho * advantages, rho.clamp(1 - 10.0, 1 + 10.0) * advantages).mean()
    settings = {key: VARIANTS["r1"][key] for key in ("averaging", "ratio", "clip_low", "clip_high")}
    loss, _ = grpo_loss(logp, old, None, advantages, mask, **settings)
    torch.testing.assert_close(loss, -objective, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(value, logp)[0] for value in (loss, -objective)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_the_clip_holds_one_side_for_each_sign():
    """PITFALLS k: a good token may not grow likelier than 1 + high, a bad one not unlikelier than 1 - low."""
    rho = torch.tensor([0.5, 0.9, 1.1, 1.5], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    for advantage, moved in ((1.0, [True, True, True, False]), (-1.0, [False, True, True, True])):
        logp = rho.log()[None].requires_grad_()
        loss, stats = grpo_loss(
            logp, torch.zeros_like(logp), None, torch.tensor([advantage], dtype=torch.float64), mask, kl_weight=0.0
        )
        loss.backward()
        assert (logp.grad[0] != 0).tolist() == moved
        assert (logp.grad[0].sign() * -advantage >= 0).all()
        assert stats["clipped"] == 1


def test_on_the_first_update_the_loss_is_nothing_and_the_gradient_is_not(batch):
    """Advantages of a group add up to 0, so with ratio 1 the mean over sequences does too (PITFALLS 24)."""
    logp, _, _, _, mask = batch
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64))[0]
    loss, stats = grpo_loss(logp, logp.detach(), None, advantages, mask, kl_weight=0.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and stats["clipped"] == 0
    weights = token_weights(mask, "sequence")
    torch.testing.assert_close(logp.grad, -advantages[:, None] * weights)


@pytest.mark.parametrize("averaging", ["sequence", "token", "constant"])
def test_micro_batches_add_up_to_the_batch(batch, averaging):
    logp, old, ref, advantages, mask = batch
    options = dict(averaging=averaging, max_length=9, kl_weight=0.1)
    whole, stats = grpo_loss(logp, old, ref, advantages, mask, **options)
    weights = token_weights(mask, averaging, 9)
    parts = [
        grpo_loss(logp[i], old[i], ref[i], advantages[i], mask[i], kl_weight=0.1, weights=weights[i])
        for i in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name in stats:
        torch.testing.assert_close(sum(part[name] for _, part in parts), stats[name])


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [1.1, 0.1, 1.0, 0.0]], dtype=torch.float64)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)  # the sample's: divided by 3
    scaled = group_advantages(rewards)
    assert scaled[0].tolist() == pytest.approx([0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3, abs=1e-12)
    assert group_advantages(rewards, scale_by_std=False)[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert (scaled[1] == 0).all() and is_flat(rewards).tolist() == [False, True, False]
    assert scaled.sum(1).abs().max() < 1e-12
    # 0.1 has no exact form: the mean of 16 of them is not 0.1, and a division by eps would blow the difference up
    assert (group_advantages(torch.full((1, 16), 0.1)) == 0).all()
    with pytest.raises(ValueError, match="group_size=1: must be at least 2"):
        group_advantages(torch.ones(3, 1))


def test_gradients_of_the_estimators_on_six_outcomes():
    """PITFALLS 25 and l: the expected gradients, exactly, summed over all outcomes."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)

    def gradient(value):
        return torch.autograd.grad(value, theta)[0]

    logp = theta.log_softmax(0)
    p = logp.detach().exp()
    reverse = gradient((logp.exp() * (logp - ref)).sum())
    forward = gradient((ref.exp() * (ref - theta.log_softmax(0))).sum())
    k1, k2, k3 = (gradient((p * kl_estimate(theta.log_softmax(0), ref, kind)).sum()) for kind in ("k1", "k2", "k3"))
    torch.testing.assert_close(k1, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(k2, reverse, rtol=0, atol=1e-14)
    torch.testing.assert_close(k3, forward, rtol=0, atol=1e-14)
    assert (reverse - forward).norm() > 0.1  # they do differ
    # as values: k1 and k3 are unbiased, and k3 is never negative
    kl = (p * (logp.detach() - ref)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(logp.detach(), ref, kind)).sum(), kl)
    assert (kl_estimate(logp.detach(), ref) >= 0).all() and (kl_estimate(logp.detach(), ref, "k1") < 0).any()


def test_averaging_by_a_constant_needs_the_constant():
    with pytest.raises(ValueError, match="max_length=None"):
        token_weights(torch.ones(2, 3, dtype=torch.bool), "constant")


@pytest.mark.parametrize("variant", [name for name in SETTINGS if name != "r1"])  # TRL has no product of ratios
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_every_variant_is_trl_s_loss(batch, variant, kl_weight):
    settings = {"clip_low": 0.2, "clip_high": 0.2, "max_length": 9} | SETTINGS[variant] | {"kl_weight": kl_weight}
    logp, old, ref, advantages, mask = batch
    theirs, metrics = trl_loss(*batch, **settings)
    ours, stats = grpo_loss(logp, old, ref, advantages, mask, **settings)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    if settings["ratio"] == "token":
        (clipped,) = metrics["clip_ratio/region_mean"]
        assert stats["clipped"].item() / mask.sum().item() == pytest.approx(clipped)


# Where masks and extreme ratios meet infinity -------------------------------------------------------------------------

SETTINGS_AND_KL = [(name, kl_weight) for name in SETTINGS for kl_weight in (0.0, 0.04)]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()


def loss_and_gradient(logp, old, ref, advantages, mask, **settings):
    logp = logp.clone().requires_grad_()
    loss, stats = grpo_loss(logp, old, ref, advantages, mask, **settings)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, stats


@pytest.mark.parametrize("place", ["logp", "old_logp", "ref_logp"])
@pytest.mark.parametrize("value", [-200.0, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("variant", SETTINGS)
def test_what_stands_outside_the_mask_does_not_matter(variant, value, place):
    advantages = torch.tensor([1.0, -1.0, 2.0])
    inputs = dict(logp=torch.full((3, 4), -1.0), old_logp=torch.full((3, 4), -1.3), ref_logp=torch.full((3, 4), -1.1))
    settings = SETTINGS[variant] | {"kl_weight": 0.04}
    loss, gradient, stats = loss_and_gradient(*inputs.values(), advantages, MASK, **settings)
    inputs[place] = inputs[place].masked_fill(~MASK, value)
    spoilt, spoilt_gradient, spoilt_stats = loss_and_gradient(*inputs.values(), advantages, MASK, **settings)
    assert spoilt == loss and torch.equal(spoilt_gradient, gradient) and spoilt_stats == stats
    assert (gradient[~MASK] == 0).all() and (gradient[MASK] != 0).all()


def test_a_ratio_that_overflows_is_clipped_with_gradient_zero():
    for old, wanted in ((-120.0, [0.0, -0.5]), (-math.inf, [0.0, -0.5])):
        loss, gradient, stats = loss_and_gradient(
            torch.tensor([[0.0, -1.0]]), torch.tensor([[old, -1.0]]), None, torch.ones(1), torch.ones(1, 2).bool()
        )
        assert loss.item() == pytest.approx(-1.1) and gradient.tolist() == [wanted] and stats["clipped"] == 1


@pytest.mark.parametrize("variant, kl_weight", SETTINGS_AND_KL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_never_give_nan(variant, kl_weight, dtype):
    """Every combination of log-probabilities, impossible ones among them, with advantages of each sign."""
    values = torch.tensor([0.0, -1.0, -50.0, -120.0, -1e4, -math.inf], dtype=dtype)
    logp, old, ref = (x.reshape(-1, 6) for x in torch.meshgrid(values, values, values, indexing="ij"))
    mask = torch.ones_like(logp).bool()
    for sign in (-2.0, 0.0, 2.0):
        advantages = torch.full((len(logp),), sign, dtype=dtype)
        settings = SETTINGS[variant] | {"kl_weight": kl_weight}
        loss, gradient, stats = loss_and_gradient(logp, old, ref, advantages, mask, **settings)
        assert loss.isfinite() and gradient.isfinite().all() and all(stat.isfinite() for stat in stats.values())


def test_a_model_that_computes_nan_is_not_hidden():
    logp = torch.tensor([[math.nan, -1.0]])
    loss, gradient, _ = loss_and_gradient(logp, logp, None, torch.ones(1), torch.ones(1, 2).bool())
    assert loss.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimators_of_impossible_tokens_are_finite(kind):
    logp = torch.tensor([-1.0, -math.inf, -math.inf, -1e3], requires_grad=True)
    kl = kl_estimate(logp, torch.tensor([-math.inf, -1.0, -math.inf, 0.0]), kind)
    kl.sum().backward()
    assert kl.isfinite().all() and logp.grad.isfinite().all() and kl[2] == 0


def test_advantages_of_large_rewards_are_those_of_small_ones():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 3.0]])
    torch.testing.assert_close(group_advantages(rewards * 1e38, eps=0), group_advantages(rewards, eps=0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_advantages_of_rewards_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=f"^rewards hold {value}: every reward must be a finite number$"):
        group_advantages(torch.tensor([[0.0, 1.0], [value, 1.0]]))
