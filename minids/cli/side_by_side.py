"""Two sides of a comparison: the same work in turn, pair by pair, as ratios with their spread.

A machine that slows down affects both sides of a pair. Work is measured in CPU seconds of this process, which on one
thread exclude the time of other processes.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minids.config import ModelConfig
from minids.interop.hf import save_pretrained
from minids.model.transformer import MiniDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=704, moe_intermediate_size=128, num_hidden_layers=6,
    num_nextn_predict_layers=0, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=96, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1, n_routed_experts=16,
    num_experts_per_tok=4, n_group=4, topk_group=2, max_position_embeddings=2048, initializer_range=None,
    aux_loss_alpha=0.0,
)  # fmt: skip


def in_transformers(model: MiniDS) -> "PreTrainedModel":
    """Return transformers' model with the same weights, and the experts implementation that trains fastest."""
    from transformers import AutoModelForCausalLM  # slow to import; only this command needs it

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        twin = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    twin.set_experts_implementation("grouped_mm")
    return twin


def compare(what: str, numerator: Callable, denominator: Callable, repeats: int, aim: str) -> dict:
    """Measure the ratio of CPU seconds, numerator over denominator, pair by pair, after one warm-up pair."""
    ratios, seconds = [], []
    for _ in range(repeats + 1):
        pair = [cpu_seconds(numerator), cpu_seconds(denominator)]
        ratios.append(pair[0] / pair[1])
        seconds.append(pair)
    return row_of(what, ratios[1:], aim) | {"cpu_seconds": seconds[1:]}


def cpu_seconds(function: Callable) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def row_of(what: str, figures: list[float], aim: str) -> dict:
    return {"what": what, "median": statistics.median(figures), "low": min(figures), "high": max(figures), "aim": aim}
