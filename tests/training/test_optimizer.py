import pytest
import torch
from training.helpers import nano

from minids.training.lr_schedule import LRSchedule
from minids.training.optimizer import make_optimizers


def test_schedule_is_v3_in_fractions():
    schedule = LRSchedule(steps=1480, warmup_steps=10)
    factor = schedule.learning_rate_factor
    assert factor(0) == pytest.approx(0.1) and factor(9) == 1 and factor(999) == 1
    assert factor(1000 + 215) == pytest.approx(0.55, abs=1e-3)  # half-way along the cosine
    assert factor(1430) == pytest.approx(0.1) and factor(1479) == pytest.approx(0.1)
    assert [schedule.is_falling(s) for s in (999, 1000)] == [False, True]
    assert [schedule.has_fallen(s) for s in (1429, 1430)] == [False, True]
    falling = [factor(s) for s in range(1000, 1430)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_trained_parameter_has_one_optimizer_and_no_bias_has_any(kind):
    model = nano()
    optimizers = make_optimizers(model, kind, 1e-3, 0.1)
    owned = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) == {p for p in model.parameters() if p.requires_grad}
    assert not {router.bias for router in model.routers()} & set(owned)


def test_norms_are_not_decayed_and_matrices_are():
    model = nano()
    (adamw,) = make_optimizers(model, "adamw", 1e-3, 0.1)
    for group in adamw.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
        assert group["betas"] == (0.9, 0.95)


def test_muon_takes_the_plain_matrices_of_the_layers():
    model = nano()
    adamw, muon = make_optimizers(model, "muon", 1e-3, 0.1)
    assert isinstance(muon, torch.optim.Muon)
    matrices = set(muon.param_groups[0]["params"])
    assert model.layers[0].ffn.up_proj.weight in matrices and model.layers[1].attention.o_proj.weight in matrices
    assert model.embedding.weight not in matrices and model.head.weight not in matrices
    assert model.layers[1].ffn.experts.up_proj not in matrices


def adamw_by_definition(weight, grads, lr, decay, rounded, betas=(0.9, 0.95), eps=1e-8):
    """Float64 throughout, but for the rounding of the moments after every step."""
    weight, m, v = weight.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for t, g in enumerate(grads, start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g.double(), betas[1] * v + (1 - betas[1]) * g.double() ** 2
        update = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        weight = (1 - lr * decay) * weight - lr * update
        if rounded:
            m, v = m.bfloat16().double(), v.bfloat16().double()
    return weight


def after_steps(weight, grads, **options):
    """The head after AdamW's steps as `make_optimizers` builds it, and its state; no other parameter has a gradient."""
    model = nano()
    head = model.head.weight
    head.data.copy_(weight)
    (optimizer,) = make_optimizers(model, "adamw", 0.01, 0.1, **options)
    for g in grads:
        head.grad = g.clone()
        optimizer.step()
    return head.detach(), optimizer.state[head]


def test_bf16_moments_are_adamw_with_rounded_memory():
    weight = torch.randn_like(nano().head.weight)
    grads = [torch.randn_like(weight) * 10.0**-i for i in range(6)]
    got, state = after_steps(weight, grads, moments="bf16")
    torch.testing.assert_close(got, adamw_by_definition(weight, grads, 0.01, 0.1, rounded=True).float())
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    exact = adamw_by_definition(weight, grads, 0.01, 0.1, rounded=False).float()
    assert not torch.equal(got, exact)
    torch.testing.assert_close(after_steps(weight, grads)[0], exact)
