"""Estimates of steps that nobody can run here: against published numbers, hand calculations and what torch shards."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from minids import cost
from minids.config import ModelConfig
from minids.model.transformer import MiniDS
from minids.parallel.activation_cost import kept_bytes, kept_bytes_per_token
from minids.parallel.estimate import Cluster, link_seconds, memory_bytes, step_seconds
from minids.parallel.fsdp import axes_of, shard
from minids.parallel.launch import launch, one_of_many
from minids.parallel.layout import Layout
from minids.parallel.pipeline import local, stages_of_rank
from minids.parallel.plan import parameters_per_rank, plan
from minids.training.pretrain import Recipe

V3 = ModelConfig.preset("v3")
BIG = Recipe(batch_size=15360, seq_len=4096, micro_batch_size=1, moments="bf16", precision="fp8")
AS_DEEPSEEK = Layout(pp=16, dp=2, ep=64)
AT_PEAK = 15360 * 4096 / 2048 * cost.training_flops_per_token(V3, 4096) / cost.H800_PEAK_FLOPS  # seconds
CLUSTER = Cluster(utilisation=AT_PEAK / (19.926 - 2.06 - 0.29))  # ISCA Table 4: without bubble and optimizer


def test_kept_bytes_of_v3_add_up_by_hand():
    """Values per token of a mixture-of-experts layer, from V3's config (V3 section 4.2)."""
    d, heads, inner = 7168, 128, 9 * 2048
    everything = 2 * (2 * d + (2 * d + 2048) + 2112 + heads * (192 + 192 + 128) + heads * 128 + 8 * d + 3 * inner)
    assert sum(kept_bytes_per_token(V3).values()) == everything
    as_v3 = 2 * 2 * d + 2 * 2112 + 1.5 * heads * 128 + 8 * d + 2 * inner
    assert sum(kept_bytes_per_token(V3, as_v3=True).values()) == as_v3
    assert as_v3 / everything == pytest.approx(1 / 3, abs=0.01)
    assert kept_bytes_per_token(V3, dense=True)["gate and up"] == 2 * 2 * 18432


def test_kept_bytes_of_a_pipeline_live_as_long_as_its_schedule_says():
    """DualPipeV keeps the activations of 2 PP + 1 = 33 stages, on the fullest rank of two layers each."""
    schedule = AS_DEEPSEEK.pipeline(BIG)
    one_layer = 4096 * sum(kept_bytes_per_token(V3, as_v3=True).values())
    assert kept_bytes(V3, 4096, schedule, as_v3=True) == pytest.approx(33 * 2 * one_layer)
    alone = kept_bytes(V3, 4096, None, as_v3=True)
    dense = 4096 * sum(kept_bytes_per_token(V3, dense=True, as_v3=True).values())
    assert alone == pytest.approx(58 * one_layer + 3 * dense)


def test_kept_bytes_of_other_attention_are_refused():
    with pytest.raises(ValueError, match="attention='gqa': the formula is that of mla"):
        kept_bytes_per_token(V3.replace(attention="gqa"))


def test_step_of_v3_is_below_the_published_one_by_less_than_a_tenth():
    """19.926 s, of it 2.06 s bubble (ISCA Table 4). The computation was fitted to it; the bubble is shorter."""
    parts = step_seconds(V3, AS_DEEPSEEK, BIG, CLUSTER)
    assert parts["computation"] == pytest.approx(17.576)
    assert parts["bubble"] < 2.06 and parts["experts, exposed"] == 0
    assert 0.9 * 19.926 < sum(parts.values()) < 19.926


def test_bubble_is_the_share_that_the_schedule_leaves_idle():
    parts, timeline = step_seconds(V3, AS_DEEPSEEK, BIG, CLUSTER), AS_DEEPSEEK.pipeline(BIG).simulate()
    idle = max(timeline.bubble) / timeline.makespan
    assert parts["bubble"] / (parts["bubble"] + parts["computation"]) == pytest.approx(idle)


