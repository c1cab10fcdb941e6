"""Layouts: how they are read, what is refused and why, what the plan says, and which rank is where in a big world."""

import dataclasses
import functools
import re
from collections import Counter

import pytest
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from training.helpers import counting_data

from minids import cost
from minids.config import ModelConfig
from minids.data.batches import Batch
from minids.model.moe import Experts
from minids.model.transformer import MiniDS
from minids.parallel.activations import activation_bytes
from minids.parallel.fsdp import axes_of
from minids.parallel.launch import launch
from minids.parallel.layout import Layout
from minids.parallel.pipeline import Pipeline, local
from minids.parallel.plan import parameters_per_rank
from minids.parallel.plan import plan as plan_of
from minids.parallel.trainer import ParallelTrainer
from minids.training.loss import LossDenominators, losses
from minids.training.pretrain import Recipe, Trainer, training_batches

NANO = ModelConfig.preset("nano", num_hidden_layers=4)
RECIPE = Recipe(batch_size=8, seq_len=32)


@pytest.mark.parametrize(
    "text, world, layout",
    [
        ("", 1, Layout()),
        ("", 8, Layout(dp=8)),
        ("ep=2", 8, Layout(ep=2, dp=4)),
        ("pp=2,ep=2,schedule=zbv", 8, Layout(pp=2, dp=2, ep=2, schedule="zbv")),
        ("dp=2", 8, Layout(dp=2)),  # refused later, with the nearest
    ],
)
def test_what_is_not_named_goes_to_the_data(text, world, layout):
    assert Layout.parse(text, world) == layout
    assert Layout.parse(str(layout), 1) == layout


