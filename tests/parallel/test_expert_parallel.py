"""Experts sharded over processes equal all of them in one process; what the all-to-alls send."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from sharded_experts import build, close, sharded, whole_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from minids.course.traffic import Traffic
from minids.fp8.linear import convert_to_fp8
from minids.parallel.expert_parallel import AS_V3, WirePrecision, bytes_per_row, decode, encode, shard_experts
from minids.parallel.launch import launch

# Equal to one process ------------------------------------------------------------------------------------------------


def loss_of(out):
    return sum(logits.square().sum() for logits in (out.logits, *out.mtp_logits)) / 100


@pytest.mark.parametrize("ranks, dtype", [(2, torch.float32), (4, torch.float64)])
def test_a_model_equals_one_process(ranks, dtype):
    """Output, gradients, loads and balance update, the prediction module's experts too; 4 ranks, 5 sequences."""
    model = build(dtype)
    tokens = torch.randint(64, (5, 11))

    def work(rank):
        mine = sharded(model, ranks)
        out = mine(tokens.tensor_split(ranks)[rank], mtp=True)
        loss_of(out).backward()
        loads = out.tokens_per_expert
        dist.all_reduce(loads)
        mine.update_balance_bias(loads, 0.25)
        biases = [router.bias.data for router in mine.routers()]
        return out.logits.detach(), out.mtp_logits[0].detach(), whole_gradients(mine), loads, biases

    results = launch(work, ranks)
    out = model(tokens, mtp=True)
    loss_of(out).backward()
    model.update_balance_bias(out.tokens_per_expert, 0.25)
    close(torch.cat([each[0] for each in results]), out.logits.detach())
    close(torch.cat([each[1] for each in results]), out.mtp_logits[0].detach())
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for _, _, gradients, loads, biases in results:
        assert gradients.keys() == expected.keys() and torch.equal(loads, out.tokens_per_expert)
        for name, gradient in gradients.items():
            close(gradient, expected[name], name)
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
        return out.detach(), x.grad, routing.tokens_per_expert

    def work(rank):
        model = sharded(build(), 2)
        mine = model.layers[1].ffn
        mine.router.load_state_dict(moe.router.state_dict())
        return *run(mine, x.split(split, 1)[rank]), mine.experts.down_proj.grad.full_tensor()

    results = launch(work, 2)
    out, grad, load = run(moe, x)
    for i, want in enumerate((out, grad)):
        close(torch.cat([each[i] for each in results], 1), want)
    assert torch.equal(sum(each[2] for each in results), load)
    close(results[0][3], moe.experts.down_proj.grad)


def test_few_tokens_travel_too():
    """One process would fetch single matrices for them; here a rank that does so leaves the others waiting."""
    model = build()
    tokens = torch.randint(64, (1, 8))

    def work(rank):
        with torch.no_grad():
            return sharded(model, 2)(tokens[:, : (1, 8)[rank]]).logits

    for logits, length in zip(launch(work, 2), (1, 8), strict=True):
        close(logits, model(tokens[:, :length]).logits.detach())


def test_fp8_experts_equal_one_process():
    """What travels is rounded as the layer itself would round it: the same 8 bits, so nothing is lost on the way."""
    model = build(hidden_size=136, moe_intermediate_size=136)
    convert_to_fp8(model, where=lambda name: name.endswith("experts"))
    moe, x = model.layers[1].ffn, torch.randn(2, 20, 136)
    names = [name for name, _ in moe.experts.named_parameters()]

    def work(rank):
        mine = sharded(model, 2, WirePrecision("fp8", "as is")).layers[1].ffn
        out = mine(x[rank : rank + 1])[0]
        out.square().sum().backward()
        return out.detach(), [p.grad.full_tensor() for p in mine.experts.parameters()]

    results = launch(work, 2)
    out = moe(x)[0]
    out.square().sum().backward()
    close(torch.cat([each[0] for each in results]), out.detach())
    for name, got in zip(names, results[0][1], strict=True):
        want = moe.experts.get_parameter(name).grad
        close(got, want, name)


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
