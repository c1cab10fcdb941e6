"""The balance losses as written in the papers, the bias update, and what measures imbalance."""

import itertools

import plain_model as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import NANO, build, random_stream
from routers import V2, router_of

from minids.model.moe import (
    Routing,
    auxiliary_balance_losses,
    balance_loss,
    max_violation,
    sequence_balance_loss,
    update_balance_bias,
)


def routing_of(scores, chosen):
    return Routing(chosen, torch.ones_like(chosen, dtype=scores.dtype), scores)


def balanced(groups=4, size=2, k=2, kept=2):
    """Every expert chosen and scored equally often, every device reached equally often: tokens rotate around."""
    experts, rows = groups * size, []
    for start in range(groups):
        devices = [(start + j) % groups for j in range(kept)]
        for offset in range(size):
            rows.append([devices[j % kept] * size + (offset + j // kept) % size for j in range(k)])
    chosen = torch.tensor([rows])
    scores = torch.full((1, len(rows), experts), 0.1, dtype=torch.float64).scatter(-1, chosen, 0.4)
    return routing_of(scores / scores.sum(-1, keepdim=True), chosen)


def test_balance_losses_are_1_at_perfect_balance():
    routing = balanced()
    assert routing.tokens_per_expert.tolist() == [2] * 8
    torch.testing.assert_close(sequence_balance_loss(routing.scores, 2).item(), 1.0)
    torch.testing.assert_close(auxiliary_balance_losses(routing, 4, 2), torch.ones(3, dtype=torch.float64))
    # Sigmoids do not sum to 1; the loss normalises them, so their size does not matter.
    torch.testing.assert_close(sequence_balance_loss(3 * routing.scores, 2).item(), 1.0)


def test_sequence_loss_of_two_tokens_by_hand():
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.8, 0.8, 0.4]]], dtype=torch.float64)
    # k = 2: experts 0 and 1 are chosen twice, f = 3/(2*2) * (2, 2, 0); P = mean of (.6, .3, .1) and (.4, .4, .2).
    assert sequence_balance_loss(scores, 2).item() == pytest.approx(1.5 * 0.5 + 1.5 * 0.35)


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 3), seq=st.integers(1, 6), k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_sequence_loss_is_the_mean_over_sequences_of_the_papers(batch, seq, k, seed):
    scores = random_stream(batch, seq, 6, seed=seed).sigmoid()
    want = [plain.sequence_balance_loss(rows, k) for rows in scores.tolist()]
    assert sequence_balance_loss(scores, k).item() == pytest.approx(sum(want) / batch)


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 3), seq=st.integers(1, 6), seed=st.integers(0, 1000), which=st.sampled_from([0, 1, 2]))
def test_v2_losses_are_those_of_the_paper(batch, seq, seed, which):
    groups, kept, k = [(4, 2, 3), (2, 1, 2), (1, 1, 4)][which]
    config = V2.replace(n_group=groups, topk_group=kept, num_experts_per_tok=k)
    router = router_of(config)
    routing = router(random_stream(batch, seq, 64, seed=seed))
    want = torch.tensor([
        plain.v2_balance_losses(scores, [set(row) for row in chosen], groups, kept)
        for scores, chosen in zip(routing.scores.tolist(), routing.experts.tolist(), strict=True)
    ], dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(auxiliary_balance_losses(routing, groups, kept), want.mean(0))


def test_worst_balance_counts_the_experts():
    """All on k experts of one group with all affinity there: the losses reach N/k, groups and groups / kept."""
    scores = torch.zeros(1, 5, 8, dtype=torch.float64)
    scores[..., :2] = 0.5
    routing = routing_of(scores, torch.tensor([[[0, 1]] * 5]))
    assert sequence_balance_loss(scores, 2).item() == pytest.approx(4.0)
    torch.testing.assert_close(auxiliary_balance_losses(routing, 4, 2).tolist(), [4.0, 4.0, 2.0])


def test_losses_push_affinity_away_from_the_busy_experts():
    scores = torch.tensor([[[0.9, 0.5, 0.2, 0.1]] * 3], dtype=torch.float64, requires_grad=True)
    sequence_balance_loss(scores, 1).backward()
    assert (scores.grad[..., 0] > 0).all() and (scores.grad[..., 1:] < 0).all()


def test_balance_loss_weighs_each_loss_by_its_alpha():
    routing = build(V2).layers[1].ffn.router(random_stream(2, 5, 64))
    none = V2.replace(aux_loss_alpha=0.0)
    assert balance_loss(routing, none).item() == 0
    expert, device, communication = auxiliary_balance_losses(routing, 4, 2).tolist()
    sequence = sequence_balance_loss(routing.scores, 2).item()
    alphas = dict(expert_balance_alpha=0.3, device_balance_alpha=0.05, communication_balance_alpha=0.02)
    got = balance_loss(routing, none.replace(aux_loss_alpha=0.7, **alphas)).item()
    assert got == pytest.approx(0.7 * sequence + 0.3 * expert + 0.05 * device + 0.02 * communication)
    for name, value in zip(alphas, (expert, device, communication), strict=True):
        assert balance_loss(routing, none.replace(**{name: 0.5})).item() == pytest.approx(0.5 * value)
    assert balance_loss(routing, NANO).item() == pytest.approx(1e-4 * sequence)  # V3's default


def test_bias_goes_down_where_busy_up_where_idle_and_stays_at_the_mean():
    bias = torch.tensor([0.5, 0.0, 0.0, -0.25])
    update_balance_bias(bias, torch.tensor([4, 0, 2, 2]), 0.25)
    assert bias.tolist() == [0.25, 0.25, 0.0, -0.25]
    update_balance_bias(bias, torch.tensor([1, 1, 1, 2]), 0.0)
    assert bias.tolist() == [0.25, 0.25, 0.0, -0.25]


def test_bias_update_brings_a_skewed_router_to_balance():
    """What the bias is for: one expert that everybody wants loses its crowd, without any loss."""
    config = NANO.replace(n_group=1, topk_group=1)
    router, x = router_of(config, torch.float32, bias_size=0.0), random_stream(4, 64, 64, dtype=torch.float32)
    router.weight.data[0] = 0.0
    x[..., 0] += 2.0
    router.weight.data[0, 0] = 2.0
    before = max_violation(router(x).tokens_per_expert).item()
    for _ in itertools.repeat(None, 200):
        update_balance_bias(router.bias, router(x).tokens_per_expert, 0.01)
    assert before > 2 and max_violation(router(x).tokens_per_expert).item() < 0.3


def test_max_violation_is_the_excess_of_the_busiest_over_the_mean():
    assert max_violation(torch.tensor([3, 3, 3])).item() == 0
    assert max_violation(torch.tensor([[8, 0, 2, 2], [1, 2, 3, 2]])).tolist() == pytest.approx([8 / 3 - 1, 0.5])