def test_links_of_v3_by_hand():
    """One GPU of 2048: 480 K tokens, 58 layers over 16 stages, 4 nodes, 3 bytes, there and back in both passes."""
    seconds = link_seconds(V3, AS_DEEPSEEK, BIG, CLUSTER)
    tokens = 15360 * 4096 / 128
    assert seconds["experts"] == pytest.approx(tokens * 58 / 16 * 4 * 3 * 7168 * 2 / 50e9)
    assert seconds["stages"] == pytest.approx(tokens * 7168 * 2 * 4 / 50e9)


def test_links_within_a_node_are_nvlink_and_all_experts_cross_it():
    seconds = link_seconds(V3, Layout(pp=8, ep=8), BIG, CLUSTER)
    assert seconds["experts"] == pytest.approx(15360 * 4096 / 8 * 58 / 8 * 7 * 3 * 7168 * 2 / 160e9)


def test_exchange_with_experts_is_exposed_only_without_a_pipeline():
    flat = step_seconds(V3, Layout(ep=64), BIG, CLUSTER)
    assert flat["bubble"] == 0 and flat["experts, exposed"] > 100


def test_impossible_layouts_have_no_step():
    with pytest.raises(ValueError, match="ep=3: must divide the 8 experts"):
        step_seconds(ModelConfig.preset("nano"), Layout(ep=3), Recipe(batch_size=9, seq_len=32), CLUSTER)


def test_memory_of_v3_fits_with_recomputation_and_fewer_bits():
    """Into 80 GB on 2048 GPUs; the states are those of the cost model."""
    kept, whole = (memory_bytes(V3, AS_DEEPSEEK, BIG, as_v3=as_v3) for as_v3 in (True, False))
    assert sum(kept.values()) < 80e9 < sum(whole.values())
    count = parameters_per_rank(AS_DEEPSEEK, V3, BIG)
    assert kept["weights"] == 2 * sum(count.values())
    assert kept["optimizer"] == 8 * (count["experts"] / 2 + count["others"] / 128)


def test_plan_in_fp8_names_what_recomputation_would_leave():
    nano = ModelConfig.preset("nano")
    recipe = Recipe(batch_size=8, seq_len=32, micro_batch_size=2, precision="fp8")
    recomputed = f"{kept_bytes(nano, 64, None, as_v3=True) / 1e6:.2f} MB (a formula; not built here)"
    assert recomputed in plan(Layout(), nano, recipe, "cpu")
    assert "recompute" not in plan(Layout(), nano, replace(recipe, precision="bf16"), "cpu")


@pytest.mark.parametrize("rank", [0, 1337])
def test_v3_is_sharded_for_one_of_2048_ranks_without_memory(rank):
    with torch.device("meta"):
        model = MiniDS(V3)
    with one_of_many(rank, 2048):
        axes = axes_of(AS_DEEPSEEK, "cpu")
        stages = stages_of_rank(model, axes.pp.get_local_rank(), AS_DEEPSEEK.pipeline(BIG))
        shard(stages, axes)
        held = sum(local(p).numel() for p in {p for each in stages for p in each.parameters() if p.requires_grad})
    count = parameters_per_rank(AS_DEEPSEEK, V3, BIG)  # of rank 0's stages, the fullest
    planned = count["experts"] / 2 + count["others"] / 128
    assert held == pytest.approx(planned, rel=1e-3) if rank == 0 else held < planned


def test_ranks_that_do_not_exist_leave_nothing_behind():
    """Uneven shards: torch's cache would give both real ranks the shape that rank 1 has."""

    def viewed(rank):
        mesh = init_device_mesh("cpu", (2,))
        sharded = distribute_tensor(torch.arange(5.0), mesh, [Shard(0)], src_data_rank=None)
        return tuple(sharded.view(5, 1).to_local().shape)

    with one_of_many(1, 2):
        assert viewed(1) == (2, 1)
    assert not dist.is_initialized()
    assert launch(viewed, 2) == [(3, 1), (2, 1)]
