"""The router token by token, the experts as a plain loop, the mixture against a loop over tokens."""

from collections import Counter

import plain_model as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_model import NANO, build, random_stream
from routers import V2, router_of

from minids.model.moe import (
    Experts,
    MoE,
    Router,
    grouped_matmul,
)

ROUTINGS = {
    "V3": NANO,
    "V3, no groups": NANO.replace(n_group=1, topk_group=1),
    "V3, all groups kept": NANO.replace(topk_group=4),
    "V3, 12 of 16 experts": NANO.replace(n_routed_experts=16, num_experts_per_tok=6, topk_group=3),
    "V3, not normalised": NANO.replace(norm_topk_prob=False),
    "V3, softmax": NANO.replace(scoring_func="softmax"),
    "V2": V2,
    "V2, normalised": V2.replace(norm_topk_prob=True),
    "V2-Lite": V2.replace(topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0),
    "V2, sigmoid": V2.replace(scoring_func="sigmoid"),
    "one expert": NANO.replace(n_routed_experts=1, num_experts_per_tok=1, n_group=1, topk_group=1),
}


def per_expert(routing, experts):
    """Weights [tokens, experts], 0 where an expert is not chosen: free of the order within the top k."""
    dense = torch.zeros(*routing.experts.shape[:2], experts, dtype=routing.weights.dtype)
    return dense.scatter(-1, routing.experts, routing.weights).flatten(0, 1)


# The router --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_router_equals_the_token_by_token_reference(name, dtype, tolerance):
    config = ROUTINGS[name]
    router, x = router_of(config, dtype), random_stream(3, 9, 64, dtype=dtype)
    routing = router(x)
    w = {key: value.double() for key, value in router.state_dict().items()}
    want = torch.zeros(27, config.n_routed_experts, dtype=torch.float64)
    for t, token in enumerate(x.flatten(0, 1).double()):
        for expert, weight in plain.route(w, config, token).items():
            want[t, expert] = weight
    got = per_expert(routing, config.n_routed_experts).double()
    torch.testing.assert_close(got, want, atol=tolerance * config.routed_scaling_factor, rtol=0)
    scores = [plain.affinities(w, config, token) for token in x.flatten(0, 1).double()]
    torch.testing.assert_close(
        routing.scores.flatten(0, 1).double(), torch.tensor(scores, dtype=torch.float64), atol=tolerance, rtol=0
    )


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_choice_equals_the_reference_for_any_groups_and_biases(data):
    groups = data.draw(st.sampled_from([1, 2, 4]), "groups")
    size = data.draw(st.integers(2, 4), "experts per group")
    kept = data.draw(st.integers(1, groups), "groups kept")
    k = data.draw(st.integers(1, kept * size), "k")
    method = data.draw(st.sampled_from(["noaux_tc", "group_limited_greedy"]), "method")
    config = NANO.replace(
        n_routed_experts=groups * size, n_group=groups, topk_group=kept, num_experts_per_tok=k, topk_method=method
    )
    # A shuffled ladder of scores: no two sums of scores and biases tie.
    seed = data.draw(st.integers(0, 10**6), "seed")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 4, groups * size, dtype=torch.float64, generator=generator)
    router = router_of(config)
    if router.bias is not None:
        router.bias.data.uniform_(-2, 1, generator=generator)
    bias = None if router.bias is None else router.bias.tolist()
    for row, chosen in zip(scores[0].tolist(), router.choose(scores)[0].tolist(), strict=True):
        assert len(set(chosen)) == k and set(chosen) == plain.choose(row, bias, config)


def test_groups_are_ranked_by_two_best_in_v3_and_by_the_best_in_v2():
    scores = torch.tensor([[[0.9, 0.1, 0.6, 0.5, 0.2, 0.1, 0.1, 0.2]]])
    for config, best in ((NANO, {2, 3}), (V2, {0, 1})):
        router = Router(config.replace(topk_group=1))
        assert set(router.choose(scores).flatten().tolist()) == best


def test_weights_of_v3_sum_to_the_scaling_factor_and_ignore_the_bias():
    router, x = router_of(NANO, bias_size=0.0), random_stream(2, 5, 64)
    before = router(x)
    router.bias.data.fill_(-0.7)  # the same for all: the same experts
    after = router(x)
    torch.testing.assert_close(after.weights, before.weights, atol=0, rtol=0)
    torch.testing.assert_close(before.weights.sum(-1), torch.full((2, 5), 2.5, dtype=torch.float64))


def test_bias_gets_no_gradient_and_the_router_weight_does():
    router = router_of(NANO)
    routing = router(random_stream(2, 5, 64))
    (routing.weights**2).sum().backward()
    assert router.bias.grad is None and router.weight.grad.abs().sum() > 0
    assert not routing.experts.is_floating_point()


def test_v2_has_no_bias():
    assert Router(V2).bias is None and "bias" not in Router(V2).state_dict()


@pytest.mark.parametrize("func", ["sigmoid", "softmax"])
def test_gate_is_float32_in_a_bfloat16_model_and_under_autocast(func):
    router = router_of(NANO.replace(scoring_func=func), torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16 and router.bias.dtype == torch.float32
    x = random_stream(2, 5, 64).bfloat16()
    want = torch.nn.functional.linear(x.double(), router.weight.double())
    want = want.sigmoid() if func == "sigmoid" else want.softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        for scores in (router.scores(x), router.float().scores(x.float()), router(x.float()).scores):
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores.double(), want, atol=1e-6, rtol=0)


# The experts -------------------------------------------------------------------------------------------------------


def experts_of(count, dtype):
    experts = Experts(NANO.replace(n_routed_experts=count, n_group=1, topk_group=1, num_experts_per_tok=2))
    for weight in experts.parameters():
        weight.data.normal_(0, weight.shape[1] ** -0.5)
    return experts.to(dtype)


