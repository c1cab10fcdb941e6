"""What the drawings of chapters 06 to 11 say is what the package computes."""

import pytest
import torch

from minids.config import ModelConfig
from minids.course.drawings.dispatch import EXPERTS, GPUS, dispatch
from minids.course.drawings.fp8_flow import fp8_flow
from minids.course.drawings.fp8_tiles import fp8_retile, fp8_tiles
from minids.course.drawings.mesh import mesh
from minids.course.drawings.pipeline import bubble, dual, fold
from minids.course.drawings.r1_stages import distillation, r1_stages
from minids.course.drawings.rl_loop import ppo_and_grpo, rl_loop
from minids.course.drawings.training import packing
from minids.course.exercises.chapter05 import pack
from minids.course.overlap import overlap
from minids.fp8.linear import ALONG_CHANNELS, ALONG_TOKENS, BLOCK
from minids.parallel.dualpipe import dualpipe
from minids.parallel.layout import Layout
from minids.parallel.one_f_one_b import gpipe
from minids.reasoning.grpo import group_advantages


@pytest.mark.parametrize("rewards", [(0, 1, 0, 0), (1, 1, 0)])
def test_rl_loop_shows_the_advantages_of_its_rewards(rewards):
    expected = group_advantages(torch.tensor([rewards], dtype=torch.float64))[0]
    boxes = rl_loop(rewards).boxes
    for i, (reward, advantage) in enumerate(zip(rewards, expected.tolist(), strict=True), start=1):
        assert (boxes[f"r{i}"].label, boxes[f"A{i}"].label) == (f"{reward}", f"{advantage:+.1f}")


def test_critic_is_as_large_as_the_policy_of_the_config():
    assert ppo_and_grpo().boxes["critic"].shape == "trained, 671B"
    assert ppo_and_grpo(ModelConfig.preset("v2")).boxes["critic"].shape == "trained, 236B"


def test_bubble_draws_every_pass_where_the_simulation_has_it():
    drawing, timeline = bubble(3, 5), gpipe(3, 5).simulate()
    assert len(drawing.boxes) == sum(map(len, timeline.spans))
    assert f"idle for {timeline.bubble[0]:g} of {timeline.makespan:g}" in drawing.title
    widths = {box.label[0]: box.width for box in drawing.boxes.values()}
    assert widths["B"] == pytest.approx(2 * widths["F"])


def test_dual_draws_every_pass_of_dualpipe_and_the_components_of_one_pair():
    boxes, timeline, pair = dual(2, 4).boxes, dualpipe(2, 4).simulate(), overlap("FB", layers=1)
    parts = [f"{rank} {part}" for rank, spans in enumerate(timeline.spans) for s in spans for part in s.action.parts]
    blocks = {block.action: block for block in pair.compute + pair.communication}
    assert set(boxes) == {*parts, *(f"pair {name}" for name in blocks)}
    unit = boxes["pair MLP W"].width / (blocks["MLP W"].end - blocks["MLP W"].start)
    for name, block in blocks.items():
        assert boxes[f"pair {name}"].width == pytest.approx(unit * (block.end - block.start))


def test_fold_holds_each_stage_twice_in_dualpipe_and_once_in_dualpipev():
    boxes = fold(4).boxes
    for form, times in (("both", 2), ("down", 1), ("up", 1)):
        held = [box.label for name, box in boxes.items() if name.startswith(form)]
        assert all(held.count(label) == times for label in held)


def test_dispatch_names_experts_on_the_gpu_that_holds_them():
    config, boxes = ModelConfig.preset("v3"), dispatch().boxes
    experts = {name: box for name, box in boxes.items() if name.startswith("expert")}
    assert len(experts) == config.num_experts_per_tok
    for name, box in experts.items():
        gpu, expert, node = int(box.label.split()[1]), int(box.shape.split()[1]), int(name.split()[1]) + 1
        assert divmod(expert // EXPERTS, GPUS) == (node, gpu) and expert < config.n_routed_experts


@pytest.mark.parametrize("layout", [Layout(2, 2, 2), Layout(2, 1, 4)])
def test_mesh_marks_the_ranks_that_hold_what_rank_0_holds(layout):
    boxes = mesh(layout).boxes
    marked = {part: [n for n, box in boxes.items() if n.endswith(part) and box.role == "here"]
              for part in ("experts", "others", "states")}  # fmt: skip
    assert [len(names) for names in marked.values()] == [layout.dp, layout.replicas, 0]
    assert len(boxes) == 3 * layout.world


def test_tiles_are_counted_from_the_config():
    notes = " ".join(fp8_tiles(ModelConfig.preset("v2")).notes)
    assert "40 tiles" in notes and "12 blocks" in notes


def test_fp8_flow_has_the_shapes_of_the_config_and_the_precisions_of_v3():
    boxes = fp8_flow(ModelConfig.preset("v2")).boxes
    assert boxes["Fprop X"].shape == "BF16 T×5120" and boxes["Fprop W"].shape == "FP32 1536×5120"
    assert [boxes[f"{p} result"].shape for p in ("Fprop", "Dgrad", "Wgrad")] == [
        "BF16 T×1536", "BF16 T×5120", "FP32 1536×5120",
    ]  # fmt: skip
    assert all(boxes[f"{p} sum"].label == "sum in FP32" for p in ("Fprop", "Dgrad", "Wgrad"))


def test_tiles_in_the_flow_are_those_of_the_layer():
    boxes, row, column = fp8_flow().boxes, "tiles 1×128", "tiles 128×1"
    assert (ALONG_CHANNELS, ALONG_TOKENS, BLOCK) == ((1, 128), (128, 1), (128, 128))
    assert [boxes[name].shape for name in ("Fprop X FP8", "Dgrad ∂Y FP8", "Wgrad ∂Y FP8", "Wgrad X FP8")] == [
        row, row, column, column,
    ]  # fmt: skip
    assert [box.label for box in fp8_retile().boxes.values()][0] == "multiply by the scale"


def test_r1_scores_agree_between_the_two_drawings():
    assert r1_stages().boxes["R1"].shape == distillation().boxes["R1"].shape == "AIME 79.8"


@pytest.mark.parametrize("lengths, seq_len", [((3, 1, 3), 4), ((2, 5), 3)])
def test_packing_draws_the_rows_and_labels_of_the_exercise(lengths, seq_len):
    boxes, values = packing(lengths, seq_len).boxes, iter(range(1, 99))
    documents = [[100, *(next(values) for _ in range(length)), 101] for length in lengths]
    drawn = {"bos": 100, "eos": 101, "−100": -100}
    for part, expected in zip(("input", "label"), pack(documents, seq_len, 0), strict=True):
        for r, row in enumerate(expected.tolist()):
            labels = [boxes[f"{part} {r} {j}"].label for j in range(seq_len)]
            assert [drawn[label] if label in drawn else int(label) for label in labels] == row
