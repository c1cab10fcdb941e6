"""Off-policy updates: importance ratios, V3.2's unbiased KL penalty and sequence mask, mini-batches of a rollout."""

import dataclasses
import math

import pytest
import torch
from small_reasoner import RECIPE, TASK, evens, small_model
from trl_loss import trl_loss

from minids.reasoning.grpo import VARIANTS, grpo_loss, kl_estimate
from minids.reasoning.off_policy import importance_ratio, log_ratio, off_policy_mask, ratio_statistics
from minids.reasoning.rollout import pad, token_logps
from minids.reasoning.trainer import RLRecipe, RLTrainer


def trainer(**changes):
    return RLTrainer(small_model(), TASK.tokenizer, TASK, evens, dataclasses.replace(RECIPE, **changes))


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def random_batch(rows=5, seq=6, spread=0.5):
    generator = torch.Generator().manual_seed(3)
    logp, old, ref = (torch.randn(rows, seq, generator=generator, dtype=torch.float64) * spread - 1 for _ in range(3))
    mask = torch.arange(seq) < torch.tensor([[6], [3], [5], [1], [4]])[:rows]
    advantages = torch.tensor([0.8, -0.6, -1.2, 0.0, -0.3], dtype=torch.float64)[:rows]
    return logp.requires_grad_(), old, ref, advantages, mask


# The unbiased KL penalty ----------------------------------------------------------------------------------------------


def six_outcomes():
    """Log-probabilities of a policy as a function of its parameters, of the policy that sampled, and of a reference."""
    generator = torch.Generator().manual_seed(0)
    theta, old, ref = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    return theta.requires_grad_(), old.log_softmax(0), ref.log_softmax(0)


def expected_penalty(penalty):
    """Value and gradient of the expected penalty, exactly: summed over the outcomes with the sampler's probability."""
    theta, old, ref = six_outcomes()
    value = (old.exp() * penalty(theta.log_softmax(0), old, ref)).sum()
    return value.detach(), torch.autograd.grad(value, theta)[0]


def penalty_of_the_loss(logp, old, ref, **options):
    """The penalty of each outcome as `grpo_loss` has it: a batch of answers of one token, whose advantages are 0."""
    each = []
    for i in range(6):
        one = [x[i].reshape(1, 1) for x in (logp, old, ref)]
        mask = torch.ones(1, 1, dtype=torch.bool)
        each.append(grpo_loss(*one, torch.zeros(1, dtype=torch.float64), mask, kl_weight=1.0, **options)[0])
    return torch.stack(each)


def exact_kl():
    theta, _, ref = six_outcomes()
    logp = theta.log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum()
    return kl.detach(), torch.autograd.grad(kl, theta)[0]


def test_the_unbiased_penalty_has_value_and_gradient_of_the_kl():
    """V3.2: with k3 times the ratio the expectation is that of the policy, although another one sampled."""
    kl, gradient = exact_kl()
    found = expected_penalty(lambda *logps: penalty_of_the_loss(*logps, unbiased_kl=True))
    torch.testing.assert_close(found, (kl, gradient), rtol=0, atol=1e-14)


def test_k3_alone_is_biased_off_policy():
    kl, gradient = exact_kl()
    value, biased = expected_penalty(lambda *logps: penalty_of_the_loss(*logps))
    assert (value - kl).abs() > 0.1 and (biased - gradient).norm() > 0.3 * gradient.norm()


def test_a_detached_ratio_has_the_value_but_not_the_gradient():
    """Planted: the commonest mistake, which no comparison of values finds."""
    kl, gradient = exact_kl()
    value, planted = expected_penalty(lambda p, old, ref: (p - old).exp().detach() * kl_estimate(p, ref))
    torch.testing.assert_close(value, kl, rtol=0, atol=1e-14)
    assert (planted - gradient).norm() > 0.2 * gradient.norm()


def test_the_unbiased_penalty_differs_on_policy_too():
    """With the ratio 1 its value is k3's; the gradient is the KL's, where k3's is that of KL(reference || policy)."""
    logp, _, ref, _, mask = random_batch()
    losses = [
        grpo_loss(logp, logp.detach(), ref, torch.zeros(5).double(), mask, kl_weight=1.0, unbiased_kl=unbiased)[0]
        for unbiased in (False, True)
    ]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in losses]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


# The sequence mask ----------------------------------------------------------------------------------------------------


def mask_by_hand(logp, old, advantages, mask, threshold):
    kept = []
    for row in range(len(mask)):
        at = mask[row].nonzero()[:, 0].tolist()
        ratios = [math.exp(logp[row, t].item() - old[row, t].item()) for t in at]
        geometric_mean = math.prod(ratios) ** (1 / len(ratios))
        kept.append(advantages[row].item() >= 0 or geometric_mean >= math.exp(-threshold))
    return kept


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 1.0])
def test_the_sequence_mask_is_a_threshold_on_the_geometric_mean(threshold):
    logp, old, _, advantages, mask = random_batch(spread=1.0)
    ratios = log_ratio(logp, old).masked_fill(~mask, 0.0)
    for sign in (1, -1):
        kept = off_policy_mask(ratios, sign * advantages, mask, threshold)
        assert kept.tolist() == mask_by_hand(logp, old, sign * advantages, mask, threshold)


