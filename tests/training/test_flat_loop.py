"""The loop of examples/training_loop.py takes the steps that `Trainer` takes."""

import copy
import dataclasses
import importlib.util

import pytest
import torch
from training.helpers import RECIPE, counting_data, nano

from minids.course.notebooks import ROOT
from minids.training.pretrain import Trainer


def example():
    spec = importlib.util.spec_from_file_location("training_loop", ROOT / "examples/training_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 1, "optimizer": "muon", "moments": "bf16"}])
def test_the_flat_loop_equals_the_trainer_step_by_step(changes):
    """Bit for bit: the same operations in the same order, to the end of the schedule."""
    recipe, model = dataclasses.replace(RECIPE, **changes), nano()
    trainer = Trainer(copy.deepcopy(model), counting_data(), recipe)
    for measured in example().training_loop(model, counting_data(), recipe):
        expected = trainer.train_step()
        assert measured == {name: expected[name] for name in measured}
    assert trainer.step == recipe.steps
    for ours, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
