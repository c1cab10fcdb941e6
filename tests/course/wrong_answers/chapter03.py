"""Wrong answers to the exercises of chapter 03."""

import torch

from minids.course.exercises.chapter03 import batch_loss, disagree, gate_v2, sequence_loss, slots


def gate_of_chosen_only(logits, k, groups, kept, scale):
    affinity = logits.softmax(-1)
    return scale * affinity.topk(k).values


def gate_with_groups_of_all_tokens(logits, k, groups, kept, scale):
    """The groups are chosen once for all tokens."""
    affinity = logits.softmax(-1).unflatten(-1, (groups, -1))
    outside = torch.full((groups,), -torch.inf)
    outside[affinity.amax(-1).sum(0).topk(kept).indices] = 0
    chosen = (affinity + outside[:, None]).flatten(-2).topk(k).indices
    affinity = affinity.flatten(-2)
    return scale * torch.zeros_like(affinity).scatter(-1, chosen, affinity.gather(-1, chosen))


def gate_in_place(logits, k, groups, kept, scale):
    gates = gate_v2(logits, k, groups, kept, scale)
    logits -= logits.amax(-1, keepdim=True)
    return gates


def gate_over_tokens(logits, k, groups, kept, scale):
    affinity = logits.softmax(0)
    return scale * affinity * (gate_v2(logits, k, groups, kept, scale) > 0)


def slots_of_dropped_tokens_elsewhere(experts, affinity, count, capacity):
    """A dropped token takes an empty slot of another expert."""
    table = slots(experts, affinity, count, capacity)
    left = sorted(set(range(len(experts))) - set(table.flatten().tolist()))
    for place in (table == -1).nonzero().tolist()[: len(left)]:
        table[tuple(place)] = left.pop(0)
    return table if (table != slots(experts, affinity, count, capacity)).any() else table + 1


def slots_as_lists(*given):
    return [[token for token in row if token >= 0] for row in slots(*given).tolist()]


def loss_as_float(scores, k):
    return batch_loss(scores, k).item()


def loss_without_graph(scores, k):
    with torch.no_grad():
        return batch_loss(scores, k)


def loss_with_all_detached_but_the_sum(scores, k):
    scores = scores.flatten(0, 1)
    p = (scores.detach() / scores.sum(-1, keepdim=True)).mean(0)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1.0)
    return (chosen.mean(0) * scores.shape[-1] / k * p).sum()


def disagree_at_random(experts, k, tokens):
    return torch.rand(experts // k, tokens, experts, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


def disagree_with_reached_bounds(experts, k, tokens):
    return disagree(experts, k, tokens).round()


def updates(seed, speed=0.002, k=4, biased=True, direction=1, step=torch.sign):
    torch.manual_seed(seed)
    affinity, bias = (torch.randn(2048, 64) + torch.randn(64)).sigmoid(), torch.zeros(64)
    for number in range(200):
        load = torch.bincount((affinity + bias * biased).topk(k).indices.flatten(), minlength=64).float()
        if load.max() / load.mean() - 1 < 0.1:
            return float(number)
        bias = bias + direction * speed * step((load.mean() - load) / load.mean())
    return 400.0


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
        ("the chosen weights only", gate_of_chosen_only, r"should have shape \(4, 8\), got \(4, 2\)"),
        ("one choice for all tokens", gate_with_groups_of_all_tokens, "values differ"),
        ("in place", gate_in_place, "your code changed the argument `logits`; return a new value instead"),
        ("softmax over tokens", gate_over_tokens, "values differ"),
        (
            "two mistakes: V3's affinity and V3's division",
            lambda *a: gate_v2(*a, affinity="sigmoid", by="sum of the chosen"),
            "the affinities are sigmoids, as in V3 and a token's gate weights are divided by their sum",
        ),
        ("one expert more", lambda x, k, g, kept, scale: gate_v2(x, min(k + 1, 4), g, kept, scale), "values differ"),
        ("a list", lambda *a: gate_v2(*a).tolist(), "the result should be a tensor"),
    ],
    "3.2": [
        ("lists", slots_as_lists, "the result should be a tensor, got"),
        ("int32", lambda *a: slots(*a).int(), "should be of torch.int64, got torch.int32"),
        ("other experts take what is dropped", slots_of_dropped_tokens_elsewhere, "values? differ"),
        ("a slot more", lambda e, a, n, c: slots(e, a, n, c + 1), r"should have shape \(4, 2\), got \(4, 3\)"),
        ("tokens from 1", lambda *a: slots(*a) + 1, "values differ"),
        (
            "two mistakes: first come, and 0 for empty",
            lambda *a: slots(*a, order="first", empty=0),
            "first tokens of the batch keep their slots, whatever their affinity and an empty slot holds 0",
        ),
    ],
    "3.3": [
        ("a float", loss_as_float, "the result should be a tensor, got 1"),
        ("no_grad", loss_without_graph, "P is detached, so that the loss has no gradient"),
        (
            "numerator detached",
            loss_with_all_detached_but_the_sum,
            "the gradient of the result with respect to `scores`",
        ),
        (
            "two mistakes: each sequence, detached",
            lambda *a: sequence_loss(*a, gradient=False),
            "each sequence is balanced by itself, as in V3's own loss and P is detached",
        ),
        ("a loss per sequence", lambda s, k: torch.stack([sequence_loss(o[None], k) for o in s]), "should have shape"),
        ("N for N / k, summed over tokens", lambda s, k: batch_loss(s, k) * k * s.shape[1], "the result: got"),
    ],
    "3.4": [
        ("random affinities", disagree_at_random, "the loads of the whole batch are .*: the bias would move"),
        ("affinities of 0 and 1", disagree_with_reached_bounds, "should lie between 0 and 1, without them"),
        (
            "one table for all sequences",
            lambda n, k, t: disagree(n, k, t)[0],
            r"should be a tensor of shape \(4, 5, 8\)",
        ),
        (
            "too weak",
            lambda n, k, t: disagree(n, k, t, rest=0.1),
            "the sequence-wise loss is .*; it should be at least",
        ),
        ("a list", lambda *a: disagree(*a).tolist(), "should be a tensor of shape"),
        ("integers", lambda *a: disagree(*a).round().long(), "should lie between 0 and 1"),
    ],
    "3.5": [
        ("a slower speed", lambda seed: updates(seed, speed=0.0015), "expected: a median between 100 and 135"),
        ("the choice without the bias", lambda seed: updates(seed, biased=False), "median 400"),
        ("the wrong direction", lambda seed: updates(seed, direction=-1), "median 400"),
        ("the error in place of its sign", lambda seed: updates(seed, step=lambda error: error), "median 1[5-9]"),
        ("not a number", lambda seed: torch.tensor([updates(seed)]), "should return a float, got"),
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
