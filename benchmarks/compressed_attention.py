"""What passes through V4's compressed entries on a task that needs single far tokens: a copy task.

    python benchmarks/compressed_attention.py      three seeds: three minutes of one core

A sequence is a passage of 24 random tokens out of 64, then the same passage again. Every token of the second half can
be predicted from the first half alone, which is out of reach of a window of 8 tokens, also of two layers of it. Three
models of two layers, alike but for the kind of attention, are trained from the beginning:
- window: the last 8 tokens;
- hca: these, and an entry for every 8 tokens, all of them;
- csa: these, and an entry for every 4 tokens (which mixes 8), all of them. Then its weights stay, its indexers are
  warmed up, and each query attends to k of up to 11 entries only, chosen in three ways: the newest k; those that an
  indexer with random weights scores highest; those of the same indexer after the warm-up.

What it can show: whether a token can be copied out of an entry in which it is mixed with others (here the mixture is as
wide as half of the residual stream), and whether the indexer finds the entry that holds it. What it cannot show: which
kind is better, since the steps are few and the same for all; entries of 128 tokens; whether a language model needs far
tokens; any speed. Results go to benchmarks/results/compressed_attention.json.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from minids.config import ModelConfig
from minids.course.experiment import record
from minids.course.token_choice import copy_accuracy, passages
from minids.model.compressed_attention import CompressedAttention
from minids.model.kv_cache import IndexerTraining
from minids.model.sparse_attention import set_trained_parameters
from minids.model.transformer import MiniDS
from minids.training.optimizer import make_optimizers

RESULTS = Path(__file__).parent / "results" / "compressed_attention.json"
HALF, VOCAB = 24, 64
CONFIG = ModelConfig.preset(
    "nano", vocab_size=VOCAB, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0,
    attention="csa", qk_rope_head_dim=16, v_head_dim=32, sliding_window=8, csa_block=4, hca_block=8,
    compress_rope_theta=10000.0, o_groups=2, o_lora_rank=64, index_topk=2 * HALF, index_n_heads=16, index_head_dim=16,
)  # fmt: skip
BATCH, LEARNING_RATE = 32, 3e-3
STEPS = {"window": 100, "hca": 400, "csa": 400, "warm-up": 100}
CHOSEN = (1, 2, 4)
SEEDS = (0, 1, 2)


def train(model: MiniDS, steps: int, generator: torch.Generator, warm_up: bool = False) -> list[float]:
    """Train the model, or in the warm-up its indexers alone, with 50 steps of linear warm-up; return the losses."""
    set_trained_parameters(model, "dense_warmup" if warm_up else "sparse")
    (optimizer,) = make_optimizers(model, "adamw", LEARNING_RATE, weight_decay=0.01)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50)
        tokens = passages(BATCH, HALF, VOCAB, generator)
        out = model(tokens[:, :-1], indexer=IndexerTraining("dense_warmup") if warm_up else None)
        loss = F.cross_entropy(out.logits[:, HALF:].flatten(0, 1), tokens[:, HALF + 1 :].flatten())
        if warm_up:
            loss = torch.stack(out.indexer_losses).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def choosing(model: MiniDS, k: int, newest: bool = False) -> MiniDS:
    """Return a copy that attends to k entries per query: those of its indexers, or the newest complete ones."""
    chooser = MiniDS(model.config.replace(index_topk=k))
    chooser.load_state_dict(model.state_dict())
    for layer in chooser.layers:
        attention = layer.attention
        if newest and isinstance(attention, CompressedAttention) and attention.indexer is not None:
            attention.indexer.scores = by_number  # type: ignore[method-assign]
    return chooser.eval()


def by_number(x, query_latent, keys, rotation):
    """Scores that grow with the number of the block."""
    return torch.arange(keys.shape[1], dtype=x.dtype).expand(*x.shape[:2], -1)


def run(seed: int, chosen: Sequence[int] = CHOSEN) -> dict:
    """Train all kinds with one seed, which decides the weights and the passages; return losses and accuracies."""
    found: dict = {"seed": seed}
    began = time.process_time()
    for kind in ("window", "hca", "csa"):
        torch.manual_seed(seed)
        generator, model = torch.Generator().manual_seed(seed), MiniDS(CONFIG.replace(attention=kind))
        loss = train(model, STEPS[kind], generator)[-1]
        found[kind] = {"loss": loss, "accuracy": copy_accuracy(model, HALF)}
    found["newest"] = {k: copy_accuracy(choosing(model, k, newest=True), HALF) for k in chosen}
    found["untrained"] = {k: copy_accuracy(choosing(model, k), HALF) for k in chosen}
    losses = train(model, STEPS["warm-up"], generator, warm_up=True)
    found["warm-up"] = {"first": losses[0], "last": losses[-1]}
    found["warmed up"] = {k: copy_accuracy(choosing(model, k), HALF) for k in chosen}
    found["cpu_seconds"] = time.process_time() - began
    return found


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments or None)
    torch.set_num_threads(1)
    runs = []
    for seed in options.seeds:
        runs.append(run(seed))
        print(json.dumps(runs[-1]), flush=True)
    settings = {"config": CONFIG.to_dict(), "batch_size": BATCH, "learning_rate": LEARNING_RATE, "steps": STEPS}
    record(options.results, command="python benchmarks/compressed_attention.py", **settings, runs=runs)


if __name__ == "__main__":
    main()
