"""Muon as V4 has it: singular values, stacks, the update by definition, runs that are resumed."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training.helpers import RECIPE, counting_data, nano

from minids.config import EngramConfig
from minids.training import muon
from minids.training.muon import FAST, V4_STEPS, Muon, orthogonalize
from minids.training.optimizer import make_optimizers
from minids.training.pretrain import Trainer, train


def with_singular_values(values, rows, columns, seed=0):
    """A float64 matrix of these singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(random, full_matrices=False)
    return left * values @ right, left, right


def polynomial(values, steps):
    """What the steps make of singular values: a s + b s^3 + c s^5."""
    for a, b, c in steps:
        values = a * values + b * values**3 + c * values**5
    return values


# The iteration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize("steps", [V4_STEPS, (FAST,) * 5])
def test_iteration_is_its_polynomial_of_the_singular_values(shape, steps):
    values = torch.linspace(0.01, 2.0, min(shape), dtype=torch.float64)
    matrix, left, right = with_singular_values(values, *shape)
    want = left * polynomial(values / values.norm(), steps) @ right
    torch.testing.assert_close(orthogonalize(matrix, steps), want, atol=1e-9, rtol=0)


def test_ten_steps_converge_and_five_do_not():
    """V4's eight and two against the usual five, for singular values from 1e-3 to 1 (FACTS.md section 10)."""
    values = torch.logspace(-3, 0, 20001, dtype=torch.float64)
    found = {n: polynomial(values, steps) for n, steps in ((5, (FAST,) * 5), (8, (FAST,) * 8), (10, V4_STEPS))}
    assert found[5].min() < 0.5 and found[5].max() > 1.19
    assert 0.65 < found[8].min() < 0.75 and 1.1 < found[8].max() < 1.2
    assert (found[10] - 1).abs().max() < 6e-4


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99), power=st.integers(-6, 6))
def test_singular_values_are_near_one_whatever_the_size(rows, columns, seed, power):
    torch.manual_seed(seed)
    values = 0.02 + torch.rand(min(rows, columns), dtype=torch.float64)
    matrix, left, right = with_singular_values(values, rows, columns, seed)
    out = orthogonalize(matrix * 10.0**power)
    assert (torch.linalg.svdvals(out) - 1).abs().max() < 1e-3
    torch.testing.assert_close(out, left @ right, atol=2e-3, rtol=0)


def test_stack_is_orthogonalised_matrix_by_matrix():
    stack = torch.randn(2, 3, 5, 8) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    got = orthogonalize(stack)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], orthogonalize(stack[i, j]), atol=1e-6, rtol=0)
    assert orthogonalize(torch.zeros(2, 3, 4)).abs().max() == 0  # an expert without tokens stays where it is


# The optimizer -----------------------------------------------------------------------------------------------------


def after(optimizer_of, start, grads):
    p = torch.nn.Parameter(start.clone())
    optimizer = optimizer_of([p])
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (3, 4, 7)])
def test_update_is_v4s_algorithm(shape):
    start, grads = torch.randn(shape).double(), [torch.randn(shape).double() for _ in range(4)]
    weight, momentum = start.clone(), torch.zeros_like(start)
    for g in grads:
        momentum = 0.95 * momentum + g
        left, s, right = torch.linalg.svd(0.95 * momentum + g, full_matrices=False)
        s = polynomial(s / s.norm(dim=-1, keepdim=True), V4_STEPS)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.18 * math.sqrt(7) * (left * s[..., None, :]) @ right
    got = after(lambda p: Muon(p, lr=0.02, weight_decay=0.1), start, grads)
    torch.testing.assert_close(got, weight, atol=1e-9, rtol=0)
    rms = (got - after(lambda p: Muon(p, lr=0.0, weight_decay=0.1), start, grads)).square().mean().sqrt()
    assert rms < 4 * 0.02 * 0.18 * 1.5


def test_five_steps_and_its_factor_are_torchs_muon():
    """torch's computes in bfloat16 and takes no stacks; otherwise only the steps and the factor differ."""
    start, grads = torch.zeros(12, 8), [torch.randn(12, 8) for _ in range(3)]
    torchs = after(lambda p: torch.optim.Muon(p, 1.0, 0.0, adjust_lr_fn="match_rms_adamw"), start, grads)
    ours = after(lambda p: Muon(p, 1.0, 0.0, steps=(FAST,) * 5, update_rms=0.2), start, grads)
    torch.testing.assert_close(ours, torchs, atol=0.03, rtol=0)
    assert (after(lambda p: Muon(p, 1.0, 0.0, update_rms=0.2), start, grads) - torchs).abs().max() > 0.1
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.ones(3))], 0.1, 0.1)