def stale(mask_function=off_policy_mask):
    """Two answers that have become less likely, by 0.5 a token, one of each sign of the advantage; and a fresh one."""
    mask = torch.ones(3, 4, dtype=torch.bool)
    ratios = torch.tensor([[-0.5] * 4, [-0.5] * 4, [0.0] * 4])
    return mask_function(ratios, torch.tensor([1.0, -1.0, -1.0]), mask, 0.1).tolist()


def test_only_stale_answers_of_negative_advantage_are_dropped():
    assert stale() == [True, False, True]
    # planted: the other sign of the advantage, no look at the advantage, the other sign of the ratio, the sum
    mistakes = [
        lambda ratios, a, mask, d: off_policy_mask(ratios, -a, mask, d),
        lambda ratios, a, mask, d: -ratios.mean(1) <= d,
        lambda ratios, a, mask, d: off_policy_mask(-ratios, a, mask, d),
    ]
    assert all(stale(mistake) != [True, False, True] for mistake in mistakes)
    long = torch.full((1, 50), -0.01)  # the sum of log-ratios grows with the length, the mean does not
    assert off_policy_mask(long, torch.tensor([-1.0]), torch.ones(1, 50).bool(), 0.1).tolist() == [True]


def test_a_dropped_answer_keeps_its_kl_penalty_and_its_share_of_the_mean():
    logp, old, ref, advantages, mask = random_batch(spread=1.0)
    settings = dict(kl_weight=0.1, averaging="token")
    loss, stats = grpo_loss(logp, old, ref, advantages, mask, off_policy_threshold=0.1, **settings)
    kept = torch.tensor(mask_by_hand(logp, old, advantages, mask, 0.1))
    assert kept.any() and not kept.all() and stats["masked"] == mask[~kept].sum()
    expected, _ = grpo_loss(logp, old, ref, advantages * kept, mask, **settings)
    torch.testing.assert_close(loss, expected)


# TRL's --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", ["sequence", "token", "constant"])
@pytest.mark.parametrize("unbiased_kl", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.05, 0.4])
def test_the_stabilisers_are_trl_s(averaging, unbiased_kl, threshold):
    logp, old, ref, advantages, mask = random_batch(spread=1.0)
    settings = dict(averaging=averaging, ratio="token", kl_weight=0.2, max_length=9, unbiased_kl=unbiased_kl)
    theirs, _ = trl_loss(logp, old, ref, advantages, mask, off_policy_threshold=threshold, **settings)
    ours, _ = grpo_loss(logp, old, ref, advantages, mask, off_policy_threshold=threshold, **settings)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_extreme_ratios_of_the_unbiased_penalty_are_finite():
    values = torch.tensor([0.0, -1.0, -50.0, -120.0, -1e4, -math.inf])
    logp, old, ref = (x.reshape(-1, 6) for x in torch.meshgrid(values, values, values, indexing="ij"))
    logp = logp.clone().requires_grad_()
    loss, _ = grpo_loss(
        logp, old, ref, torch.ones(len(logp)), torch.ones_like(logp).bool(), kl_weight=0.04, unbiased_kl=True
    )
    assert loss.isfinite() and torch.autograd.grad(loss, logp)[0].isfinite().all()


# Ratios and their statistics ------------------------------------------------------------------------------------------


