"""Micro-batches that take turns: the same values, and one computes while the other waits for its all-to-all."""

import time

import pytest
import torch
from sharded_experts import build, close, sharded, whole_gradients

from minids.course.turns import Stretch, draw_turns, length, over_slow_link, take_turns
from minids.model.moe import MoE
from minids.parallel.expert_parallel import AS_IS
from minids.parallel.launch import launch


def test_taking_turns_changes_no_number_and_hides_the_waiting():
    """Forward and backward, each exchange 20 ms on its way and each block 30 ms of work. One alone waits for all."""
    model = build()
    halves = torch.randint(64, (2, 2, 9))

    def work(rank):
        mine = sharded(model, 2, AS_IS, over_slow_link(0.02))
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
            close(together[1][name], gradient, name)
        ordered = sorted(together[2], key=lambda s: s.start)
        computing = [s.work for s in ordered if s.what == "compute"]
        both = computing[: -next(i for i, work in enumerate(reversed(computing)) if work != computing[-1])]
        assert all(a != b for a, b in zip(both, both[1:], strict=False)), "one computes while the other waits"
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


def test_a_chart_of_turns_has_a_bar_for_each_interval():
    run = [(0, Stretch(0, "compute", 0.0, 0.003)), (1, Stretch(1, "wait", 0.003, 0.005))]
    figure = draw_turns({"one": run, "other": run[:1]}, "a title")
    bars = figure.axes[0].patches
    assert [(round(bar.get_x(), 6), round(bar.get_width(), 6)) for bar in bars] == [(0, 3), (3, 2), (0, 3)]
    assert length([stretch for _, stretch in run]) == 0.005
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["micro-batch 0", "micro-batch 1", "waiting"]
