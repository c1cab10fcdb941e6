"""Experts on several processes against all of them in one; what travels; moving experts; and computing meanwhile."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from minids.config import ModelConfig
from minids.model.fp8_linear import convert_to_fp8
from minids.model.moe import MoE
from minids.model.transformer import MiniDS
from minids.parallel import experts
from minids.parallel.experts import (
    AS_V3,
    Precision,
    Sharded,
    bytes_per_row,
    decode,
    encode,
    move_experts,
    shard_experts,
    slots_in_turn,
    take_turns,
)
from minids.parallel.pipeline import launch
from minids.parallel.placement import Placement, Traffic, rebalance


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16)
    model = MiniDS(ModelConfig.preset("nano", **small | changes)).to(dtype)
    for router in model.routers():
        router.bias.data.normal_(0, 0.1)
    return model


def sharded(model, ranks, *precision):
    """A copy of `model` on this rank, without gradients."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    shard_experts(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",)), *precision)
    return model


def whole_gradients(model):
    """Experts have theirs from all ranks; of everything else the parts are added."""
    gradients = {}
    for name, p in model.named_parameters():
        if isinstance(p.grad, DTensor):
            gradients[name] = p.grad.full_tensor()
        elif p.grad is not None:
            dist.all_reduce(p.grad)
            gradients[name] = p.grad
    return gradients


def close(got, want, tolerance, name=""):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}")


# Equal to one process ------------------------------------------------------------------------------------------------


def loss_of(out):
    return sum(logits.square().sum() for logits in (out.logits, *out.mtp_logits)) / 100


@pytest.mark.parametrize("ranks, dtype, tolerance", [(2, torch.float32, 1e-6), (4, torch.float64, 1e-13)])
def test_a_model_equals_one_process(ranks, dtype, tolerance):
    """Output, gradients, loads and balance update, the prediction module's experts too; 4 ranks, 5 sequences."""
    model = build(dtype)
    tokens = torch.randint(64, (5, 11))

    def work(rank):
        mine = sharded(model, ranks)
        out = mine(tokens.tensor_split(ranks)[rank], mtp=True)
        loss_of(out).backward()
        loads = out.loads
        dist.all_reduce(loads)
        mine.update_balance_bias(loads, 0.25)
        biases = [router.bias.data for router in mine.routers()]
        return out.logits.detach(), out.mtp_logits[0].detach(), whole_gradients(mine), loads, biases

    results = launch(work, ranks)
    out = model(tokens, mtp=True)
    loss_of(out).backward()
    model.update_balance_bias(out.loads, 0.25)
    close(torch.cat([each[0] for each in results]), out.logits.detach(), tolerance)
    close(torch.cat([each[1] for each in results]), out.mtp_logits[0].detach(), tolerance)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for _, _, gradients, loads, biases in results:
        assert gradients.keys() == expected.keys() and torch.equal(loads, out.loads)
        for name, gradient in gradients.items():
            close(gradient, expected[name], tolerance, name)
        assert all(torch.equal(*pair) for pair in zip(biases, (r.bias.data for r in model.routers()), strict=True))


SPLITS = {"even": [10, 10], "one has all": [0, 20], "nobody has any": [0, 0]}


@pytest.mark.parametrize("favourite", [None, 0, 7])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_any_batch(split, favourite):
    """Ranks without tokens, and experts that all tokens choose first: then other experts have few or none."""
    moe = build().layers[1].ffn
    if favourite is not None:
        moe.router.bias.data[favourite] = 100
    x = torch.randn(1, sum(split), 32)

    def run(moe, x):
        x = x.clone().requires_grad_()
        out, routing = moe(x)
        out.square().sum().backward()
        return out.detach(), x.grad, routing.load

    def work(rank):
        model = sharded(build(), 2)
        mine = model.layers[1].ffn
        mine.router.load_state_dict(moe.router.state_dict())
        return *run(mine, x.split(split, 1)[rank]), mine.experts.down_proj.grad.full_tensor()

    results = launch(work, 2)
    out, grad, load = run(moe, x)
    for i, want in enumerate((out, grad)):
        close(torch.cat([each[i] for each in results], 1), want, 1e-6)
    assert torch.equal(sum(each[2] for each in results), load)
    close(results[0][3], moe.experts.down_proj.grad, 1e-6)


def test_few_tokens_travel_too():
    """One process would fetch single matrices for them; here a rank that does so leaves the others waiting."""
    model = build()
    tokens = torch.randint(64, (1, 8))

    def work(rank):
        with torch.no_grad():
            return sharded(model, 2)(tokens[:, : (1, 8)[rank]]).logits

    for logits, length in zip(launch(work, 2), (1, 8), strict=True):
        close(logits, model(tokens[:, :length]).logits.detach(), 1e-6)


