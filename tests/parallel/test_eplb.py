"""Where experts live against the published example, what must hold of any placement, and rows counted one by one."""

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.config import ModelConfig
from minids.course.traffic import Traffic
from minids.model.moe import Router
from minids.parallel.eplb import Placement, rebalance

# FACTS.md section 9: the example of deepseek-ai/EPLB's README, and section 12, row 23.
LOAD = torch.tensor(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
EXPERT_OF_SLOT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example_exactly():
    placement = rebalance(LOAD, slots=16, groups=4, nodes=2, gpus=8)
    assert placement.expert_of_slot.tolist() == EXPERT_OF_SLOT
    assert placement.gpu_loads(LOAD)[0].tolist() == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]


@pytest.mark.parametrize("groups, imbalance", [(4, [0.208, 0.242]), (1, [0.073, 0.190]), (3, [0.073, 0.190])])
def test_how_even_the_published_example_gets(groups, imbalance):
    """One group, and three that two nodes cannot share, are balanced globally."""
    got = rebalance(LOAD, slots=16, groups=groups, nodes=2, gpus=8).imbalance(LOAD)
    assert [round(x, 3) for x in got.tolist()] == imbalance


def test_the_hierarchical_mode_is_not_the_global_one_in_disguise():
    spread = rebalance(LOAD, slots=16, groups=1, nodes=1, gpus=8)
    assert spread.expert_of_slot.tolist() != EXPERT_OF_SLOT


PUBLISHED = json.loads(Path(__file__).with_name("eplb_published.json").read_text())
"""What deepseek-ai/EPLB (commit d52c72d) answered on random loads, loads with ties, and packs of one item."""


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case["name"])
def test_placements_equal_those_of_the_published_code(case):
    sizes = (case[name] for name in ("slots", "groups", "nodes", "gpus"))
    assert rebalance(torch.tensor(case["load"]), *sizes).expert_of_slot.tolist() == case["expert_of_slot"]


def test_loads_are_divided_among_copies():
    placement = Placement(torch.tensor([[0, 1, 0, 2]]), gpus=2)
    assert placement.copies.tolist() == [[2, 1, 1]]
    assert placement.gpu_loads(torch.tensor([[10, 3, 1]])).tolist() == [[8, 6]]
    assert placement.imbalance(torch.tensor([[10, 3, 1]])).tolist() == pytest.approx([1 / 7])


@st.composite
def problems(draw):
    nodes, gpus_per_node, groups_per_node = (draw(st.integers(1, 4)) for _ in range(3))
    size, gpus, groups = draw(st.integers(1, 4)), nodes * gpus_per_node, nodes * groups_per_node
    experts = groups * size
    slots = gpus * (-(-experts // gpus) + draw(st.integers(0, 3)))
    row = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=2))), slots, groups, nodes, gpus


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems())
def test_every_placement(problem):
    load, slots, groups, nodes, gpus = problem
    experts = load.shape[1]
    for hierarchical in (True, False):
        placement = rebalance(load, slots, groups if hierarchical else 1, nodes if hierarchical else 1, gpus)
        assert placement.expert_of_slot.shape == (len(load), slots)
        assert placement.copies.shape == load.shape and placement.copies.min() >= 1
        torch.testing.assert_close(placement.gpu_loads(load).sum(1), load.sum(1).float())
        for row, counts, copies in zip(load, placement.expert_of_slot, placement.copies, strict=True):
            per_slot = row / copies
            if not hierarchical:
                # A copy more is only ever given to what is heaviest: taking one back gives a slot at least as heavy.
                before = (row / (copies - 1))[copies > 1]
                assert not len(before) or before.min() >= per_slot.max()
                # However the slots fall, two GPUs differ by a slot at most.
                totals = per_slot[counts].view(gpus, -1).sum(1)
                assert totals.max() - totals.min() <= per_slot.max() * (1 + 1e-5)
            else:  # the experts of a group stay on one node
                home = {}
                for node, held in enumerate(counts.view(nodes, -1).tolist()):
                    for expert in held:
                        assert home.setdefault(expert // (experts // groups), node) == node


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_the_heaviest_slot_is_never_heavier_than_without_copies_or_with_fewer(problem):
    load, slots, _, _, gpus = problem
    heaviest = [(load / rebalance(load, n, 1, 1, gpus).copies).amax(1) for n in (slots, slots + gpus)]
    assert (heaviest[0] <= load.amax(1)).all() and (heaviest[1] <= heaviest[0]).all()


def test_greedy_packing_is_not_optimal():
    """A promise that nobody should make: here the experts as they lie, without any copy, are more even."""
    load = torch.tensor([[3, 3, 0, 2, 2, 2]])
    as_they_lie = Placement(torch.arange(6)[None], 2)
    assert as_they_lie.imbalance(load).item() == 0
    assert rebalance(load, 6, 1, 1, 2).imbalance(load).item() == pytest.approx(1 / 6)


def test_v3_sizes_take_seconds():
    load = torch.randint(1, 1000, (4, 256))
    start = time.monotonic()
    prefill, decode = rebalance(load, 288, 8, 4, 32), rebalance(load, 320, 8, 40, 320)
    assert time.monotonic() - start < 10
    contiguous = Placement(torch.arange(256).expand(4, -1), 32)
    assert (prefill.imbalance(load) < contiguous.imbalance(load) / 2).all()
    assert decode.expert_of_slot.shape == (4, 320)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((16, 5, 1, 8), "groups=5: must divide the 12 experts"),
        ((16, 0, 1, 8), "groups=0: must divide"),
        ((16, 4, 3, 8), "nodes=3: must divide gpus=8"),
        ((17, 4, 2, 8), "slots=17: must be divisible by gpus=8"),
        ((8, 4, 2, 8), "slots=8: must be at least 12, one for each expert"),
    ],
)
def test_what_does_not_fit_is_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        rebalance(LOAD, *arguments)