def loop_over_experts(experts, x, chosen, weights):
    """The routed sum as most code writes it: for each expert, the tokens that chose it."""
    out = torch.zeros_like(x)
    w = {f"experts.{name}": weight for name, weight in experts.named_parameters()}
    for i in range(len(experts.gate_proj)):
        token, place = torch.where(chosen == i)
        for t, p in zip(token.tolist(), place.tolist(), strict=True):
            out[t] = out[t] + weights[t, p] * plain.expert(w, i, x[t])
    return out


def assignment(tokens, count, kind):
    """Experts of each token: spread over all, or only the last two (all others stay empty)."""
    generator = torch.Generator().manual_seed(4)
    if kind == "most experts empty":
        return torch.tensor([[count - 1, count - 2]] * tokens)
    if kind == "first expert empty":
        return torch.stack([1 + torch.randperm(count - 1, generator=generator)[:2] for _ in range(tokens)])
    return torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(tokens)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["spread", "first expert empty", "most experts empty"])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_experts_equal_a_loop_over_experts_with_all_gradients(dtype, kind, tokens):
    experts = experts_of(5, dtype)
    x = random_stream(tokens, 64, dtype=dtype).requires_grad_()
    chosen = assignment(tokens, 5, kind)
    weights = random_stream(tokens, 2, seed=5, dtype=dtype).requires_grad_()
    load = torch.bincount(chosen.flatten(), minlength=5)
    grad = random_stream(tokens, 64, seed=6, dtype=dtype)
    leaves = [x, weights, *experts.parameters()]

    want = loop_over_experts(experts, x, chosen, weights)
    want_grads = torch.autograd.grad(want, leaves, grad)
    for got in (experts.by_expert(x, chosen, weights, load), experts.by_token(x, chosen, weights)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(got, leaves, grad), want_grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_matmul_multiplies_each_run_of_rows_by_its_matrix(dtype):
    x, weight = random_stream(7, 8, dtype=dtype), random_stream(4, 8, 16, seed=5, dtype=dtype)
    out = grouped_matmul(x, weight, torch.tensor([0, 3, 0, 4]))
    torch.testing.assert_close(out, torch.cat((x[:3] @ weight[1], x[3:] @ weight[3])), atol=1e-5, rtol=1e-5)


def test_training_and_decoding_paths_agree():
    moe = build(NANO, torch.float32).layers[1].ffn
    for tokens in (1, 2, 3, 4, 9):  # fewer rows than experts are fetched token by token when no gradient is wanted
        x = random_stream(1, tokens, 64, dtype=torch.float32)
        with torch.no_grad():
            decoded = moe(x)[0]
        torch.testing.assert_close(moe(x)[0].detach(), decoded, atol=1e-5, rtol=1e-5)


# The mixture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_mixture_equals_the_loop_over_tokens(name, shared):
    moe = build(ROUTINGS[name].replace(n_shared_experts=shared)).layers[1].ffn
    x, weights = random_stream(2, 6, 64).requires_grad_(), dict(moe.named_parameters())
    out, routing = moe(x)
    config = ROUTINGS[name].replace(n_shared_experts=shared)
    want, load = plain.mixture(weights, config, x.flatten(0, 1))
    torch.testing.assert_close(out.flatten(0, 1), want, atol=1e-10, rtol=0)
    assert routing.tokens_per_expert.tolist() == load


def test_gradients_of_the_mixture_reach_experts_router_and_input():
    """Against finite differences: the weights of the chosen are part of the derivative, the choice is not."""
    moe = build(NANO).layers[1].ffn
    x, weigh = random_stream(1, 4, 64), random_stream(1, 4, 64, seed=7)

    def value():
        return (moe(x)[0] * weigh).sum()

    value().backward()
    for weight in (moe.router.weight, moe.experts.gate_proj, moe.experts.down_proj, moe.shared.up_proj.weight):
        direction = torch.randn_like(weight)
        with torch.no_grad():
            weight.add_(1e-6 * direction)
            up = value()
            weight.sub_(2e-6 * direction)
            slope = (up - value()) / 2e-6
            weight.add_(1e-6 * direction)
        torch.testing.assert_close((weight.grad * direction).sum(), slope, atol=1e-6, rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(batch=st.integers(1, 3), seq=st.integers(1, 9), k=st.integers(1, 4), same=st.booleans())
def test_no_token_is_dropped(batch, seq, k, same):
    moe = build(NANO.replace(num_experts_per_tok=k)).layers[1].ffn
    x = random_stream(batch, seq, 64)
    if same:  # all tokens want the same experts
        x = x[:1, :1].expand(batch, seq, -1)
    out, routing = moe(x)
    assert routing.tokens_per_expert.sum() == batch * seq * k
    assert routing.tokens_per_expert.tolist() == [Counter(routing.experts.flatten().tolist())[i] for i in range(8)]
    if same:
        assert routing.tokens_per_expert.max() == batch * seq
        torch.testing.assert_close(out, out[:1, :1].expand_as(out), atol=1e-10, rtol=0)


def test_shared_experts_are_added_as_they_are():
    for shared in (0, 1, 2):
        moe = build(NANO.replace(n_shared_experts=shared)).layers[1].ffn
        moe.experts.down_proj.data.zero_()
        x = random_stream(1, 5, 64)
        if shared:
            assert moe.shared.gate_proj.weight.shape == (shared * 32, 64)
            torch.testing.assert_close(moe(x)[0], moe.shared(x), atol=0, rtol=0)
        else:
            assert isinstance(moe, MoE) and moe.shared is None and not moe(x)[0].any()
