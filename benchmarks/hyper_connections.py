"""What the constraint of hyper-connections does: the gain of many mixings, and a deep small model with and without it.

    python benchmarks/hyper_connections.py gain       seconds
    python benchmarks/hyper_connections.py training   three variants, three seeds each: two minutes of one core

`gain` multiplies the mixing matrices of 60 sites, drawn at random, and reports the largest sum of absolute values in a
row or column of the product (by what factor a stream can grow, forward or backward), and the smallest column sum (what
the largest alone hides: attenuation). `training` compares one residual stream, four that are mixed freely, and four
with the constraint; it also reports the gain of the trained models' own matrices. A model of 6 layers and 64 channels
cannot show the instability that was reported for 27 billion parameters; it shows what the streams cost and that they
train. Results go to benchmarks/results/hyper_connections_*.json.
"""

import argparse
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minids.config import ModelConfig
from minids.course.experiment import builtin_text, record, trial
from minids.data.batches import evaluation_batches
from minids.model.hyper_connections import HyperBlock, sinkhorn
from minids.model.transformer import MiniDS
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
SITES, DRAWS = 60, 50
MODEL = ModelConfig.preset("nano", num_hidden_layers=6, first_k_dense_replace=6, num_nextn_predict_layers=0)
VARIANTS = {
    "one stream": MODEL,
    "free mixing": MODEL.replace(hc_mult=4, hc_sinkhorn_iters=0),
    "doubly stochastic": MODEL.replace(hc_mult=4),
}
RECIPE = Recipe(
    steps=60, batch_size=8, seq_len=128, learning_rate=0.01, warmup_steps=10, mtp_weight=0.0, evaluate_every=60,
    evaluation_batches=16,
)  # fmt: skip


def gains(product: torch.Tensor) -> tuple[float, float]:
    """Largest sum of absolute values in a row or column, and smallest in a column, of matrices [*, n, n]."""
    size = product.abs()
    largest = torch.maximum(size.sum(-1).amax(-1), size.sum(-2).amax(-1))
    return largest.max().item(), size.sum(-2).amin().item()


def gain() -> None:
    """Products of random mixing matrices: of Sinkhorn after 1 to 100 iterations, and of identity plus noise."""
    torch.set_default_dtype(torch.float64)
    found: dict[str, dict] = {}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        for spread in (1.0, 4.0, 12.0):  # of the logits; 12 gives nearly permutations
            base = spread * torch.randn(DRAWS, 1, 4, 4, generator=generator)
            logits = base + 0.3 * spread * torch.randn(DRAWS, SITES, 4, 4, generator=generator)
            for iterations in (1, 5, 20, 100):
                product = torch.eye(4).expand(DRAWS, 4, 4)
                for mix in sinkhorn(logits, iterations, 0.0).unbind(1):
                    product = mix.mT @ product
                found.setdefault(f"spread {spread:g}, {iterations} iterations", {})[seed] = gains(product)
        product = torch.eye(4).expand(DRAWS, 4, 4)
        for noise in torch.randn(DRAWS, SITES, 4, 4, generator=generator).unbind(1):
            product = (torch.eye(4) + 0.1 * noise) @ product
        found.setdefault("identity + 0.1 noise", {})[seed] = gains(product)
    for name, by_seed in found.items():
        largest, smallest = zip(*by_seed.values(), strict=True)
        print(f"{name:28} largest {max(largest):8.3f}, smallest column sum {min(smallest):8.3f}")
    record(
        RESULTS / "hyper_connections_gain.json", seeds=SEEDS, sites=SITES, draws=DRAWS,
        largest_and_smallest_sum={name: list(by_seed.values()) for name, by_seed in found.items()},
    )  # fmt: skip


@torch.no_grad()
def trained_gains(model: MiniDS, data) -> tuple[float, float] | None:
    """Gain of the product of all sites' matrices, for the tokens of one batch of held-out text."""
    blocks = [block for block in model.layers if isinstance(block, HyperBlock)]
    mixes: list[torch.Tensor] = []
    for block in blocks:
        for connection in (block.attention_connection, block.ffn_connection):
            original = connection.coefficients
            connection.coefficients = lambda x, original=original: mixes.append(original(x).mix.mT) or original(x)
    (batch,) = evaluation_batches(data.validation, batch_size=8, seq_len=RECIPE.seq_len, max_batches=1)
    model(batch.tokens[:, :-1])
    if not mixes:
        return None
    product = mixes[0]
    for mix in mixes[1:]:
        product = mix @ product
    return gains(product)


def training() -> None:
    """Bits per byte, CPU time of a step and the matrices' gain, for each variant and seed."""
    torch.set_num_threads(1)
    data, found = builtin_text(), {}
    for name, config in VARIANTS.items():
        rows = []
        for seed in SEEDS:
            began = time.process_time()
            run = trial(config, data, replace(RECIPE, seed=seed))
            seconds = time.process_time() - began
            largest_norm = max(m["gradient_norm"] for m in run.metrics[10:])
            rows.append({
                "bits_per_byte": run.validation, "cpu_seconds_per_step": seconds / RECIPE.steps,
                "largest_gradient_norm": largest_norm, "gain_and_smallest_sum": trained_gains(run.model, data),
            })  # fmt: skip
            print(name, seed, rows[-1], flush=True)
        found[name] = rows
        bits = [row["bits_per_byte"] for row in rows]
        print(f"{name}: {statistics.mean(bits):.3f} +- {statistics.stdev(bits):.3f} bits per byte", flush=True)
    configs = {name: config.to_dict() for name, config in VARIANTS.items()}
    record(RESULTS / "hyper_connections_training.json", seeds=SEEDS, recipe=asdict(RECIPE), configs=configs, runs=found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("gain", "training"))
    {"gain": gain, "training": training}[parser.parse_args().which]()
