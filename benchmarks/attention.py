"""MHA, GQA, MQA and MLA at equal parameters and equal tokens: the longer runs behind chapters/02_mla.ipynb.

    python benchmarks/attention.py      four models, three seeds each: six minutes of one core

The chapter trains the same models for 60 steps. A seed decides the first weights and the order of the text, the same
for all four. Results go to benchmarks/results/attention.json, with the command, the configs, the recipe and versions.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from minids.config import ModelConfig
from minids.course.experiment import builtin_text, trials
from minids.files import atomic_write_text
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results" / "attention.json"
SEEDS = (0, 1, 2)
LATENT = ModelConfig.preset(
    "nano", num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0,
    num_attention_heads=8, num_key_value_heads=8, qk_rope_head_dim=16, rope_theta=100.0, intermediate_size=144,
)  # fmt: skip
GROUPED = LATENT.replace(attention="gqa", intermediate_size=128)
VARIANTS = {
    "MHA": GROUPED,
    "GQA": GROUPED.replace(num_key_value_heads=2, intermediate_size=192),
    "MQA": GROUPED.replace(num_key_value_heads=1, intermediate_size=203),
    "MLA": LATENT,
}
RECIPE = Recipe(
    steps=400, batch_size=8, seq_len=128, learning_rate=0.02, warmup_steps=5,
    optimizer="muon", mtp_weight=0.0, evaluate_every=20, evaluation_batches=8,
)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    outcome = trials(VARIANTS, builtin_text(), RECIPE, SEEDS)
    checks = {
        name: [
            {m["step"]: round(m["validation_bits_per_byte"], 4) for m in run.metrics if "validation_bits_per_byte" in m}
            for run in runs
        ]
        for name, runs in outcome.items()
    }
    results = {
        "command": "python benchmarks/attention.py",
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()},
        "seeds": SEEDS,
        "recipe": asdict(RECIPE),
        "configs": {name: config.to_dict() for name, config in VARIANTS.items()},
        "validation_bits_per_byte": checks,
    }
    atomic_write_text(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
