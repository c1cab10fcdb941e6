"""Wrong answers to the exercises of chapter 03."""

import torch
import torch.nn.functional as F

from minids.course.exercises.chapter03 import balance_bias, dispatch, gate, limit_groups, sequence_loss


def gate_by_threshold(scores, bias, k, scale):
    biased = scores + bias
    kept = scores * (biased > biased.topk(k).values[:, -1:])
    return scale * kept / kept.sum(-1, keepdim=True)


def gate_of_chosen_only(scores, bias, k, scale):
    chosen = scores.gather(-1, (scores + bias).topk(k).indices)
    return scale * chosen / chosen.sum(-1, keepdim=True)


def groups_of_all_tokens(scores, groups, kept):
    """The groups are chosen once for all tokens."""
    rank = scores.unflatten(-1, (groups, -1)).topk(2).values.sum(-1)
    outside = torch.full_like(rank, -torch.inf)
    outside[:, rank.sum(0).topk(kept).indices] = 0
    return (scores.unflatten(-1, (groups, -1)) + outside[..., None]).flatten(-2)


def limit_groups_in_place(scores, groups, kept):
    scores[:] = limit_groups(scores, groups, kept)
    return scores


def dispatch_by_loop(experts, count):
    rows = [token for expert in range(count) for token, chosen in enumerate(experts.tolist()) if expert in chosen]
    return rows, torch.bincount(experts.flatten(), minlength=count).tolist()


def balance_in_place(bias, loads, speed):
    load = loads.sum(0).float()
    bias += speed * (load.mean() - load).sign()
    return bias


