"""Plausible wrong answers to the exercises of chapter 12."""

import torch

from minids.course.exercises import chapter12 as known


def balance_in_place_of_a_new_matrix(logits, iterations):
    logits.exp_()
    return known.balance(logits.log(), iterations)


def balance_one_iteration_less(logits, iterations):
    return known.balance(logits, iterations - 1)


def balance_to_the_mean(logits, iterations):
    return known.balance(logits, iterations) / logits.shape[-1]


def muon_without_scale(weight, momentum, grad, lr):
    return known.muon_step(weight, momentum, grad, lr, power=0.0)


def muon_of_the_gradient(weight, momentum, grad, lr):
    return known.muon_step(weight, torch.zeros_like(momentum), grad, lr)


def muon_weight_only(*arguments):
    return known.muon_step(*arguments)[0]


def muon_upwards(weight, momentum, grad, lr):
    new, momentum = known.muon_step(weight, momentum, grad, lr)
    return 2 * weight - new, momentum


def clip_the_key_of_every_head(query, key, nope, largest, threshold):
    query, _ = known.clip_heads(query, key, nope, largest, threshold)
    return query, key * (threshold / largest.max()).sqrt()


def clip_swapped(query, key, nope, largest, threshold):
    return known.clip_heads(query, key, query.shape[1] - nope, largest, threshold)


def clip_inverted(query, key, nope, largest, threshold):
    return known.clip_heads(query, key, nope, torch.full_like(largest, threshold) ** 2 / largest, threshold)


def hash_one_table(ids, multipliers, primes, pad):
    return known.hash_rows(ids, multipliers, primes, pad)[:, 0]


def hash_after_xor(ids, multipliers, primes, pad):
    return known.hash_rows(ids, [1] * len(multipliers), primes, pad) * multipliers[0]


def hash_pads_with_zero(ids, multipliers, primes, pad):
    return known.hash_rows(ids, multipliers, primes, 0)


def hash_without_the_token_itself(ids, multipliers, primes, pad):
    return known.hash_rows([pad, *ids[:-1]], multipliers, primes, pad)


def admit_everything(confidences, seconds):
    return [len(row) for row in confidences]


def admit_one_too_many(confidences, seconds):
    return [count + 1 for count in known.admit(confidences, seconds)]


def admit_likely_ones(confidences, seconds):
    return [sum(confidence > 0.5 for confidence in row) for row in confidences]


def shape_only(write):
    assert write(torch.ones(2, 3), torch.ones(3), torch.ones(2), torch.eye(2)).shape == (2, 3)


def symmetric_only(write):
    x, out = torch.eye(2), torch.tensor([10.0, 100.0])
    want = torch.tensor([[10.5, 100.5], [20.5, 200.5]])
    assert torch.allclose(write(x, out, torch.tensor([1.0, 2.0]), torch.full((2, 2), 0.5)), want)


def no_output(write):
    mix = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    assert torch.allclose(write(torch.eye(2), torch.zeros(2), torch.ones(2), mix), mix.T)


def papers_order(write):
    mix = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    assert torch.allclose(write(torch.eye(2), torch.zeros(2), torch.ones(2), mix), mix)


def gain_of(iterations, seed, order=(-1, -2), sites=60):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(50, 1, 4, 4, generator=g, dtype=torch.float64)
    own = torch.randn(50, 60, 4, 4, generator=g, dtype=torch.float64)
    product = torch.eye(4, dtype=torch.float64)
    for matrix in known.balance(12 * base + 3.6 * own, iterations, order=order)[:, :sites].unbind(1):
        product = matrix.mT @ product
    return torch.maximum(product.sum(-1).amax(-1), product.sum(-2).amax(-1))


WRONG = {
    "12.1": [
        ("one iteration less", balance_one_iteration_less, r"got \S+, expected"),
        ("sums of 1 / n", balance_to_the_mean, r"got \S+, expected"),
        ("the argument is changed", balance_in_place_of_a_new_matrix, r"changed the argument `logits`"),
        ("a list", lambda logits, n: known.balance(logits, n).tolist(), r"should be a tensor, got \["),
    ],
    "12.2": [
        ("no scale", muon_without_scale, r"the weight: .*\n?.*got \S+, expected"),
        ("no momentum", muon_of_the_gradient, r"got \S+, expected"),
        ("the weight only", muon_weight_only, r"should be a tuple of 2: the weight, the momentum"),
        ("uphill", muon_upwards, r"the weight: .*\n?.*got \S+, expected"),
    ],
    "12.3": [
        ("every key", clip_the_key_of_every_head, r"the key: .*\n?.*got \S+, expected"),
        ("rotated and unrotated swapped", clip_swapped, r"the query: .*\n?.*got \S+, expected"),
        ("the other heads", clip_inverted, r"the query: .*\n?.*got \S+, expected"),
        ("the query only", lambda *a: known.clip_heads(*a)[0], r"should be a tuple of 2: the query, the key"),
    ],
    "12.4": [
        ("one table", hash_one_table, r"should have shape \(5, 2\), got \(5,\)"),
        ("multiplied after the XOR", hash_after_xor, r"got \S+, expected"),
        ("zeros before the start", hash_pads_with_zero, r"got \S+, expected"),
        ("without the newest token", hash_without_the_token_itself, r"got \S+, expected"),
    ],
    "12.5": [
        ("everything", admit_everything, r"example \d of 7"),
        ("one too many", admit_one_too_many, r"example 1 of 7"),
        ("those above one half", admit_likely_ones, r"example \d of 7"),
        ("a number", lambda *a: sum(known.admit(*a)), r"should be a list of 3; got"),
    ],
    "12.6": [
        ("the shape", shape_only, r"it accepts everything so far"),
        ("a symmetric matrix", symmetric_only, r"misses a bug; hint: try a matrix that is not symmetric"),
        ("no output", no_output, r"misses a bug; hint: try unequal weights"),
        ("the paper's order", papers_order, r"it rejects the correct implementation"),
        ("no function", 3, r"test_write should be a function, got 3"),
    ],
    "12.7": [
        ("one iteration", lambda seed: gain_of(1, seed).max().item(), r"median [34]\."),
        ("a hundred iterations", lambda seed: gain_of(100, seed).max().item(), r"median 1\."),
        ("the mean draw", lambda seed: gain_of(20, seed).mean().item(), r"median 1\."),
        ("one site", lambda seed: gain_of(20, seed, sites=1).max().item(), r"median 1\."),
        ("a tensor", lambda seed: gain_of(20, seed).max(), r"should return a float, got"),
    ],
}
