"""Every schedule on real processes against the whole model in one; who holds what; and processes that die."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.nn.functional as F

from minids.config import ModelConfig
from minids.data.batches import Batch
from minids.model.moe import balance_loss
from minids.model.transformer import MiniDS
from minids.parallel import pipeline
from minids.parallel.dualpipe import dualpipe, dualpipev
from minids.parallel.launch import launch
from minids.parallel.one_f_one_b import gpipe, one_f_one_b
from minids.parallel.pipeline import Pipeline
from minids.parallel.schedule import ScheduleError
from minids.parallel.schedules import SCHEDULES
from minids.parallel.zero_bubble import zb1p
from minids.training.loss import LossDenominators, losses

SHAPE = (2, 9)


def model(layers=8, **changes):
    """Balance and routing weigh enough that a mistake in them shows, and float64 leaves rounding no room."""
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, aux_loss_alpha=0.1)
    return MiniDS(ModelConfig.preset("nano", num_hidden_layers=layers, **small | changes)).double()


def data(micro_batches):
    """Micro-batches with different numbers of targets, so that a mean of means is not the mean."""
    rows = torch.randint(64, (micro_batches, SHAPE[0], SHAPE[1] + 1), generator=torch.Generator().manual_seed(1))
    tokens, targets = rows[:, :, :-1], rows[:, :, 1:].clone()
    for i, each in enumerate(targets):
        each[0, : i % 5] = -100
    return list(tokens), list(targets)


def loss_per(targets):
    count = sum((each != -100).sum() for each in targets)

    def loss(out, target):
        depths = [(out.logits, target, 1.0), *((x, target[:, k:], 0.3) for k, x in enumerate(out.mtp_logits, 1))]
        return (
            sum(
                weight * F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="sum")
                for x, labels, weight in depths
            )
            / count
        )

    return loss


def in_one_process(whole, tokens, targets):
    """Gradients, loss and loads of the whole batch at once, with no micro-batches and no stages."""
    loss = loss_per(targets)
    out = whole(torch.cat(tokens), mtp=True)
    total = loss(out, torch.cat(targets)) + sum(balance_loss(routing, whole.config) for routing in out.routings)
    total.backward()
    return (
        {name: p.grad for name, p in whole.named_parameters() if p.requires_grad},
        total.item(),
        out.tokens_per_expert,
    )


def in_a_pipeline(schedule, whole, tokens, targets, steps=1):
    """Per rank: gradients, loss, loads, spans."""

    def work(rank):
        part = Pipeline(whole, schedule, loss_per(targets), SHAPE)
        for _ in range(steps):
            result = part.step(tokens, targets)
        return {name: p.grad for name, p in part.parameters().items()}, *result

    return launch(work, len(schedule.actions))


# Equal to one process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks, dtype", [(2, torch.float32), (4, torch.float64)])
def test_equals_one_process(name, ranks, dtype):
    compare(SCHEDULES[name](ranks, 2 * ranks), model(2 * ranks).to(dtype))


def test_a_second_step_equals_one_process_too():
    compare(dualpipe(2, 6), model(4), steps=2)


# Stages and micro-batches add up the same products in another order: see sharded_experts.py.
ROUNDING = {torch.float32: 64 * 2**-24, torch.float64: 64 * 2**-53}


def compare(schedule, whole, steps=1):
    tokens, targets = data(schedule.micro_batches)
    results = in_a_pipeline(schedule, whole, tokens, targets, steps)
    expected, loss, loads = in_one_process(whole, tokens, targets)
    held = {}
    for rank, (gradients, its_loss, its_loads, spans) in enumerate(results):
        for name, gradient in gradients.items():
            tolerance = ROUNDING[gradient.dtype] * expected[name].abs().max().item()
            torch.testing.assert_close(
                gradient, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert torch.equal(held.setdefault(name, gradient), gradient), f"the copies of {name} differ"
        assert its_loss == pytest.approx(loss, rel=ROUNDING[whole.head.weight.dtype])
        assert its_loads.tolist() == loads.tolist()
        assert [span.action for span in spans] == schedule.actions[rank]
    assert held.keys() == expected.keys()


@pytest.mark.parametrize(
    "schedule, changes",
    [
        (SCHEDULES["zbv"](1, 3), {}),  # first and last stage on one rank
        (gpipe(3, 1), dict(layers=4)),  # stages of unequal size
        (dualpipe(2, 4), dict(first_k_dense_replace=8)),  # no balance loss
        (zb1p(2, 3), dict(num_nextn_predict_layers=0)),
        (dualpipe(2, 4), dict(num_nextn_predict_layers=2)),
        (dualpipev(2, 4), dict(aux_loss_alpha=0.0)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_other_models_and_sizes_equal_one_process(schedule, changes):
    compare(schedule, model(**changes))


def test_the_losses_of_training_serve_a_pipeline_as_they_are():
    schedule, whole = one_f_one_b(2, 3), model(4)
    tokens = torch.randint(64, (6, 10))
    batch = Batch(tokens, torch.ones_like(tokens).cumsum(1) // 7, torch.zeros_like(tokens))
    micro = list(batch.micro_batches(2))
    share = LossDenominators.of(batch)

    def work(rank):
        part = Pipeline(whole, schedule, lambda out, target: losses(whole, out, target, share).total(0.3), SHAPE)
        loss, _, _ = part.step([each.tokens[:, :-1] for each in micro], micro)
        return loss, {name: p.grad for name, p in part.parameters().items()}

    results = launch(work, 2)
    total = losses(whole, whole(tokens[:, :-1], mtp=True), batch, share).total(0.3)
    total.backward()
    for loss, gradients in results:
        assert loss == pytest.approx(total.item(), abs=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole.get_parameter(name).grad, atol=1e-12, rtol=0)


def test_routers_keep_an_even_load_like_those_of_the_whole_model():
    schedule, whole = dualpipe(2, 4), model()
    tokens, targets = data(4)

    def work(rank):
        part = Pipeline(whole, schedule, loss_per(targets), SHAPE)
        _, loads, _ = part.step(tokens, targets)
        for stage in part.stages:
            stage.update_balance_bias(loads, 0.25)
        return {name: p for stage in part.stages for name, p in stage.named_parameters() if name in expected}

    expected = {name: p for name, p in whole.named_parameters() if name.endswith("router.bias")}
    results = launch(work, 2)
    whole.update_balance_bias(whole(torch.cat(tokens), mtp=True).tokens_per_expert, 0.25)
    assert len(expected) == 8 and all(bias.abs().max() == 0.25 for bias in expected.values())
    for biases in results:  # in DualPipe on two ranks, each holds all
        assert biases.keys() == expected.keys()
        assert all(torch.equal(bias, expected[name]) for name, bias in biases.items())


def test_the_weight_gradient_waits_for_its_action():
    """What the schedule calls I leaves the weights of its stage alone; B and W add to them."""
    schedule, whole = dualpipe(2, 4), model(layers=4)
    tokens, targets = data(4)

    def work(rank):
        seen = []

        class Watched(pipeline._Runner):
            def _gradients(self):
                return [p.grad.clone() if p.grad is not None else None for p in self.submod.parameters()]

            def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
                before = self._gradients()
                super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
                seen.append(("B" if full_backward else "I", changed(before, self._gradients())))

            def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
                before = self._gradients()
                super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
                seen.append(("W", changed(before, self._gradients())))

        pipeline._Runner = Watched  # in this process only
        Pipeline(whole, schedule, loss_per(targets), SHAPE).step(tokens, targets)
        return seen

    for seen in launch(work, 2):
        assert {kind for kind, _ in seen} == {"B", "I", "W"}
        assert all(moved == (kind != "I") for kind, moved in seen), seen


def changed(before, after):
    return any(
        (x is None) != (y is None) or x is not None and not torch.equal(x, y)
        for x, y in zip(before, after, strict=True)
    )


# Who holds what ------------------------------------------------------------------------------------------------------


def held_by(seat, schedule, whole):
    ranks = len(schedule.actions)
    for rank in range(ranks):
        seat(rank, ranks)
        yield Pipeline(whole, schedule, loss_per([]), SHAPE).parameters()


@pytest.mark.parametrize("name", ["zbv", "dualpipe", "dualpipev"])
def test_embedding_and_head_share_a_rank_and_are_no_copies(seat, name):
    """As in V3, so that the prediction modules use the main model's own."""
    whole = model()
    for rank, held in enumerate(held_by(seat, SCHEDULES[name](4, 8), whole)):
        shared = {"embedding.weight", "head.weight", "mtp.0.proj.weight"} & held.keys()
        assert len(shared) == (3 if rank == 0 or name == "dualpipe" and rank == 3 else 0)
        assert all(held[name] is whole.get_parameter(name) for name in shared)


