"""Wrong answers to the exercises of chapter 11."""

import torch

from minids.course.exercises import chapter11 as given
from minids.course.exercises import chapter11_mistakes as known


def scores_from_after_the_query(q, w, k):
    positions = torch.arange(len(q))[:, None] + len(k) - len(q)
    scores = known.index_scores(q, w, k, masked=False)
    return scores.masked_fill(torch.arange(len(k)) >= positions, -torch.inf)


def two_mistakes_of_the_score(q, w, k):
    return known.index_scores(q, w, k, product=lambda x: x, first=0)


def choice_by_score_alone(scores, k, window):
    visible = torch.ones_like(scores).tril().bool()
    best = scores.masked_fill(~visible, -torch.inf).topk(min(k + window, len(scores))).indices
    return torch.zeros_like(visible).scatter(1, best, True) & visible


def choice_of_the_worst(scores, k, window):
    return given.choose_with_window(-scores, k, window)


def loss_with_nan(scores, probabilities, chosen):
    target = probabilities.sum(0) * chosen
    target = target / target.sum(-1, keepdim=True)
    prediction = scores.masked_fill(~chosen, -torch.inf).log_softmax(-1)
    return (torch.xlogy(target, target) - target * prediction).sum(-1).mean()


def loss_without_gradient(scores, probabilities, chosen):
    return given.sparse_loss(scores.detach(), probabilities, chosen)


def entries_with_a_tail(content, logits, bias):
    m = len(bias)
    short = len(content) % m
    if short:
        content, logits = (torch.cat((x, x.new_zeros(m - short, *x.shape[1:]))) for x in (content, logits))
    return given.csa_entries(content, logits, bias)


def entries_of_one_series(content, logits, bias):
    m = len(bias)
    blocks = [slice(i, i + m) for i in range(0, len(content) - m + 1, m)]
    return torch.stack([((logits[b, 0] + bias[:, 0]).softmax(0) * content[b, 0]).sum(0) for b in blocks])


def entries_with_ones_bias(content, logits, bias):
    return given.csa_entries(content, logits, bias[:, :1].expand_as(bias))


def x_of(seed=0):
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def only_shapes(attend):
    assert attend(x_of(), 4, 2).shape == (10, 4)


def only_the_first_token(attend):
    assert torch.allclose(attend(x_of(), 4, 2)[0], x_of()[0])


def wants_nothing_to_change(attend):
    changed = x_of()
    changed[5] += 1
    assert torch.allclose(attend(x_of(), 4, 2), attend(changed, 4, 2))


def only_leaks(attend):
    changed = x_of()
    changed[7] += 1
    assert torch.allclose(attend(x_of(), 4, 2)[:7], attend(changed, 4, 2)[:7])


def wants_dense_attention(attend):
    x = x_of()
    out = torch.stack([(x[: t + 1] @ x[t]).softmax(0) @ x[: t + 1] for t in range(10)])
    assert torch.allclose(attend(x, 4, 2), out)


def four_bits(seed, rotate_queries=True, rotate_keys=True, exact=False):
    """What an indexer in four bits keeps, with rotations left out or without rounding."""
    generator = torch.Generator().manual_seed(seed)
    q = 0.3 * torch.randn(16, 128, generator=generator) + torch.randn(1, 128, generator=generator)
    k, w = torch.randn(512, 128, generator=generator), torch.rand(16, generator=generator)
    large = torch.arange(4) * 32 + 5
    k[:, large], q[:, large] = 30 * k[:, large], q[:, large] / 30

    def best(q, k):
        return (w @ (q @ k.T).relu()).topk(64).indices

    turned = known.hadamard(128)
    parts = [x @ turned if turn else x for x, turn in ((q, rotate_queries), (k, rotate_keys))]
    rounded = best(*parts) if exact else best(*map(to_fp4, parts))
    return torch.isin(rounded, best(q, k)).float().mean().item()


def to_fp4(x):
    grid, tiles = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]), x.unflatten(-1, (-1, 32))
    scale = torch.exp2(torch.ceil(torch.log2(tiles.abs().amax(-1, keepdim=True) / 6)))
    return (grid[((tiles / scale).abs()[..., None] - grid).abs().argmin(-1)] * tiles.sign() * scale).flatten(-2)


WRONG = {
    "11.1": [
        ("the query itself is masked", scores_from_after_the_query, r"the first at \[0, \d\]: got -inf, expected"),
        ("two mistakes", two_mistakes_of_the_score, r"no ReLU and the queries are taken for the first"),
        ("lists", lambda q, w, k: given.index_scores(q, w, k).tolist(), r"should be a tensor, got"),
        ("one head", lambda q, w, k: known.index_scores(q[:, :1], w[:, :1], k), r"values? differ|got \S+, expected"),
        ("heads first", lambda q, w, k: given.index_scores(q, w, k).T, r"should have shape|differ"),
    ],
    "11.2": [
        ("one top-k of k + window", choice_by_score_alone, r"the first at \[\d, \d\]: got \S+, expected"),
        ("the lowest scores", choice_of_the_worst, r"got \S+, expected"),
        (
            "numbers",
            lambda s, k, window: known.choose_with_window(s, k, window).float(),
            r"of torch\.bool, got torch\.f",
        ),
        ("the window alone", lambda s, k, window: known.choose_with_window(s, 0, window), r"got 0, expected 1"),
        ("one token more", lambda s, k, window: known.choose_with_window(s, k + 1, window), r"got 1, expected 0"),
    ],
    "11.3": [
        ("0 times infinity", loss_with_nan, r"got nan, expected"),
        ("no gradient", loss_without_gradient, r"gradient"),
        ("a float", lambda *a: given.sparse_loss(*a).item(), r"should be a tensor, got|gradient"),
        ("the other sign", lambda *a: -given.sparse_loss(*a), r"the result: got -\S+, expected"),
        ("base 2", lambda *a: given.sparse_loss(*a) / torch.tensor(2.0).log(), r"the result: got \S+, expected"),
    ],
    "11.4": [
        ("an entry of an unfinished block", entries_with_a_tail, r"should have shape \(2, 1\), got \(3, 1\)"),
        ("one series", entries_of_one_series, r"got \S+, expected"),
        ("one bias for both series", entries_with_ones_bias, r"got \S+, expected"),
        ("lists", lambda *a: given.csa_entries(*a).tolist(), r"should be a tensor, got \["),
        ("only the last", lambda *a: given.csa_entries(*a)[-1:], r"should have shape \(2, 1\), got \(1, 1\)"),
    ],
    "11.5": [
        ("shapes", only_shapes, r"it accepts everything so far"),
        ("the first token", only_the_first_token, r"misses a bug; hint: when does the first block appear"),
        ("nothing may change", wants_nothing_to_change, r"it rejects the correct implementation\n.*AssertionError"),
        ("leaks only", only_leaks, r"catches: a query sees the entry[\s\S]*misses a bug; hint: when does the first"),
        ("dense attention", wants_dense_attention, r"it rejects the correct implementation"),
    ],
    "11.6": [
        ("no rotation", lambda seed: four_bits(seed, False, False), r"median 0\.5"),
        ("only keys rotated", lambda seed: four_bits(seed, rotate_queries=False), r"median 0\.\d+, "),
        ("no rounding", lambda seed: four_bits(seed, exact=True), r"median (1|0\.9\d*), "),
        ("a list", lambda seed: [four_bits(seed)], r"the function should return a float, got"),
    ],
}