def test_impossible_loads_and_placements_are_refused():
    with pytest.raises(ValueError, match="load=-1: must not be negative"):
        rebalance(torch.tensor([[1, -1]]), 2, 1, 1, 2)
    with pytest.raises(ValueError, match="every expert needs a slot"):
        Placement(torch.tensor([[0, 2]]), 2)
    with pytest.raises(ValueError, match="slots=3: must be divisible by gpus=2"):
        Placement(torch.tensor([[0, 1, 2]]), 2)


# Traffic -------------------------------------------------------------------------------------------------------------


def routed(tokens=200, ranks=16, **changes):
    """Experts, source and owner for 64 experts on 16 ranks, by a router that has 8 groups and keeps some."""
    config = dict(n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4)
    router = Router(ModelConfig.preset("nano", **config | changes))
    torch.nn.init.normal_(router.weight)
    experts = router(torch.randn(1, tokens, 64)).experts[0]
    return experts, torch.randint(ranks, (tokens,)), torch.arange(64) * ranks // 64


def one_by_one(experts, source, owner, gpus_per_node):
    """Both kinds of traffic with sets and loops."""
    naive, forwarded = torch.zeros(2, 16, 16, dtype=torch.int64)
    for chosen, home in zip(experts.tolist(), source.tolist(), strict=True):
        targets = [owner[expert].item() for expert in chosen]
        for target in targets:
            naive[home, target] += 1
        for node in {target // gpus_per_node for target in targets}:
            relay = node * gpus_per_node + home % gpus_per_node
            forwarded[home, relay] += 1
            for target in {target for target in targets if target // gpus_per_node == node}:
                forwarded[relay, target] += 1
    return naive, forwarded


@pytest.mark.parametrize("gpus_per_node", [1, 2, 8, 16])
def test_rows_are_counted_as_one_by_one(gpus_per_node):
    experts, source, owner = routed()
    for kind, want in zip(("naive", "forwarded"), one_by_one(experts, source, owner, gpus_per_node), strict=True):
        traffic = getattr(Traffic, kind)(experts, source, owner, 16, gpus_per_node)
        assert torch.equal(traffic.rows, want)
        pairs = [(a, b) for a in range(16) for b in range(16) if a != b]
        between = sum(want[a, b].item() for a, b in pairs if a // gpus_per_node != b // gpus_per_node)
        assert traffic.between_nodes == between
        assert traffic.within_nodes == sum(want[pair].item() for pair in pairs) - between


def test_a_limit_on_nodes_bounds_what_leaves_a_node():
    """8 groups on 8 nodes: at most 4 copies of a token leave when forwarded, however many experts it has there."""
    experts, source, owner = routed()
    free = routed(topk_group=8)[0]
    for limited in (1, 2, 4):
        chosen, origin, home = routed(topk_group=limited)
        traffic = Traffic.forwarded(chosen, origin, home, 16, 2)
        assert traffic.between_nodes <= limited * len(chosen)
        assert traffic.between_nodes < Traffic.forwarded(free, source, owner, 16, 2).between_nodes
    naive, forwarded = (kind(experts, source, owner, 16, 2) for kind in (Traffic.naive, Traffic.forwarded))
    assert forwarded.between_nodes < naive.between_nodes and naive.rows.sum() == experts.numel()
