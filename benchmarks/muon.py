"""AdamW against Muon on a small mixture of experts, and QK-Clip on a run whose attention logits grow.

    python benchmarks/muon.py optimizers   four optimizers, three learning rates, three seeds: 90 CPU seconds
    python benchmarks/muon.py qk_clip      two runs a seed, three seeds: 45 CPU seconds

`optimizers`: AdamW; torch's Muon for the plain matrices with AdamW for the experts; V4's Muon, which takes the experts
too; and V4's with the usual five Newton-Schulz steps. Each gets its best of three learning rates (seed 0), then two
more seeds. A learning rate at the end of the range would be unfair to that optimizer: the JSON holds all of them.
`qk_clip` trains with V4's Muon, a learning rate that is too high and no weight decay, with and without the clip, and
reports the largest attention logit of each step. Results go to benchmarks/results/muon_*.json.
"""

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import torch

from minids.config import ModelConfig
from minids.course.experiment import builtin_text, record, trial
from minids.training import optimizer as optimizers_file
from minids.training.muon import FAST, Muon
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
MODEL = ModelConfig.preset("nano", num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)
RECIPE = Recipe(
    steps=80, batch_size=8, seq_len=128, warmup_steps=10, mtp_weight=0.0, evaluate_every=80, evaluation_batches=16
)
RATES = (0.005, 0.01, 0.02)
KINDS = {"AdamW": "adamw", "Muon, experts by AdamW": "muon", "V4's Muon": "muon_v4", "V4's Muon, 5 steps": "muon_v4"}
CLIP = replace(RECIPE, steps=100, optimizer="muon_v4", learning_rate=0.06, weight_decay=0.0, evaluate_every=100)
THRESHOLD = 30.0


def five_steps(params, **options) -> Muon:
    """V4's Muon with the usual five Newton-Schulz steps."""
    return Muon(params, steps=(FAST,) * 5, **options)


def optimizers() -> None:
    """Bits per byte of held-out text: by learning rate with the first seed, by seed with the best learning rate."""
    data, found = builtin_text(), {}
    for name, kind in KINDS.items():
        with patch.object(optimizers_file, "Muon", five_steps if "5" in name else Muon):

            def bits(rate: float, seed: int, kind: str = kind) -> float:
                recipe = replace(RECIPE, optimizer=kind, learning_rate=rate, seed=seed)
                return trial(MODEL, data, recipe).validation

            by_rate = {rate: bits(rate, SEEDS[0]) for rate in RATES}
            best = min(by_rate, key=by_rate.__getitem__)
            by_seed = [by_rate[best], *(bits(best, seed) for seed in SEEDS[1:])]
        found[name] = {"by_rate": by_rate, "best_rate": best, "by_seed": by_seed}
        spread = f"{statistics.mean(by_seed):.3f} +- {statistics.stdev(by_seed):.3f}"
        print(f"{name}: {spread} at {best}; by learning rate {by_rate}", flush=True)
    record(
        RESULTS / "muon_optimizers.json", seeds=SEEDS, recipe=asdict(RECIPE), config=MODEL.to_dict(),
        validation_bits_per_byte=found,
    )  # fmt: skip


def qk_clip() -> None:
    """The largest attention logit of each step, and bits per byte at the end."""
    data, found = builtin_text(), {}
    for name, threshold in (("observed only", 1e9), (f"clipped at {THRESHOLD:g}", THRESHOLD)):
        rows = []
        for seed in SEEDS:
            run = trial(MODEL, data, replace(CLIP, qk_clip=threshold, seed=seed))
            logits = [m["max_attention_logit"] for m in run.metrics]
            rows.append({"max_attention_logit": logits, "bits_per_byte": run.validation})
            print(
                f"{name}, seed {seed}: largest logit {max(logits):.1f}, bits per byte {run.validation:.3f}", flush=True
            )
        found[name] = rows
    record(RESULTS / "muon_qk_clip.json", seeds=SEEDS, recipe=asdict(CLIP), config=MODEL.to_dict(), runs=found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("optimizers", "qk_clip"))
    {"optimizers": optimizers, "qk_clip": qk_clip}[parser.parse_args().which]()
