"""R1-Zero in miniature: pre-train a base model on a synthetic corpus, then reinforcement learning from rules alone."""

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from minids.config import ModelConfig
from minids.data.batches import TokenizedCorpus
from minids.model.transformer import MiniDS
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward
from minids.reasoning.tasks import CorpusStyle, Task, TaskName
from minids.reasoning.tasks.signs import judge_signs
from minids.sandbox.judge import Sandbox
from minids.training.checkpoint import load_model
from minids.training.pretrain import Recipe, TextData, Trainer
from minids.training.run import model_folder

BASE_RECIPE = Recipe(
    steps=1200, batch_size=16, seq_len=128, learning_rate=6e-3, warmup_steps=50, optimizer="muon", weight_decay=0.01,
    mtp_weight=0.0, evaluate_every=400, checkpoint_every=400,
)  # fmt: skip
"""Muon, because with AdamW the base of seed 2 does not learn a step in that time (benchmarks/r1_zero.py)."""


def base_config(vocab_size: int) -> ModelConfig:
    """Return the config of 215 thousand parameters with all parts of V3's trunk: MLA, a dense and two MoE layers."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_nextn_predict_layers=0,
        max_position_embeddings=256, initializer_range=None, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=1, moe_intermediate_size=64, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0, aux_loss_alpha=0.0,
    )  # fmt: skip


def pretraining_text(task: Task, seed: int = 0, style: CorpusStyle = CorpusStyle(), rows: int = 6000) -> TextData:  # noqa: B008 - frozen
    """Return the synthetic pre-training corpus of a task, in rows of `BASE_RECIPE.seq_len` tokens.

    Every row begins with a document, because every later prompt begins a sequence.
    """
    training = _rows(task, random.Random(f"web {seed}"), rows, style)  # "web": the seed of all stored results
    validation = _rows(task, random.Random(f"validation {seed}"), min(rows, 256), style)
    return TextData(training, validation, task.tokenizer)


def _rows(task: Task, rng: random.Random, rows: int, style: CorpusStyle) -> TokenizedCorpus:
    tokenizer, seq_len = task.tokenizer, BASE_RECIPE.seq_len
    tokens = np.zeros((rows + 1, seq_len), tokenizer.dtype)  # of the last row only the first token is used, as a target
    for row in tokens:
        documents: list[int] = []
        while len(documents) < seq_len:
            text = tokenizer.encode(task.document(rng, style), allow_special=True)
            documents += [tokenizer.bos_id, *text, tokenizer.eos_id]
        row[:] = documents[:seq_len]
    starts = np.arange(0, tokens.size, seq_len)
    return TokenizedCorpus(tokens.reshape(-1), starts, np.zeros_like(starts), (task.name,))


def base_trainer(
    task: Task,
    recipe: Recipe = BASE_RECIPE,
    style: CorpusStyle = CorpusStyle(),  # noqa: B008 - frozen
    device: str = "cpu",
) -> Trainer:
    """Return the trainer of a new base model on the corpus of its task: call `run()`, then use its `model`."""
    torch.manual_seed(recipe.seed)
    model = MiniDS(base_config(task.tokenizer.vocab_size)).to(device)
    return Trainer(model, pretraining_text(task, recipe.seed, style), recipe)


def load_base(directory: Path, task: Task) -> MiniDS:
    """Load the model of a run's newest checkpoint. Raises `ValueError` where its vocabulary is not the task's."""
    model, expected = load_model(model_folder(directory)), task.tokenizer.vocab_size
    if model.config.vocab_size != expected:
        raise ValueError(f"{directory} has vocab_size={model.config.vocab_size}: must be the task's {expected}")
    return model


def rule_reward(task: TaskName, weights: Mapping[str, float] = R1_ZERO_WEIGHTS) -> RuleReward:
    """Return the reward of a task: by comparison, by unit tests in a sandbox ("program") or by value ("signs")."""
    if task == "signs":
        return RuleReward(weights, judge_signs)
    return RuleReward(weights, None if task == "trace" else Sandbox().run_many)