def test_fp8_experts_equal_one_process():
    """What travels is rounded as the layer itself would round it: the same 8 bits, so nothing is lost on the way."""
    model = build(hidden_size=136, moe_intermediate_size=136)
    convert_to_fp8(model, where=lambda name: name.endswith("experts"))
    moe, x = model.layers[1].ffn, torch.randn(2, 20, 136)
    names = [name for name, _ in moe.experts.named_parameters()]

    def work(rank):
        mine = sharded(model, 2, Precision("fp8", "as is")).layers[1].ffn
        out = mine(x[rank : rank + 1])[0]
        out.square().sum().backward()
        return out.detach(), [p.grad.full_tensor() for p in mine.experts.parameters()]

    results = launch(work, 2)
    out = moe(x)[0]
    out.square().sum().backward()
    close(torch.cat([each[0] for each in results]), out.detach(), 1e-6)
    for name, got in zip(names, results[0][1], strict=True):
        want = moe.experts.get_parameter(name).grad
        close(got, want, 1e-5 * want.abs().max().item())


def test_checkpoints_hold_all_experts(tmp_path):
    """Saved by two ranks, read by one process that knows nothing of them."""
    model = build()

    def work(rank):
        mine = sharded(model, 2)
        checkpoint.save(mine.state_dict(), checkpoint_id=tmp_path)
        weight = mine.layers[1].ffn.experts.gate_proj
        return weight.placements, weight.shape, weight.to_local().shape

    experts_of_layer = model.layers[1].ffn.experts
    for placements, shape, local in launch(work, 2):
        assert placements == (Shard(0),) and shape == experts_of_layer.gate_proj.shape == (8, 32, 16)
        assert local == (4, 32, 16)
    other = build()
    for p in other.parameters():
        p.data.zero_()
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path)
    assert all(torch.equal(state[name], p) for name, p in model.state_dict().items())


def test_what_does_not_fit_is_named():
    def work(rank):
        errors = []
        for model, shape in ((build(n_routed_experts=6, n_group=1, topk_group=1), (4,)), (build(), (2, 2))):
            try:
                shard_experts(model, init_device_mesh("cpu", shape))
            except ValueError as error:
                errors.append(str(error))
        return errors

    for errors in launch(work, 4):
        assert errors[0] == "n_routed_experts=6: must be divisible by the 4 ranks"
        assert "must have one dimension" in errors[1]


# What travels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire, error", [("as is", 0), ("bf16", 2**-8), ("fp8", 2**-4)])
def test_rows_are_rounded_as_far_as_the_format_says(wire, error):
    rows = torch.randn(30, 136)
    off = (decode(list(encode(rows, wire)), wire) - rows).abs()
    assert (off <= error * rows.abs().clamp_min(2**-6)).all() and off.max() >= error / 4 * rows.abs().max()


def test_bytes_of_a_row():
    """V3's 7168 channels: 1 byte each and a float32 for every 128, or 2 bytes each (FACTS.md section 7.4 leaves the
    scales out)."""
    assert [bytes_per_row(7168, wire) for wire in ("as is", "bf16", "fp8")] == [4 * 7168, 2 * 7168, 7168 + 4 * 56]


def test_v3_precision_and_the_bytes_that_are_sent(monkeypatch):
    """Dispatch in FP8 and combine in BF16; on the way back gradients leave in FP8 and return in BF16; rows and their
    destinations are those that `Traffic` counts."""
    model = build(hidden_size=136)
    x = torch.randn(2, 20, 136)

    def work(rank):
        seen = []
        send = dist.all_to_all_single

        def watched(out, rows, received, sent, group, async_op):
            if rows.dtype == torch.uint8:
                seen.append((sent, rows.shape[1]))
            return send(out, rows, received, sent, group, async_op=async_op)

        dist.all_to_all_single = watched  # in this process only
        moe = sharded(model, 2, AS_V3).layers[1].ffn
        out, routing = moe(x[rank : rank + 1])
        out.square().sum().backward()
        return out.detach(), routing.experts[0], seen

    results = launch(work, 2)
    moe = model.layers[1].ffn
    want = moe(x)[0].detach()
    relative = (torch.cat([each[0] for each in results]) - want).norm() / want.norm()
    assert 1e-3 < relative < 0.05
    chosen = torch.cat([each[1] for each in results])
    counted = Traffic.naive(chosen, torch.arange(40) // 20, torch.arange(8) // 4, 2, 1).rows
    weight, sizes = 4, [bytes_per_row(136, wire) for wire in ("fp8", "bf16")]
    for rank, (_, _, seen) in enumerate(results):
        (sent, dispatch), (_, combine), (_, back), (_, home) = seen
        assert sent == counted[rank].tolist()
        assert [dispatch, combine, back, home] == [sizes[0] + weight, sizes[1], sizes[0], sizes[1] + weight]


# Moving experts ------------------------------------------------------------------------------------------------------


def test_copies_take_turns():
    slots = torch.tensor([2, 0, 1, 0, 0])
    experts_of = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 2]])
    assert slots_in_turn(experts_of, slots).tolist() == [[1, 2], [3, 0], [2, 4], [1, 0]]
    assert slots_in_turn(experts_of.flatten()[None], slots).tolist() == [[1, 2, 1, 0, 2, 1, 1, 0]]


