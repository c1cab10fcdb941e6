import pytest
import torch
from training.helpers import nano

from minids.training.optimizer import Schedule, make_optimizers, set_learning_rate


def test_schedule_is_v3_in_fractions():
    schedule = Schedule(steps=1480, warmup_steps=10)
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


def test_learning_rate_reaches_every_group():
    optimizers = make_optimizers(nano(), "muon", 1e-3, 0.1)
    set_learning_rate(optimizers, 0.5)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.5}


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="optimizer='sgd': must be adamw or muon"):
        make_optimizers(nano(), "sgd", 1e-3, 0.1)
