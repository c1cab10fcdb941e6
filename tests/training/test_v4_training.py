"""A whole tiny V4 in the trainer: attention, streams and hash routing learn; the warm-up trains the indexers alone."""

import dataclasses

import pytest
import torch
from training.helpers import RECIPE, counting_data, nano

from minids.training.pretrain import train

V4 = dict(
    num_nextn_predict_layers=0, attention="csa", layer_types=("csa", "hca"), sliding_window=4, csa_block=2, hca_block=4,
    index_topk=2, index_n_heads=16, index_head_dim=8, o_groups=2, o_lora_rank=16, hc_mult=2, first_k_dense_replace=0,
    num_hash_layers=1,
)  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon_v4"])
def test_the_losses_fall_and_the_tables_stay(optimizer):
    model = nano(**V4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = dataclasses.replace(RECIPE, steps=15, optimizer=optimizer, learning_rate=1e-2)
    history = train(model, counting_data(), recipe, progress=False)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert history[-1]["indexer_loss"] < history[0]["indexer_loss"]
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {"hash_routing.tables"}


def test_the_warm_up_changes_the_indexers_and_nothing_else():
    model = nano(**V4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, counting_data(), dataclasses.replace(RECIPE, steps=3, index_stage="dense_warmup"), progress=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".indexer." in name}
