"""Experts moved to other ranks compute the same."""

import torch
from sharded_experts import build, close, sharded

from minids.course.expert_moves import move_experts, slots_in_turn
from minids.model.moe import Experts, GroupedSwiGLU
from minids.parallel.eplb import Placement, rebalance
from minids.parallel.launch import launch


def test_copies_take_turns():
    slots = torch.tensor([2, 0, 1, 0, 0])
    experts_of = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 2]])
    assert slots_in_turn(experts_of, slots).tolist() == [[1, 2], [3, 0], [2, 4], [1, 0]]
    assert slots_in_turn(experts_of.flatten()[None], slots).tolist() == [[1, 2, 1, 0, 2, 1, 1, 0]]


class Counted(GroupedSwiGLU):
    """Notes how many rows come to the experts of this rank."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, rows, weights, load, matrices):
        self.rows.append(len(rows))
        return super().__call__(rows, weights, load, matrices)


def test_moved_experts_compute_the_same():
    """To slots with copies, to others, and back, between which outputs do not change but the busiest rank's rows do."""
    model = build(num_nextn_predict_layers=1)
    model.routers()[0].bias.data[:2] += 0.5
    tokens = torch.randint(64, (4, 11))
    loads = model(tokens, mtp=True).tokens_per_expert
    placements = [rebalance(loads, slots, 4, 2, 4) for slots in (16, 12)] + [rebalance(loads, 8, 4, 4, 4)]
    home = Placement(torch.arange(8).expand(3, -1).contiguous(), 4)

    def work(rank):
        mine = sharded(model, 4)
        outs, rows = [], []
        layers = [layer for layer in mine.modules() if isinstance(layer, Experts)]
        for layer in layers:
            layer.arithmetic = Counted(rows)
        with torch.no_grad():
            for placement in (None, *placements, home):
                if placement is not None:
                    move_experts(mine, placement)
                outs.append(mine(tokens[rank : rank + 1], mtp=True).logits)
        sizes = [len(layer.gate_proj.to_local()) for layer in layers]
        return outs, sizes, rows, mine.layers[1].ffn.experts.gate_proj.full_tensor()

    results = launch(work, 4)
    want = model(tokens).logits.detach()
    for i in range(5):
        close(torch.cat([each[0][i] for each in results]), want)
    assert all(each[1] == [2, 2, 2] for each in results)
    assert torch.equal(results[0][3], model.layers[1].ffn.experts.gate_proj)
    rows = torch.tensor([each[2] for each in results]).view(4, 5, 3)  # [rank, placement, layer]
    assert rows.sum(0).eq(loads.sum(1)).all()
    assert rows[:, 1, 0].max() < rows[:, 0, 0].max()
    expected = placements[0].gpu_loads(loads).T
    assert (rows[:, 1] - expected).abs().max() <= 0.2 * expected.max()


def test_a_placement_for_another_model_is_refused():
    model = build()

    def work(rank):
        errors, mine = [], sharded(model, 2)
        for rows, slots, gpus in ((2, 8, 2), (3, 4, 2), (3, 8, 4)):
            try:
                move_experts(mine, Placement(torch.arange(slots).expand(rows, -1), gpus))
            except ValueError as error:
                errors.append(str(error))
        return errors

    for layers, experts_held, gpus in launch(work, 2):
        assert layers == "placement=(2, 8): must have the 3 sharded MoE layers"
        assert experts_held == "placement=4: must place the 8 experts of the model"
        assert gpus == "gpus=4: must be the 2 ranks that hold the experts"