def test_muon_of_v4_takes_experts_but_neither_tables_nor_head():
    model = nano(hc_mult=2, engram=EngramConfig(layers=(0,), rows=20, heads=2, dim=8))
    adamw, own = make_optimizers(model, "muon_v4", 1e-3, 0.1)
    taken, names = set(own.param_groups[0]["params"]), {p: name for name, p in model.named_parameters()}
    experts = model.layers[1].ffn.experts
    assert {experts.gate_proj, experts.up_proj, experts.down_proj, model.layers[0].ffn_connection.proj} <= taken
    left = {names[p] for group in adamw.param_groups for p in group["params"] if p.ndim > 1}
    assert left == {"embedding.weight", "head.weight", "engram.layers.0.table.weight"}
    assert not {p for p in taken if p.ndim < 2}
    *_, tables = adamw.param_groups
    assert [names[p] for p in tables["params"]] == ["engram.layers.0.table.weight"]
    assert tables["weight_decay"] == 0 and tables["lr"] == pytest.approx(5e-3)
    owned = [p for optimizer in (adamw, own) for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) and set(owned) == {p for p in model.parameters() if p.requires_grad}


# In training -------------------------------------------------------------------------------------------------------

EVERYTHING = dict(hc_mult=3, engram=EngramConfig(layers=(1,), rows=50, heads=2, dim=16))


@pytest.mark.parametrize("changes", [{}, EVERYTHING])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, changes):
    recipe = dataclasses.replace(RECIPE, optimizer="muon_v4", qk_clip=1.0, moments="bf16")

    def model():
        torch.manual_seed(3)
        return nano(**changes)

    whole, halves = model(), model()
    metrics = train(whole, counting_data(), recipe, progress=False)
    trainer = Trainer(halves, counting_data(), recipe)
    trainer.should_stop = lambda requested: trainer.step == 7
    trainer.run(directory=tmp_path, progress=False)
    resumed = model()
    again = train(resumed, counting_data(), recipe, directory=tmp_path, progress=False)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert metrics[-1]["loss"] == again[-1]["loss"] < metrics[0]["loss"]
    assert all("max_attention_logit" in m for m in metrics)


def test_table_of_the_memory_learns_five_times_as_fast():
    model = nano(engram=EngramConfig(layers=(0,), rows=20, heads=2, dim=8))
    trainer = Trainer(model, counting_data(), RECIPE)
    trainer.train_step()
    rates = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
    assert sorted(rates)[1] == pytest.approx(5 * sorted(rates)[0])
    assert model.engram.token_numbers.tolist() != list(range(272))  # "A" and "a" have one number
    assert model.engram.token_numbers[65] == model.engram.token_numbers[97]


# Planted mistakes: each makes a check above fail ---------------------------------------------------------------------


def plant_five_steps(mp):
    mp.setattr(muon, "orthogonalize", lambda matrices, steps: orthogonalize(matrices, (FAST,) * 5))


def plant_norm_of_the_whole_stack(mp):
    original = orthogonalize

    def whole(matrices, steps=V4_STEPS, eps=1e-7):
        x = matrices / matrices.norm()
        for a, b, c in steps:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x if matrices.ndim > 2 else original(matrices, steps, eps)

    mp.setattr(muon, "orthogonalize", whole)


def plant_momentum_without_nesterov(mp):
    def update(self, p, grad, state, group):
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(0.95).add_(grad)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(orthogonalize(buffer), alpha=-group["lr"] * 0.18 * math.sqrt(max(p.shape[-2:])))

    mp.setattr(Muon, "update", update)


def plant_scale_of_the_first_dimension(mp):
    def update(self, p, grad, state, group):
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(0.95).add_(grad)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(orthogonalize(grad + 0.95 * buffer), alpha=-group["lr"] * 0.18 * math.sqrt(p.shape[0]))

    mp.setattr(Muon, "update", update)


def plant_decay_after_the_step(mp):
    original = Muon.update

    def update(self, p, grad, state, group):
        original(self, p, grad, state, group | {"weight_decay": 0.0})
        p.mul_(1 - group["lr"] * group["weight_decay"])

    mp.setattr(Muon, "update", update)


MISTAKES = {
    "five steps": (plant_five_steps, (7, 4)),
    "norm of the whole stack": (plant_norm_of_the_whole_stack, (3, 4, 7)),
    "no Nesterov": (plant_momentum_without_nesterov, (7, 4)),
    "scale of the first dimension": (plant_scale_of_the_first_dimension, (4, 7)),
    "decay after the step": (plant_decay_after_the_step, (7, 4)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_caught(name, monkeypatch):
    plant, shape = MISTAKES[name]
    torch.manual_seed(0)
    test_update_is_v4s_algorithm(shape)
    plant(monkeypatch)
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        test_update_is_v4s_algorithm(shape)
