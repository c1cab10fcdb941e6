"""Wrong answers to the exercises of chapter 13."""

from functools import partial

import torch

from minids.course.exercises import chapter13 as given
from minids.course.exercises import chapter13_mistakes as mistakes


def groups_as_tensors(rank, pp, dp, ep):
    return tuple(map(torch.tensor, given.groups(rank, pp, dp, ep)))


def groups_as_ranges(rank, pp, dp, ep):
    pp_group, dp_group, _ = given.groups(rank, pp, dp, ep)
    return pp_group, dp_group, range(rank // ep * ep, rank // ep * ep + ep)


def groups_without_pipeline(rank, pp, dp, ep):
    return given.groups(rank, pp, dp, ep)[1:]


def groups_in_falling_order(rank, pp, dp, ep):
    return tuple(group[::-1] for group in given.groups(rank, pp, dp, ep))


def groups_one_further(rank, pp, dp, ep):
    return tuple([each + 1 for each in group] for group in given.groups(rank, pp, dp, ep))


def groups_with_two_mistakes(rank, pp, dp, ep):
    return tuple(group[::-1] for group in mistakes.groups_exchanged(rank, pp, dp, ep))


def bytes_by_whole_division(experts, others, dp, ep, stage):
    """It passed until an example could not be divided."""
    parts = []
    for size, first in ((2, 3), (4, 2), (8, 1)):
        sharded = stage >= first
        parts.append(size * (experts // ep // (dp if sharded else 1) + others // (dp * ep if sharded else 1)))
    return tuple(parts)


def bytes_in_all(*arguments):
    return sum(given.bytes_per_rank(*arguments))


def bytes_by_name(*arguments):
    return dict(zip(("weights", "gradients", "optimizer"), given.bytes_per_rank(*arguments), strict=True))


def bytes_in_another_order(*arguments):
    return given.bytes_per_rank(*arguments)[::-1]


def bytes_with_two_mistakes(*arguments):
    return mistakes.bytes_with(*arguments, divided=False, optimizer=12)


def parts_as_list(nats, counts):
    return list(given.parts_of_loss(nats, counts))


def parts_without_gradient(nats, counts):
    return given.parts_of_loss(nats.detach(), counts)


def parts_as_floats(nats, counts):
    """The parts are read out with `.item()`, so no gradient flows."""
    return torch.tensor([part.item() for part in given.parts_of_loss(nats, counts)])


def parts_times_ranks(nats, counts):
    return given.parts_of_loss(nats, counts) * len(nats)


def parts_added(nats, counts):
    return given.parts_of_loss(nats, counts).sum()


def parts_without_nan(nats, counts):
    return mistakes.parts_mean_of_means(nats, counts).nan_to_num(0.0)


def norm_of_absolute_values(shards, copied):
    return float(sum(gradient.abs().sum() for shard in shards for _, gradient in shard))


def norm_of_each_rank(shards, copied):
    return [given.global_norm([shard], copied) for shard in shards]


def norm_of_first_copies_of_everything(shards, copied):
    """Two mistakes: every name once, and no root."""
    return mistakes.sum_of_squares(shards, [name for shard in shards for name, _ in shard])


def norm_of_mean_copies(shards, copied):
    squares = mistakes.sum_of_squares(shards, [])
    return (squares / len(shards)) ** 0.5


def data(steps=8):
    return torch.randn(steps, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def equal(one, other):
    assert torch.allclose(one[0], other[0]) and torch.allclose(one[1], other[1])


def only_numbers_of_ranks(train):
    for ranks in (2, 4):
        equal(train(data(), ranks, 3, None), train(data(), 1, 3, None))


def only_kills(train):
    for killed in (5, 7):
        equal(train(data(), 2, 3, killed), train(data(), 2, 3, None))


def only_weights(train):
    reference, _ = train(data(), 1, 3, None)
    for killed in (None, 5, 7):
        assert torch.allclose(train(data(), 4, 3, killed)[0], reference)


def killed_before_a_checkpoint(train):
    for ranks in (1, 2, 4):
        equal(train(data(), ranks, 3, 2), train(data(), 1, 3, None))


def the_same_data(train):
    same = data(1).expand(8, 12, 4)
    for ranks in (1, 2, 4):
        equal(train(same, ranks, 3, 5), train(same, 1, 3, None))


def only_calls(train):
    weight, bias = train(data(), 2, 3, 5)
    assert weight.shape == bias.shape == (4,)


def wants_a_kill_to_matter(train):
    assert not torch.equal(train(data(), 2, 3, 5)[0], train(data(), 2, 3, None)[0])


def uses_a_private_option(train):
    """The correct implementation had an option that the incorrect ones lacked; it caught them all."""
    train(data(), 2, 3, None, wrong="")


WRONG = {
    "13.1": [
        ("tensors", groups_as_tensors, r"the pp group should be a list of 2; got a tensor of shape \(2,\)"),
        ("a range", groups_as_ranges, r"the ep group should be a list of 2; got range\(4, 6\)"),
        ("two groups", groups_without_pipeline, r"the result should have 3 parts, not 2: got \(\[5, 7\], \[4, 5\]\)"),
        ("falling order", groups_in_falling_order, r"the pp group\[0\]: got 5, expected 1\n"),
        ("one further", groups_one_further, r"got 2, expected 1"),
        ("two mistakes", groups_with_two_mistakes, r"got 5, expected 1"),
    ],
    "13.2": [
        ("whole division", bytes_by_whole_division, r"got 442, expected 445\.333\n.*the shards are rounded down"),
        ("all in one", bytes_in_all, r"should be a tuple of 3: the weights, the gradients, the optimizer states; got"),
        ("a dict", bytes_by_name, r"should be a tuple of 3: the weights, .*; got \{'weights': "),
        ("another order", bytes_in_another_order, r"the weights: got 20800, expected 5200"),
        ("two mistakes", bytes_with_two_mistakes, r"the weights: got 14800, expected 5200"),
    ],
    "13.3": [
        ("a list", parts_as_list, r"the result should be a tensor, got \[a tensor of value"),
        ("no gradient", parts_without_gradient, r"the gradient of the result with respect to `nats`: 7 of 8"),
        ("floats", parts_as_floats, r"the gradient of the result with respect to `nats`: 7 of 8 values differ"),
        ("times the ranks", parts_times_ranks, r"the result: 2 of 2 values differ; .*\n +got .*\n +expected \["),
        ("one sum", parts_added, r"the result should have shape \(2,\), got \(\)"),
        ("two mistakes", parts_without_nan, r"the result: \d of \d values differ"),
    ],
    "13.4": [
        ("absolute values", norm_of_absolute_values, r"the result: got \S+, expected"),
        ("each rank", norm_of_each_rank, r"the result should be a number, got \[\d"),
        ("two mistakes", norm_of_first_copies_of_everything, r"the result: got \S+, expected"),
        ("a mean over ranks", norm_of_mean_copies, r"the result: got \S+, expected"),
        ("None", lambda shards, copied: None, r"the result should be a number, got None"),
    ],
    "13.5": [
        ("the slowest of all", partial(given.above_mean_step, of_mean=True), r"median 1\.\d"),
        ("one rank", partial(given.above_mean_step, ranks=1), r"median -?0\.\d"),
        ("eight ranks", partial(given.above_mean_step, ranks=8), r"median 7\.\d"),
        ("a share", lambda seed: given.above_mean_step(seed) / 100, r"median 0\.1\d"),
        (
            "a tensor",
            lambda seed: torch.tensor(given.above_mean_step(seed)),
            r"the function should return a float, got",
        ),
    ],
    "13.6": [
        ("no kill", only_numbers_of_ranks, r"✗ it misses a bug; hint: compare weights with and without a kill"),
        ("equal ranks", only_kills, r"✗ it misses a bug; hint: try several numbers of ranks"),
        ("only weights", only_weights, r"✗ it misses a bug; hint: compare biases with and without a kill"),
        (
            "an early kill",
            killed_before_a_checkpoint,
            r"✗ it misses a bug; hint: compare weights with and without a kill",
        ),
        ("equal data", the_same_data, r"✗ it misses a bug; hint: use other data in each step"),
        ("only calls", only_calls, r"it accepts everything so far"),
        ("a kill that matters", wants_a_kill_to_matter, r"it rejects the correct implementation"),
        ("a private option", uses_a_private_option, r"it rejects the correct implementation\n.*an error"),
    ],
}
