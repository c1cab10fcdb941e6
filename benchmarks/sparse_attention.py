"""What the choice of tokens is worth on a task that needs far ones: the copy task behind the chapter on DSA.

    python benchmarks/sparse_attention.py      three seeds: three minutes of one core

A sequence is a passage of 48 random tokens out of 64, then the same passage again. Each token of the second half can be
predicted from the first half alone, and from no window of neighbours. A model of two layers learns it with dense
attention. Then its weights stay, and each query attends to k of up to 96 tokens, chosen in four ways:
- window: the last k, which needs no indexer;
- untrained: those that an indexer with random weights scores highest;
- warmed up: those of the same indexer after the warm-up, in which it alone is trained;
- exact: those with the highest attention probabilities, which a real model would have to compute first.
Last comes the sparse stage at k = 4, in which everything is trained again. Measured on 64 fresh sequences: accuracy on
the second half, and of each layer the attention mass caught there, that is the sum of the dense attention probabilities
of the chosen tokens. Results go to benchmarks/results/sparse_attention.json. What it cannot show: whether a language
model needs far tokens, and any speed, since sequences are short.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from minids.config import ModelConfig
from minids.course.experiment import record
from minids.course.token_choice import by_probability, by_window, caught_mass, choosing, copy_accuracy, passages
from minids.model.kv_cache import IndexerTraining
from minids.model.sparse_attention import set_trained_parameters
from minids.model.transformer import MiniDS
from minids.training.optimizer import make_optimizers

RESULTS = Path(__file__).parent / "results" / "sparse_attention.json"
HALF, VOCAB = 48, 64
CONFIG = ModelConfig.preset(
    "nano", vocab_size=VOCAB, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0,
    qk_rope_head_dim=16, index_topk=2 * HALF, index_n_heads=16, index_head_dim=16,
)  # fmt: skip
BATCH, SEQUENCES = 32, 64
STEPS = {"dense": 250, "warm-up": 100, "sparse": 100}
LEARNING_RATES = {"dense": 3e-3, "warm-up": 3e-3, "sparse": 3e-4}
CHOSEN = (4, 8, 16)
SEEDS = (0, 1, 2)


def train(model: MiniDS, name: str, generator: torch.Generator) -> list[dict[str, float]]:
    """Train in one of the stages of STEPS, with a linear warm-up of 50 steps; return the losses of each step."""
    stage = "dense_warmup" if name == "warm-up" else "sparse"
    set_trained_parameters(model, stage)
    (optimizer,) = make_optimizers(model, "adamw", LEARNING_RATES[name], weight_decay=0.01)
    history: list[dict[str, float]] = []
    for step in range(STEPS[name]):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[name] * min(1, (step + 1) / 50)
        tokens = passages(BATCH, HALF, VOCAB, generator)
        indexer = None if name == "dense" else IndexerTraining(stage)
        out = model(tokens[:, :-1], indexer=indexer)
        loss = F.cross_entropy(out.logits[:, HALF:].flatten(0, 1), tokens[:, HALF + 1 :].flatten())
        indexer_loss = sum(out.indexer_losses, torch.zeros(()))
        (loss + indexer_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item()} | ({} if indexer is None else {"indexer_loss": indexer_loss.item()}))
    return history


@torch.no_grad()
def judge(model: MiniDS) -> dict:
    """Accuracy on the second half of fresh sequences, and the attention mass caught there, per layer."""
    tokens = passages(SEQUENCES, HALF, VOCAB, torch.Generator().manual_seed(5))
    return {"accuracy": copy_accuracy(model, HALF, SEQUENCES), "mass": caught_mass(model, tokens[:, :-1], HALF)}


def run(seed: int, chosen: Sequence[int] = CHOSEN) -> dict:
    """All stages with one seed, which decides the weights and the passages."""
    torch.manual_seed(seed)
    generator, began = torch.Generator().manual_seed(seed), time.process_time()
    model = MiniDS(CONFIG)
    train(model, "dense", generator)
    found = {"seed": seed, "dense": judge(model)}
    ways = {"window": by_window, "untrained": None, "exact": by_probability}
    found |= {name: {k: judge(choosing(model, k, way)) for k in chosen} for name, way in ways.items()}
    warm_up = train(model, "warm-up", generator)
    found["warm-up"] = {"indexer_loss": [step["indexer_loss"] for step in warm_up]}
    found["warmed up"] = {k: judge(choosing(model, k)) for k in chosen}
    model = choosing(model, chosen[0])
    sparse = train(model, "sparse", generator)
    found["sparse"] = sparse[-1] | judge(model) | {"window": judge(choosing(model, chosen[0], by_window))}
    return rounded(found | {"cpu_seconds": time.process_time() - began})


def rounded(value):
    """Floats to four digits, all through: the file is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(name): rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments or None)
    torch.set_num_threads(1)
    runs = []
    for seed in options.seeds:
        runs.append(run(seed))
        accuracies = {name: runs[-1][name][str(CHOSEN[0])]["accuracy"] for name in ("window", "untrained", "exact")}
        warmed = runs[-1]["warmed up"][str(CHOSEN[0])]["accuracy"]
        print(f"seed {seed}: dense {runs[-1]['dense']}, k = {CHOSEN[0]}: {accuracies}, warmed up {warmed}", flush=True)
    settings = {"config": CONFIG.to_dict(), "batch_size": BATCH, "steps": STEPS, "learning_rates": LEARNING_RATES}
    record(options.results, command="python benchmarks/sparse_attention.py", **settings, runs=runs)


if __name__ == "__main__":
    main()
