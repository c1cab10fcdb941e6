"""Wrong answers to the exercises of chapter 08."""

from functools import partial

import torch

from minids.course.exercises import chapter08 as given


def chunks_not_joined(rows, cuts):
    outbox = [row.split(cut) for row, cut in zip(rows, cuts, strict=True)]
    return [[chunks[rank] for chunks in outbox] for rank in range(len(rows))]


def chunks_cut_by_columns(rows, cuts):
    columns = [list(column) for column in zip(*cuts, strict=True)]
    outbox = [row.split(column) for row, column in zip(rows, columns, strict=True)]
    return [torch.cat([chunks[rank] for chunks in outbox]) for rank in range(len(rows))]


def chunks_with_one_row_more(rows, cuts):
    received = given.all_to_all(rows, cuts)
    return [torch.cat([each, each.new_zeros(1, each.shape[1])]) for each in received]


def rows_stacked(rows, cuts):
    return torch.cat(given.all_to_all(rows, cuts))


def combine_without_sum(rows, order, weights):
    return rows[order.argsort()].view(*weights.shape, -1) * weights[..., None]


def combine_in_place(rows, order, weights):
    rows[:] = rows[order.argsort()]
    return (rows.view(*weights.shape, -1) * weights[..., None]).sum(1)


def combine_over_tokens(rows, order, weights):
    return (rows[order.argsort()].view(*weights.shape, -1) * weights[..., None]).sum(0)


def combine_mean_with_order(rows, order, weights):
    return given.combine_with_order(rows, order, weights) / weights.shape[1]


def crossings_as_tensor(experts, home, per_gpu, gpus_per_node):
    return torch.tensor(given.rows_between_nodes(experts, home, per_gpu, gpus_per_node))


def crossings_as_float(experts, home, per_gpu, gpus_per_node):
    return float(given.rows_between_nodes(experts, home, per_gpu, gpus_per_node))