def balance_with_integer_mean(bias, loads, speed):
    load = loads.sum(0)
    return bias + speed * (load.sum() // len(load) - load).sign()


def balance_by_mean_of_integers(bias, loads, speed):
    load = loads.sum(0)
    return bias + speed * (load.mean() - load).sign()


def loss_as_float(scores, k):
    return sequence_loss(scores, k).item()


def loss_by_tensor_of_items(scores, k):
    return torch.tensor([sequence_loss(one[None], k).item() for one in scores]).mean()


def loss_without_graph(scores, k):
    with torch.no_grad():
        return sequence_loss(scores, k)


def loss_with_all_detached_but_the_sum(scores, k):
    p = (scores.detach() / scores.sum(-1, keepdim=True)).mean(1)
    f = F.one_hot(scores.topk(k).indices, scores.shape[-1]).sum(-2).float().mean(1) * scores.shape[-1] / k
    return (f * p).sum(-1).mean()


def only_random_shapes(route):
    gates = route(torch.rand(3, 8), torch.zeros(8), 2, 4, 2, 2.5)
    assert gates.shape == (3, 8) and ((gates > 0).sum(-1) == 2).all()


def only_the_sum(route):
    assert torch.allclose(route(torch.rand(3, 8), torch.zeros(8), 2, 4, 2, 2.5).sum(-1), torch.full((3,), 2.5))


def a_bias_must_change_weights(route):
    scores = torch.rand(3, 8)
    one, other = (route(scores, bias * torch.ones(8), 2, 4, 2, 2.5) for bias in (0.0, 0.5))
    assert not torch.allclose(one, other)


def expects_weights_that_sum_to_one(route):
    assert torch.allclose(route(torch.rand(3, 8), torch.zeros(8), 2, 4, 2, 2.5).sum(-1), torch.ones(3))


def by_hand_without_bias(route):
    got = route(torch.tensor([[0.8, 0.2, 0.1, 0.3]]), torch.zeros(4), 2, 1, 1, 2.5)
    assert torch.allclose(got, torch.tensor([[0.8, 0.0, 0.0, 0.3]]) * 2.5 / 1.1)


WRONG = {
    "3.1": [
        ("a threshold that drops the last expert", gate_by_threshold, r"\[0, \d\]: got"),
        ("the chosen weights only", gate_of_chosen_only, r"should have shape \(4, 6\), got \(4, 2\)"),
        ("no scale", lambda s, b, k, scale: gate(s, b, k, 1.0), "the weights are not multiplied by `scale`"),
        (
            "two mistakes: bias in the weights, no scale",
            lambda *a: gate(*a, biased_weights=True, scaled=False),
            "the bias also enters the weights and the weights are not multiplied by `scale`",
        ),
        ("one expert more", lambda s, b, k, scale: gate(s, b, min(k + 1, s.shape[1]), scale), "values differ"),
        ("a list", lambda *a: gate(*a).tolist(), "the result should be a tensor"),
        (
            "in place",
            lambda s, b, k, scale: gate(s.add_(b).sub_(b * 1.01), b, k, scale),
            "changed the argument `scores`",
        ),
    ],
    "3.2": [
        ("one choice for all tokens", groups_of_all_tokens, "example 1 of 4.*\n.*values differ"),
        ("in place", limit_groups_in_place, "your code changed the argument `scores`; return a new value instead"),
        ("a mask", lambda *a: limit_groups(*a).isfinite(), "should be of torch.float32, got torch.bool"),
        ("one group more", lambda s, g, kept: limit_groups(s, g, kept + 1), "values differ"),
        (
            "two mistakes: filled with 0, ranked by the best",
            lambda *a: limit_groups(*a, fill=0.0, best=lambda size: 1),
            "the dropped groups are filled with 0 and a group is ranked by its single best score",
        ),
        ("a large negative number", lambda *a: limit_groups(*a, fill=-1e9), "got -1e.09, expected -inf"),
    ],
    "3.3": [
        ("lists", dispatch_by_loop, "the rows should be a tensor, got"),
        (
            "int32",
            lambda *a: tuple(x.int() for x in dispatch(*a)),
            "the rows should be of torch.int64, got torch.int32",
        ),
        ("the load only", lambda *a: dispatch(*a)[1], "should be a tuple of 2: the rows, the load"),
        (
            "two mistakes: places, no idle experts",
            lambda *a: dispatch(*a, name=lambda order, experts: order, idle=False),
            "not tokens and an expert that no token chose has no entry in the load",
        ),
        ("tokens from 1", lambda *a: (dispatch(*a)[0] + 1, dispatch(*a)[1]), "the rows: 6 of 6 values differ"),
        (
            "latest first",
            lambda e, c: (len(e) - 1 - dispatch(e.flip(0), c)[0], dispatch(e, c)[1]),
            "the rows: .*differ",
        ),
    ],
    "3.4": [
        ("in place", balance_in_place, "your code changed the argument `bias`; return a new value instead"),
        ("a mean of integers", balance_by_mean_of_integers, "your code raised RuntimeError: mean"),
        ("an integer mean", balance_with_integer_mean, "the mean is rounded down to a whole number"),
        (
            "two mistakes: last micro-batch, wrong direction",
            lambda *a: balance_bias(*a, parts=lambda loads: loads[-1:], direction=-1),
            "only the last micro-batch is counted and busy experts are made more attractive",
        ),
        ("the step only", lambda bias, *a: balance_bias(bias, *a) - bias, "the result: .*values differ"),
        ("a row per micro-batch", lambda b, loads, s: balance_bias(b, loads, s).expand(len(loads), -1), "have shape"),
    ],
    "3.5": [
        ("a float", loss_as_float, "the result should be a tensor, got 1"),
        ("a tensor made of floats", loss_by_tensor_of_items, "the gradient of the result with respect to `scores`"),
        ("no_grad", loss_without_graph, "P is detached, so that the loss has no gradient"),
        (
            "numerator detached",
            loss_with_all_detached_but_the_sum,
            "the gradient of the result with respect to `scores`",
        ),
        (
            "two mistakes: whole batch, detached",
            lambda *a: sequence_loss(*a, whole_batch=True, gradient=False),
            "the whole batch is taken as one sequence and P is detached",
        ),
        ("a loss per sequence", lambda s, k: torch.stack([sequence_loss(o[None], k) for o in s]), "should have shape"),
        ("N for N / k, summed over tokens", lambda s, k: sequence_loss(s, k) * k * s.shape[1], "the result: got"),
    ],
    "3.6": [
        ("shapes only", only_random_shapes, "it accepts everything so far"),
        ("the sum only", only_the_sum, "it misses a bug; hint: does a bias change weights"),
        ("by hand, no bias", by_hand_without_bias, "it misses a bug; hint: what if all biased scores are negative"),
        ("too strict: the leak is demanded", a_bias_must_change_weights, "it rejects the correct implementation"),
        (
            "too strict: the scale is forgotten",
            expects_weights_that_sum_to_one,
            "it rejects the correct implementation",
        ),
        ("no assert", lambda route: route(torch.rand(1, 4), torch.zeros(4), 1, 1, 1, 1.0), "an assert that can fail"),
    ],
}