def test_each_rank_holds_its_layers_only(seat):
    layers = [sorted({int(name.split(".")[1]) for name in held if name.startswith("layers.")})
              for held in held_by(seat, one_f_one_b(4, 4), model(layers=7))]  # fmt: skip
    assert layers == [[0], [1, 2], [3, 4], [5, 6]]
    twice = [sorted({int(name.split(".")[1]) for name in held if name.startswith("layers.")})
             for held in held_by(seat, dualpipe(4, 8), model(layers=4))]  # fmt: skip
    assert twice == [[0, 3], [1, 2], [1, 2], [0, 3]]


# What does not fit, and what dies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, ranks, shape, text",
    [
        (gpipe(4, 4), 2, SHAPE, "processes=2: must be the 4 ranks"),
        (dualpipev(2, 4), 2, SHAPE, "num_hidden_layers=3: must be at least the 4 stages"),
        (gpipe(2, 4), 2, (2, 5000), "the context holds 4096"),
    ],
)
def test_sizes_that_do_not_fit_are_named(seat, schedule, ranks, shape, text):
    seat(0, ranks)
    with pytest.raises(ValueError, match=text):
        Pipeline(model(layers=3), schedule, loss_per([]), shape)


def test_a_schedule_that_cannot_run_is_refused(seat):
    schedule = gpipe(2, 4)
    schedule.actions[1].reverse()
    seat(0, 2)
    with pytest.raises(ScheduleError, match="before|deadlock"):
        Pipeline(model(), schedule, loss_per([]), SHAPE)