def crossings_of_each_token(experts, home, per_gpu, gpus_per_node):
    own = (home // gpus_per_node).tolist()
    nodes = (experts // (per_gpu * gpus_per_node)).tolist()
    return [len(set(chosen) - {node}) for chosen, node in zip(nodes, own, strict=True)]


def crossings_of_the_batch(experts, home, per_gpu, gpus_per_node):
    return len(torch.unique(experts // (per_gpu * gpus_per_node))) - 1


def crossings_without_experts_per_gpu(experts, home, per_gpu, gpus_per_node):
    return given.rows_between_nodes(experts, home, 1, gpus_per_node)


def layer(seed=1, weight=None):
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(n, 4, generator=generator) for n in (3, 2)]
    experts = [torch.tensor([[0, 3], [1, 2], [3, 1]]), torch.tensor([[2, 0], [3, 2]])]
    weights = [torch.rand(n, 2, generator=generator) for n in (3, 2)]
    if weight is not None:
        weights = [torch.full_like(each, weight) for each in weights]
    return x, experts, weights, torch.randn(4, 4, 4, generator=generator)


def outputs_equal(moe, inputs):
    x, experts, weights, matrices = inputs
    outputs, _ = moe(*inputs)
    for rank, rows in enumerate(x):
        for token, row in enumerate(rows):
            chosen = zip(experts[rank][token], weights[rank][token], strict=True)
            expected = sum(weight * (row @ matrices[expert]) for expert, weight in chosen)
            assert torch.allclose(outputs[rank][token], expected, atol=1e-5)


def only_outputs(moe):
    outputs_equal(moe, layer())


def weights_of_one(moe):
    outputs_equal(moe, layer(weight=1.0))


def only_loads(moe):
    _, loads = moe(*layer())
    assert loads[0].tolist() == loads[1].tolist() == [2, 2, 3, 3]


def only_shapes(moe):
    outputs, loads = moe(*layer())
    assert [tuple(each.shape) for each in outputs] == [(3, 4), (2, 4)] and len(loads) == 2


def wants_own_loads(moe):
    _, loads = moe(*layer())
    assert loads[0].tolist() == [1, 2, 1, 2]


def wants_no_weights(moe):
    x, experts, weights, matrices = layer()
    outputs, _ = moe(x, experts, weights, matrices)
    assert torch.allclose(outputs[0][0], x[0][0] @ matrices[0] + x[0][0] @ matrices[3])


def uses_a_private_option(moe):
    """The correct implementation had an option that the incorrect ones lacked; it caught them all."""
    moe(*layer(), wrong="")


WRONG = {
    "8.1": [
        ("chunks not joined", chunks_not_joined, r"the result\[0\] should be a tensor, got \[a tensor of shape"),
        ("cut by columns", chunks_cut_by_columns, r"your code raised RuntimeError: split"),
        ("a row more", chunks_with_one_row_more, r"the result\[0\] should have shape \(4, 3\), got \(5, 3\)"),
        ("one tensor", rows_stacked, r"the result should be a list of 3; got a tensor of shape \(11, 3\)"),
        ("shifted to the other side", lambda r, c: given.exchange(r, c, shift=-1), r"the result\[0\]"),
        ("two mistakes", lambda r, c: given.exchange(r, c, shift=1, last_sender_first=True), r"the result\[0\]"),
    ],
    "8.2": [
        ("not added up", combine_without_sum, r"should have shape \(3, 4\), got \(3, 2, 4\)"),
        ("in place", combine_in_place, r"your code changed the argument `rows`; return a new value instead"),
        ("over tokens", combine_over_tokens, r"should have shape \(3, 4\), got \(2, 4\)"),
        ("two mistakes", combine_mean_with_order, r"12 of 12 values differ; the first at \[0, 0\]: got"),
        ("float64", lambda r, o, w: given.combine(r, o, w).double(), r"of torch\.float32, got torch\.float64"),
        ("a list", lambda r, o, w: given.combine(r, o, w).tolist(), r"the result should be a tensor, got \[\["),
    ],
    "8.3": [
        ("a tensor", crossings_as_tensor, r"the value is correct, but return an int, not a tensor"),
        ("a float", crossings_as_float, r"the value is correct, but return an int, not a float"),
        ("a list", crossings_of_each_token, r"the result: got \[\d, .*\], expected \d+"),
        ("nodes of the batch", crossings_of_the_batch, r"the result: got 3, expected \d+"),
        ("one expert per GPU", crossings_without_experts_per_gpu, r"the result: got \d+, expected \d+"),
        ("one more", lambda *a: given.rows_between_nodes(*a) + 1, r"the result: got \d+, expected \d+"),
    ],
    "8.4": [
        ("only outputs", only_outputs, r"✗ it misses a bug; hint: what must the loads of two ranks have in common"),
        ("weights of 1", weights_of_one, r"✗ it misses a bug; hint: use weights that are not 1"),
        ("only loads", only_loads, r"✗ it misses a bug; hint: compute one token by hand"),
        ("only shapes", only_shapes, r"it accepts everything so far"),
        ("loads of each rank", wants_own_loads, r"it rejects the correct implementation\n.*AssertionError"),
        ("no weights", wants_no_weights, r"it rejects the correct implementation\n.*AssertionError"),
        ("a private option", uses_a_private_option, r"it rejects the correct implementation\n.*an error"),
    ],
    "8.5": [
        ("measured with the old loads", partial(given.above_mean_today, today=False), r"median 1\.\d"),
        ("a new placement", partial(given.above_mean_today, renewed=True), r"median 1\.\d"),
        ("no copies", partial(given.above_mean_today, copies=0), r"median 107"),
        ("a share", lambda seed: given.above_mean_today(seed) / 100, r"median 0\.\d"),
        ("no drift", partial(given.above_mean_today, drift=0), r"median 1\.\d"),
    ],
}
