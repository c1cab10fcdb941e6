"""Training on many processes with the logits in chunks.

The head is applied after the sharded model has returned, and again in the backward pass.
"""

import dataclasses

import pytest
from parallel.test_layout import NANO, peak
from parallel.test_trainer import LAYOUTS, WANTED, assert_same_course, course, trainer
from training.helpers import counting_data

from minids.data.batches import Batch
from minids.model.transformer import MiniDS
from minids.parallel.activations import activation_bytes
from minids.parallel.launch import launch
from minids.training import chunked_loss
from minids.training.pretrain import Trainer

STEPS = 3


def in_chunks_of(mp, positions):
    mp.setattr(chunked_loss, "LOGITS", 1)
    mp.setattr(chunked_loss, "POSITIONS", positions)


@pytest.mark.parametrize("text", ["dp=2", "ep=2", "pp=2", "pp=2,ep=2"])
def test_steps_in_chunks_equal_those_of_one_process_without(monkeypatch, text):
    """Seven positions at a time: neither the rows of a rank nor the depths of MTP are multiples."""
    layers = 4 if "pp" in text else 2
    recipe = dataclasses.replace(WANTED, micro_batch_size=None if "pp" in text else 2)
    expected = course(trainer("", 1, recipe, layers=layers), STEPS)
    in_chunks_of(monkeypatch, 7)
    for result in launch(
        lambda rank: course(trainer(text, LAYOUTS[text], recipe, layers=layers), STEPS), LAYOUTS[text]
    ):
        assert_same_course(result, expected)


def test_planned_activations_are_without_logits(monkeypatch):
    """To the byte those of a step, of which only the text of the batch and the loss are not planned."""
    recipe = dataclasses.replace(WANTED, batch_size=4, seq_len=32)
    whole = activation_bytes(NANO, recipe, 4)
    in_chunks_of(monkeypatch, 7)
    planned = activation_bytes(NANO, recipe, 4)
    alone = Trainer(MiniDS(NANO), counting_data(), recipe)
    drawn = next(alone.stream)
    batch = Batch(drawn.tokens.clone(), drawn.documents.clone(), drawn.domains.clone())
    assert peak(alone.model, lambda: alone.backward(batch, recipe.mtp_weight)) == planned - 4
    logits = 4 * NANO.vocab_size * (4 * 32 + 4 * 31)
    assert logits <= whole - planned <= 2 * logits
