"""MHA, GQA, MQA and MLA at equal parameters and equal tokens, with two controls: the runs behind chapters/02_mla.ipynb.

    python benchmarks/attention.py      six models, three seeds each: ten minutes of one core

A seed decides the first weights and the order of the text, the same for all models. The controls take MLA apart: one
has no query latent, the other also has a KV latent as wide as the residual stream, so that nothing is compressed.
Results go to benchmarks/results/attention.json, with the command, the configs, the recipe and versions; with
`--variants` only some models are trained, and the results of the others stay in the file.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict, replace
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
    "MLA, full query": LATENT.replace(q_lora_rank=None, intermediate_size=112),
    "MLA, full query, latent 64": LATENT.replace(q_lora_rank=None, kv_lora_rank=64, intermediate_size=59),
}
RECIPE = Recipe(
    steps=400, batch_size=8, seq_len=128, learning_rate=0.02, warmup_steps=5,
    optimizer="muon", mtp_weight=0.0, evaluate_every=20, evaluation_batches=8,
)  # fmt: skip


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments or None)
    torch.set_num_threads(1)
    chosen = {name: VARIANTS[name] for name in options.variants}
    outcome = trials(chosen, builtin_text(), replace(RECIPE, steps=options.steps), options.seeds)
    checks = {
        name: [
            {m["step"]: round(m["validation_bits_per_byte"], 4) for m in run.metrics if "validation_bits_per_byte" in m}
            for run in runs
        ]
        for name, runs in outcome.items()
    }
    kept = json.loads(options.results.read_text()) if len(chosen) < len(VARIANTS) and options.results.exists() else {}
    command = " ".join(["python", *sys.argv])
    results = {
        "command": kept.get("command", command),
        "added_by": command if kept else None,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()},
        "seeds": options.seeds,
        "recipe": asdict(replace(RECIPE, steps=options.steps)),
        "configs": kept.get("configs", {}) | {name: config.to_dict() for name, config in chosen.items()},
        "validation_bits_per_byte": kept.get("validation_bits_per_byte", {}) | checks,
    }
    atomic_write_text(options.results, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