def test_ratio_statistics_by_hand():
    old = torch.tensor([[0.5, 0.4, 0.2], [0.5, 0.5, 0.9]], dtype=torch.float64)
    new = torch.tensor([[0.5, 0.6, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    ratios = (new / old).log().masked_fill(~mask, 0.0)
    found = ratio_statistics(ratios, mask, ratio="token", clip_low=0.2, clip_high=0.28)
    assert found["outside_clip"] == 3 and found["largest_ratio"].item() == pytest.approx(1.5)
    rho = [1.0, 1.5, 0.5, 0.4, 1.0]
    assert found["kl_old_new"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in rho))
    by_sequence = ratio_statistics(ratios, mask, ratio="sequence", clip_low=0.2, clip_high=0.28)
    assert by_sequence["outside_clip"] == 2  # (1 * 1.5 * 0.5)^(1/3) = 0.909, and (0.4 * 1)^(1/2) = 0.632
    product = importance_ratio(ratios, mask, "product")
    assert product[:, 0].tolist() == pytest.approx([0.75, 0.4])


def test_the_estimate_of_the_kl_between_old_and_new_is_unbiased():
    theta, old, _ = six_outcomes()
    ratios = log_ratio(theta.detach().log_softmax(0), old)
    expected = (old.exp() * (old - theta.detach().log_softmax(0))).sum()
    one = torch.ones(1, 1, dtype=torch.bool)
    each = [
        ratio_statistics(r.reshape(1, 1), one, ratio="token", clip_low=0.2, clip_high=0.2)["kl_old_new"] for r in ratios
    ]
    assert sum(p * kl for p, kl in zip(old.exp(), each, strict=True)).item() == pytest.approx(expected.item())


# Mini-batches: the second update is off-policy ------------------------------------------------------------------------


def off_policy_metrics(**changes):
    loop = trainer(learning_rate=1e-2, warmup_steps=0, **changes)
    return loop.train_step()


def test_with_one_update_every_ratio_is_one():
    metrics = off_policy_metrics()
    assert metrics["largest_ratio"] == pytest.approx(1, abs=1e-4) and metrics["kl_old_new"] < 1e-8
    assert metrics["clipped"] == 0 and metrics["outside_clip"] == 0


def assert_the_second_update_is_off_policy(changes):
    metrics = off_policy_metrics(**changes, clip_low=1e-3, clip_high=1e-3)
    assert metrics["largest_ratio"] > 1.05 and metrics["kl_old_new"] > 1e-5
    assert 0.01 < metrics["clipped"] < metrics["outside_clip"] <= 0.5  # the loss reads the same ratios; half are 1


@pytest.mark.parametrize("changes", [{"mini_batches": 2}, {"inner_epochs": 2}])
def test_the_second_update_on_a_batch_is_off_policy(changes, monkeypatch):
    assert_the_second_update_is_off_policy(changes)

    class Forgetful(RLTrainer):  # planted: old log-probabilities are computed when the update is made
        def update(self, groups, check):
            samples = [sample for group in groups for sample in group]
            with torch.no_grad():
                batch = pad(samples)
                logp = token_logps(self.model, batch.tokens)[0]
            now = [dataclasses.replace(s, logps=logp[i][batch.mask[i]].tolist()) for i, s in enumerate(samples)]
            size = len(groups[0])
            return super().update([now[i : i + size] for i in range(0, len(now), size)], check)

    monkeypatch.setitem(globals(), "RLTrainer", Forgetful)
    with pytest.raises(AssertionError):
        assert_the_second_update_is_off_policy(changes)


def test_mini_batches_are_whole_groups_with_an_update_each():
    made = trainer(mini_batches=2, inner_epochs=2)
    seen, plain = [], made.update
    made.update = lambda groups, check: seen.append((groups, check)) or plain(groups, check)
    made.train_step()
    first, second = made.groups
    assert [groups for groups, _ in seen] == [[first], [second], [first], [second]]
    assert [check for _, check in seen] == [True, False, False, False]

    again = trainer()
    groups, _ = again.collect()
    for part in [groups[:1], groups[1:]] * 2:
        again.update(part, check=False)
    assert torch.equal(weights_of(again.model), weights_of(made.model))


def test_the_check_of_probabilities_waits_for_an_update_that_has_a_gradient():

    def first_group_is_flat(problems, responses):
        scores = evens(problems, responses)
        return [scores[0]] * 4 + scores[4:]

    recipe = dataclasses.replace(RECIPE, mini_batches=2)
    made = RLTrainer(small_model(), TASK.tokenizer, TASK, first_group_is_flat, recipe)
    metrics = made.train_step()
    assert metrics["zero_advantage_groups"] == 0.5 and metrics["logp_gap"] < 1e-4 and metrics["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": "sequence"}, "^ratio='sequence': acts from the second update on a batch of answers; set mini_"),
        ({"off_policy_threshold": 0.1}, "^off_policy_threshold=0.1: acts from the second update"),
        ({"mini_batches": 5}, "^mini_batches=5: must divide prompts=16"),
        ({"unbiased_kl": True}, "^unbiased_kl=True: needs kl_weight above 0"),
        ({"top_p": 1.1}, "^top_p=1.1: must be above 0 and at most 1"),
        ({"mini_batches": 2, "off_policy_threshold": -0.1}, "^off_policy_threshold=-0.1: must be a finite number"),
    ],
)
def test_settings_that_cannot_act_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RLRecipe(**changes)


def test_only_gspo_is_refused_with_one_update():
    """The other variants differ from GRPO in what they average, or in their advantages, with one update too."""
    for name, settings in VARIANTS.items():
        if name == "gspo":
            with pytest.raises(ValueError, match="^ratio='sequence'"):
                RLRecipe(**settings)
            settings = settings | {"mini_batches": 4}
        assert RLRecipe(**settings).updates == (4 if name == "gspo" else 1)


def test_gspo_on_policy_would_be_grpo():
    """Why it is refused: with the ratio 1 its gradient is that of GRPO, so `--variant gspo` changed nothing."""
    logp, _, _, advantages, mask = random_batch()
    losses = [grpo_loss(logp, logp.detach(), None, advantages, mask, ratio=ratio)[0] for ratio in ("token", "sequence")]
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-15)