@pytest.mark.parametrize("tokens", [data(3)[0], [torch.zeros(2, 8, dtype=torch.int64)] * 4])
def test_micro_batches_of_another_number_or_shape_are_refused(seat, tokens):
    seat(0, 2)
    with pytest.raises(ValueError, match=r"must be 4 micro-batches of shape \(2, 9\)"):
        Pipeline(model(), gpipe(2, 4), loss_per([]), SHAPE).step(tokens, [None] * 4)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def broken():
    raise ArithmeticError("no loss today")


@pytest.mark.parametrize("end, text", [(killed, "SIGKILL"), (broken, "ArithmeticError: no loss today")])
def test_a_rank_that_dies_ends_the_run(end, text):
    """The last rank dies in the midst of a step, and all others wait for it."""
    tokens, targets = data(4)
    calls = []

    def loss(out, target):
        calls.append(target)
        if len(calls) == 3:
            end()
        return out.logits.sum()

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"^rank 3 failed: .*{text}$"):
        launch(lambda rank: Pipeline(model(4), one_f_one_b(4, 4), loss, SHAPE).step(tokens, targets), 4)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


def test_a_rank_that_sleeps_does_not_outlive_the_others(tmp_path):
    """Interrupted from outside, as in a notebook, the run leaves nobody."""

    def work(rank):
        if rank == 0:
            while not (tmp_path / "1").exists():
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGINT)
        (tmp_path / str(rank)).touch()
        time.sleep(60)

    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell started the tests with `&`
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(work, 2)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()