@pytest.mark.parametrize(
    "text, reason",
    [
        ("tp=2", "parallel='tp=2': allows pp, dp, ep, schedule, not 'tp'"),
        ("ep", "ep='': must be a whole number"),
        ("ep=0", "ep='0': must be a whole number, at least 1"),
        ("pp=2,schedule=dualpie", "schedule='dualpie': must be one of gpipe"),
    ],
)
def test_words_that_are_no_layout_are_refused(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        Layout.parse(text, 2)


@pytest.mark.parametrize(
    "layout, world, changes, reason, nearest",
    [
        (Layout(dp=2), 4, {}, "pp * dp * ep=2: must be the 4 processes", "pp=1,dp=4,ep=1"),
        (Layout(ep=3), 3, {"batch_size": 9}, "ep=3: must divide the 8 experts", "pp=1,dp=3,ep=1"),
        (Layout(ep=16), 16, {"batch_size": 16}, "ep=16: must divide the 8 experts", "pp=1,dp=2,ep=8"),
        (Layout(pp=4), 4, {}, "must be at least the 8 stages", "pp=4,dp=1,ep=1,schedule=gpipe"),
        (Layout(pp=2, dp=2, ep=2), 8, {}, "must be at least 2 * ranks = 4", "pp=2,dp=2,ep=2,schedule=gpipe"),
        (Layout(pp=2), 2, {"micro_batch_size": 3}, "micro_batch_size=3: must divide the 8 rows", "pp=1,dp=2,ep=1"),
        (
            Layout(pp=2),
            2,
            {"mtp_weight": 0.0},
            "mtp_weight=0: must be above 0, since",
            "pp=1,dp=2,ep=1",
        ),
        (Layout(dp=8), 8, {"batch_size": 3}, "batch_size=3: must be divided evenly", None),
    ],
)
def test_an_impossible_layout_names_the_reason_and_the_nearest(layout, world, changes, reason, nearest):
    recipe = Recipe(**{"batch_size": 8, "seq_len": 32} | changes)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        layout.check(NANO, recipe, world)
    assert str(error.value).endswith(f"nearest possible: {nearest}" if nearest else "no layout is possible")
    if nearest:
        Layout.parse(nearest, world).check(NANO, recipe, world)


def test_a_schedule_that_is_not_named_fits_the_layers():
    """`--parallel pp=2` works on the presets nano (3 layers) and tiny (2), too few for two stages a rank."""
    assert Layout.parse("pp=2", 2, layers=4).schedule == "dualpipev"
    for name in ("nano", "tiny"):
        config = ModelConfig.preset(name)
        layout = Layout.parse("pp=2", 2, config.num_hidden_layers)
        assert layout.schedule == "one_f_one_b"
        layout.check(config, Recipe(), 2)
    assert Layout.parse("pp=2,schedule=zbv", 2, layers=2).schedule == "zbv"  # asked for, and refused by `check`


def test_without_experts_there_is_nothing_to_share_out():
    with pytest.raises(ValueError, match="ep=2: there are no experts; .* nearest possible: pp=1,dp=2,ep=1"):
        Layout(ep=2).check(NANO.replace(first_k_dense_replace=4, num_nextn_predict_layers=0), RECIPE, 2)


def test_the_plan_counts_what_the_cost_model_counts():
    """On one rank, all; over eight, of the experts and of the rest an eighth."""
    whole = cost.num_parameters(NANO) + cost.mtp_parameters(NANO)
    bias = 8  # of the MTP module's router
    alone = parameters_per_rank(Layout(), NANO, RECIPE)
    assert sum(alone.values()) == pytest.approx(whole, abs=bias)
    experts = parameters_per_rank(Layout(ep=4, dp=2), NANO, RECIPE)
    assert experts == {"experts": alone["experts"] // 4, "others": alone["others"]}
    plan = plan_of(Layout(ep=4, dp=2), NANO, RECIPE, "cuda")
    computed = 16 * (alone["experts"] / 8 + alone["others"] / 8)
    assert f"memory     {computed / 1e6:.2f} MB on the fullest device, computed" in plan
    assert f"plus activations: {activation_bytes(NANO, RECIPE, 1, ep=4) / 1e6:.2f} MB where" in plan
    assert "1 rows per rank" in plan and "8 processes on cuda: pp=1,dp=2,ep=4" in plan


def test_the_plan_of_a_pipeline_names_its_schedule():
    recipe = Recipe(batch_size=16, seq_len=32)
    plan = plan_of(Layout(pp=2, ep=2), NANO, recipe, "cpu")
    assert "8 rows per rank, 2 at a time" in plan and "dualpipev, 4 stages; 4 micro-batches" in plan
    timeline = Layout(pp=2, ep=2).pipeline(recipe).simulate()
    assert f"idle for {max(timeline.bubble) / timeline.makespan:.0%}" in plan


class Kept:
    """Bytes that autograd keeps while it keeps them, each storage once, and the most there ever were; no parameters."""

    def __init__(self, model):
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.users, self.now, self.peak = Counter(), 0, 0

    def __call__(self, tensor):
        return _Saved(self, tensor)

    def count(self, storage, users):
        address, before = storage.data_ptr(), self.users[storage.data_ptr()]
        self.users[address] += users
        if address not in self.weights and bool(before) != bool(self.users[address]):
            self.now += storage.nbytes() * users
            self.peak = max(self.peak, self.now)


class _Saved:
    def __init__(self, kept, tensor):
        self.kept, self.tensor = kept, tensor
        kept.count(tensor.untyped_storage(), 1)

    def __del__(self):
        self.kept.count(self.tensor.untyped_storage(), -1)


def peak(model, step):
    """Measured on this rank."""
    kept = Kept(model)
    with saved_tensors_hooks(kept, lambda saved: saved.tensor):
        step()
    return kept.peak


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_planned_activations_are_those_of_a_step(precision):
    """To the byte: two micro-batches, one after the other. Both keep the text of all 8 rows, nobody keeps the loss."""
    recipe = dataclasses.replace(RECIPE, micro_batch_size=4, precision=precision)
    trainer = Trainer(MiniDS(NANO), counting_data(), recipe)
    drawn = next(trainer.stream)
    batch = Batch(drawn.tokens.clone(), drawn.documents.clone(), drawn.domains.clone())
    measured = peak(trainer.model, lambda: trainer.backward(batch, recipe.mtp_weight))
    assert measured == activation_bytes(NANO, recipe, 4) + batch.tokens[4:].nbytes - 4


def test_planned_activations_of_shared_experts_differ_only_in_what_becomes_of_their_weights():
    """In float32 nothing is made of them; bf16 keeps a copy of 2 bytes for each of the rank's own."""
    experts = parameters_per_rank(Layout(), NANO, RECIPE)["experts"]
    for precision, copies in (("fp32", 0), ("bf16", 2 * experts * 3 // 4)):
        recipe = dataclasses.replace(RECIPE, precision=precision)
        whole, quarter = (activation_bytes(NANO, recipe, 2, ep=ep) for ep in (1, 4))
        assert copies <= whole - quarter < copies + 1000  # and shorter lists of counts


def test_planned_activations_are_those_of_a_pipeline():
    """Of the fullest rank, to 2 %; where backwards are halved, torch lets go of some of it only after the step."""
    recipe = dataclasses.replace(RECIPE, micro_batch_size=1)
    schedules = [Layout(pp=2, schedule=name).pipeline(recipe) for name in ("gpipe", "one_f_one_b", "dualpipev")]
    batches = list(next(training_batches(counting_data(), recipe)).micro_batches(1))

    def work(rank):
        return [peak(model, functools.partial(step, model, each)) for each in schedules for model in [MiniDS(NANO)]]

    def step(model, schedule):
        def loss(out, batch):
            return losses(model, out, batch, LossDenominators(1, 1)).total(recipe.mtp_weight)

        Pipeline(model, schedule, loss, (1, 32)).step([batch.tokens[:, :-1] for batch in batches], batches)

    planned = [activation_bytes(NANO, recipe, 1, schedule) for schedule in schedules]
    *whole, halved = [max(peaks) for peaks in zip(*launch(work, 2), strict=True)]
    assert whole == pytest.approx(planned[:2], rel=0.02) and planned[2] < halved < 1.25 * planned[2]


def test_v3_on_2048_ranks_as_deepseek_cut_it(seat):
    """PP16 x EP64 x DP2 (FACTS.md section 6): the ranks of an expert group are neighbours, those of a pipeline far."""
    layout, recipe = Layout(pp=16, ep=64, dp=2), Recipe(batch_size=15360, seq_len=4096)
    layout.check(ModelConfig.preset("v3"), recipe, 2048)
    for rank in (0, 37, 2047):
        seat(rank, 2048)
        axes = axes_of(layout, "cpu")
        assert [axis.size() for axis in axes] == [16, 2, 64, 128]
        at = [axis.get_local_rank() for axis in axes[:3]]
        assert at == [rank // 128, rank // 64 % 2, rank % 64] and axes.data.get_local_rank() == rank % 128
        assert dist.get_process_group_ranks(axes.ep.get_group()) == list(range(rank - rank % 64, rank - rank % 64 + 64))
        assert dist.get_process_group_ranks(axes.pp.get_group()) == list(range(rank % 128, 2048, 128))


@pytest.mark.parametrize("text, world", [("dp=4", 4), ("dp=2,ep=2", 4), ("pp=2,ep=2", 4), ("pp=2,dp=4", 8)])
def test_what_a_rank_holds_is_what_the_plan_said(seat, text, world):
    """Counted on every rank: the fullest holds the planned number; all together hold the model, without duplicates."""
    layout, config = Layout.parse(text, world), ModelConfig.preset("nano", num_hidden_layers=4)
    recipe = Recipe(batch_size=16, seq_len=32)
    held, names = [], set()
    for rank in range(world):
        seat(rank, world)
        each = ParallelTrainer(MiniDS(config), counting_data(), recipe, layout)
        mine = {n: p for n, p in each.model.named_parameters() if p.requires_grad}
        held.append(sum(local(p).numel() for p in mine.values()))
        names |= mine.keys()
        in_experts = {p for m in each.model.modules() if isinstance(m, Experts) for p in m.parameters()}
        assert all(local(p).numel() * layout.replicas == p.numel() for p in in_experts if not p.is_meta)
    whole = MiniDS(config)
    trained = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert names == trained.keys()
    assert sum(held) == sum(p.numel() for p in trained.values())
    count = parameters_per_rank(layout, config, recipe)
    biases = sum(router.bias.numel() for router in whole.routers())
    planned = count["experts"] / layout.dp + count["others"] / layout.replicas
    assert max(held) <= planned <= max(held) + biases


def test_an_axis_must_be_at_least_one():
    with pytest.raises(ValueError, match="dp=0: must be a whole number, at least 1"):
        Layout(dp=0)
