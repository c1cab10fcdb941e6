"""The FP8 layers equal loops over rounded operands, in outputs and in all gradients."""

import numpy as np
import pytest
import torch
from fp8_layers import FORMS, close, expert_layer, fp8_linear
from fp8_reference import matrix, round_trip

from minids.fp8.linear import AFTER_ATTENTION, Casting
from minids.model.moe import Routing


def three_products(x, weight, grad, casting):
    """Output and both gradients of x [tokens, in] @ weight [in, out], float64 on rounded operands."""
    pow2, sent = casting.power_of_two, casting.gradient_sent_in_fp8
    weight = round_trip(weight, (128, 128))[0]
    out = round_trip(x, (1, 128), power_of_two=pow2)[0] @ weight
    if sent:
        grad = round_trip(grad, (1, 128), power_of_two=True)[0]
    by_channel = round_trip(grad, (1, 128), power_of_two=sent)[0]
    cached = round_trip(x, (1, 128), casting.cached_as, pow2)[0]
    by_token = round_trip(grad, (128, 1), power_of_two=sent)[0]
    return out, by_channel @ weight.T, round_trip(cached, (128, 1), power_of_two=pow2)[0].T @ by_token


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens, inner, out", [(300, 200, 150), (1, 64, 32), (256, 384, 128)])
def test_linear_multiplies_rounded_operands_in_all_three_products(name, tokens, inner, out):
    layer = fp8_linear(inner, out, FORMS[name])
    x, grad = matrix(tokens, inner, seed=1).requires_grad_(), matrix(tokens, out, 1e-3, seed=2)
    y = layer(x)
    y.backward(grad)
    want = three_products(x.detach().numpy(), layer.weight.detach().numpy().T, grad.numpy(), FORMS[name])
    close(y, want[0])
    close(x.grad, want[1])
    close(layer.weight.grad, want[2].T)


def test_linear_keeps_leading_dimensions_and_number_format():
    layer = fp8_linear(64, 32)
    x = matrix(30, 64).view(2, 3, 5, 64)
    assert torch.equal(layer(x), layer(x.view(-1, 64)).view(2, 3, 5, 32))
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x.double()).dtype == torch.float64
    assert layer(x[:0]).shape == (0, 3, 5, 32)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), want)


def test_weight_gradients_add_up_in_float32():
    layer = fp8_linear(64, 32)
    x = matrix(128, 64).bfloat16()
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    layer(x).sum().backward()
    assert once.dtype == torch.float32 and torch.equal(layer.weight.grad, 2 * once)


def swiglu(gate, up, weight):
    return gate / (1 + torch.exp(-gate)) * up * weight


@pytest.mark.parametrize("dim, inner_dim", [(144, 136), (142, 133)])  # the kernel takes multiples of 4 only
def test_experts_equal_a_loop_over_experts_in_all_gradients(dim, inner_dim):
    _, layer, x, routing = expert_layer(dim=dim, inner_dim=inner_dim)
    grad = matrix(70, dim, 1e-2, seed=5)
    layer(x, routing).backward(grad[None])

    rows, w = x.detach()[0].double(), {name: p.detach().double() for name, p in layer.named_parameters()}
    out, grad_x, grad_weights = (torch.zeros(70, width, dtype=torch.float64) for width in (dim, dim, 2))
    grads = {name: torch.zeros_like(p) for name, p in w.items()}
    sent, combined = Casting(power_of_two=True), Casting(gradient_sent_in_fp8=True)
    for e in range(5):
        token, place = (routing.experts[0] == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        mine, weight = rows[token], routing.weights.detach()[0, token, place, None].double()
        gate = three_products(mine, w["gate_proj"][e], np.zeros((len(token), inner_dim)), sent)[0]
        up = three_products(mine, w["up_proj"][e], np.zeros((len(token), inner_dim)), sent)[0]
        gate, up = (torch.tensor(np.float32(t)).double() for t in (gate, up))
        inner = swiglu(gate, up, weight).float().double()
        y, grad_inner, grads["down_proj"][e] = map(
            torch.as_tensor, three_products(inner, w["down_proj"][e], grad[token], combined)
        )
        out.index_add_(0, token, y)
        cached = [torch.tensor(round_trip(t, (1, 128))[0]) for t in (gate, up)]
        inputs = [t.requires_grad_() for t in (*cached, weight)]
        grad_gate, grad_up, grad_weight = torch.autograd.grad(swiglu(*inputs), inputs, grad_inner)
        grad_weights[token, place] = grad_weight[:, 0]
        for name, g in (("gate_proj", grad_gate), ("up_proj", grad_up)):
            _, to_x, grads[name][e] = map(torch.as_tensor, three_products(mine, w[name][e], g.float(), sent))
            grad_x.index_add_(0, token, to_x)

    # A last bit of difference in what is rounded again may put single values on the next E4M3 number.
    for got, want in (
        (layer(x, routing)[0], out),
        (x.grad[0], grad_x),
        (routing.weights.grad[0], grad_weights),
        *((p.grad, grads[name]) for name, p in layer.named_parameters()),
    ):
        close(got, want, 1e-3)
        assert ((got.double() - want).abs() <= 3e-6 * want.abs().max()).double().mean() > 0.98


def test_few_tokens_without_gradient_see_the_same_experts():
    _, layer, x, routing = expert_layer(tokens=2)
    want = layer(x, routing)
    with torch.no_grad():
        assert torch.equal(layer(x, routing), want)


def test_tokens_of_an_expert_do_not_touch_another_experts_weight_gradient():
    _, layer, x, routing = expert_layer()
    grads = []
    for factor in (1.0, 1000.0):
        layer.zero_grad()
        scaled = x.detach().clone()
        only = Routing(routing.experts[..., :1], routing.weights[..., :1].detach(), routing.scores)
        scaled[0, only.experts[0, :, 0] == 0] *= factor
        layer(scaled, only).backward(torch.ones(1, 70, 144))
        grads.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name in grads[0]:
        first = only.experts[0, :, 0]
        others = [e for e in range(1, 5) if (first == e).any()]
        assert len(others) >= 3 and torch.equal(grads[0][name][others], grads[1][name][others])
        assert not torch.equal(grads[0][name][0], grads[1][name][0])


@pytest.mark.parametrize("casting, cached", [(Casting(), torch.float8_e4m3fn), (AFTER_ATTENTION, torch.float16)])
def test_what_waits_for_the_backward_pass_is_fp8_and_e5m6_after_attention(casting, cached):
    layer, saved = fp8_linear(256, 128, casting), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(matrix(128, 256))
    assert [(t.dtype, tuple(t.shape)) for t in saved] == [
        (cached, (128, 256)), (torch.float32, (128, 2)), (torch.float8_e4m3fn, (256, 128)), (torch.float32, (2, 1)),
    ]  # fmt: skip
