"""Reinforcement learning of a model with sparse attention: sampling from the cache and training choose equal tokens."""

import dataclasses

import torch
from small_reasoner import RECIPE, TASK, TOKENIZER, evens

from minids.model.transformer import MiniDS
from minids.reasoning import r1_zero
from minids.reasoning.trainer import RLTrainer


def test_a_step_of_rl_finds_equal_log_probabilities():
    """With 2 index heads, so scores of 0 tie. RL has no loss for the indexers, which therefore stay as they are."""
    torch.manual_seed(0)
    config = r1_zero.base_config(TOKENIZER.vocab_size).replace(
        hidden_size=32, moe_intermediate_size=32, num_hidden_layers=2, q_lora_rank=16, index_topk=5, index_n_heads=2,
        index_head_dim=32,
    )  # fmt: skip
    model = MiniDS(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = RLTrainer(model, TOKENIZER, TASK, evens, dataclasses.replace(RECIPE, steps=2, group_size=8))
    metrics = [trainer.train_step() for _ in range(2)]  # raises LogpMismatch where they differ
    assert all(m["logp_gap"] < 1e-4 for m in metrics)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in before if ".indexer." in name} <= same
    assert "layers.0.attention.o_proj.weight" not in same