def test_moved_experts_compute_the_same():
    """To slots with copies, to others, and back, between which outputs do not change but the busiest rank's rows do."""
    model = build(num_nextn_predict_layers=1)
    model.routers()[0].bias.data[:2] += 0.5
    tokens = torch.randint(64, (4, 11))
    loads = model(tokens, mtp=True).loads
    placements = [rebalance(loads, slots, 4, 2, 4) for slots in (16, 12)] + [rebalance(loads, 8, 4, 4, 4)]
    home = Placement(torch.arange(8).expand(3, -1).contiguous(), 4)

    def work(rank):
        mine = sharded(model, 4)
        outs, rows = [], []
        multiply = experts.Experts.multiply

        def counted(self, x, weights, load):
            rows.append(len(x))
            return multiply(self, x, weights, load)

        experts.Experts.multiply = counted  # in this process only
        with torch.no_grad():
            for placement in (None, *placements, home):
                if placement is not None:
                    move_experts(mine, placement)
                outs.append(mine(tokens[rank : rank + 1], mtp=True).logits)
        sizes = [len(layer.gate_proj.to_local()) for layer in mine.modules() if isinstance(layer, Sharded)]
        return outs, sizes, rows, mine.layers[1].ffn.experts.gate_proj.full_tensor()

    results = launch(work, 4)
    want = model(tokens).logits.detach()
    for i in range(5):
        close(torch.cat([each[0][i] for each in results]), want, 1e-6)
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
        assert gpus == "gpus=4: must be the 2 ranks that share the experts"


# Taking turns --------------------------------------------------------------------------------------------------------


class Slow:
    """A message that is under way for a while, whatever the processor does."""

    def __init__(self, message, seconds):
        self.message, self.arrival = message, time.perf_counter() + seconds

    def wait(self):
        self.message.wait()
        time.sleep(max(0.0, self.arrival - time.perf_counter()))


def test_taking_turns_changes_no_number_and_hides_the_waiting():
    """Forward and backward, each exchange 20 ms on its way and each block 30 ms of work. One alone waits for all."""
    model = build()
    halves = torch.randint(64, (2, 2, 9))

    def work(rank):
        send = dist.all_to_all_single
        dist.all_to_all_single = lambda *args, **kwargs: Slow(send(*args, **kwargs), 0.02)  # in this process only
        mine = sharded(model, 2)
        for moe in mine.modules():
            if isinstance(moe, MoE):
                moe.register_forward_hook(lambda *_: time.sleep(0.03))
                moe.router.register_full_backward_pre_hook(lambda *_: time.sleep(0.03))

        def one(tokens):
            loss = mine(tokens).logits.square().sum()
            loss.backward()
            return loss.detach()

        results = []
        for groups in ([[half] for half in halves[rank]], [halves[rank]]):
            mine.zero_grad(set_to_none=True)
            runs = [take_turns([lambda h=h: one(h[None]) for h in group]) for group in groups]
            losses = [loss for values, _ in runs for loss in values]
            results.append((losses, whole_gradients(mine), [s for _, stretches in runs for s in stretches]))
        return results

    for alone, together in launch(work, 2):
        assert alone[0] == together[0]
        for name, gradient in alone[1].items():
            close(together[1][name], gradient, 1e-6 * gradient.abs().max().item() + 1e-9)
        waited = [sum(s.end - s.start for s in run[2] if s.what == "wait") for run in (alone, together)]
        assert waited[1] < 0.7 * waited[0], waited
        ordered = sorted(together[2], key=lambda s: s.start)
        assert all(a.end <= b.start + 1e-4 for a, b in zip(ordered, ordered[1:], strict=False))  # one at a time
        assert {s.work for s in ordered} == {0, 1}


def test_a_work_that_fails_is_heard_and_lets_the_others_finish():
    done = []

    def fail():
        raise ArithmeticError("no rows today")

    with pytest.raises(ArithmeticError, match="no rows today"):
        take_turns([fail, lambda: done.append(1)])
    assert done == [1]


def test_works_without_exchanges_run_one_after_the_other():
    results, stretches = take_turns([lambda i=i: i for i in range(3)])
    assert results == [0, 1, 2] and [(s.work, s.what) for s in stretches] == [(i, "compute") for i in range(3)]
