"""Does a small model need far tokens on plain text? The negative result beside the copy task of the chapter on DSA.

    python benchmarks/sparse_text.py      three seeds: eight minutes of one core

A model of two layers is trained on text of 256 bytes with dense attention. Then its weights stay, and each query
attends to 16 of up to 256 bytes, chosen in four ways: the last 16 (window); by an untrained indexer; by the same
indexer after the dense warm-up, in which it alone is trained; and by the attention probabilities themselves (exact).
Measured on held-out text: the loss in bits per byte, and of each layer the attention mass caught. A window comes
within 0.03 bits per byte of the exact choice, so an indexer can gain no more: the experiment shows that it learns the
choice, not that text needs it.
Results go to benchmarks/results/sparse_text.json.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from minids.config import ModelConfig
from minids.course.experiment import builtin_text, record, trial
from minids.course.token_choice import by_probability, by_window, caught_mass, choosing
from minids.model.transformer import MiniDS
from minids.training.pretrain import Recipe, TextData, Trainer, validation_batches

RESULTS = Path(__file__).parent / "results" / "sparse_text.json"
SEEDS = (0, 1, 2)
CHOSEN = 16
WAYS = ("dense", "window", "untrained", "warmed up", "exact")
CONFIG = ModelConfig.preset(
    "nano", num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0,
    qk_rope_head_dim=16, rope_theta=100.0, index_n_heads=16, index_head_dim=16,
)  # fmt: skip
DENSE = Recipe(
    steps=300, batch_size=8, seq_len=256, learning_rate=0.02, warmup_steps=20, optimizer="muon", mtp_weight=0.0,
    evaluate_every=300, evaluation_batches=8,
)  # fmt: skip
WARM_UP = replace(DENSE, steps=100, learning_rate=3e-3, optimizer="adamw", index_stage="dense_warmup", weight_decay=0.0)


def run(seed: int, data: TextData, dense: Recipe = DENSE, warm_up: Recipe = WARM_UP) -> dict:
    """Train, choose in all ways, warm up, choose again; losses in bits per byte and attention mass per layer."""
    dense, warm_up = replace(dense, seed=seed), replace(warm_up, seed=seed)
    trained = trial(CONFIG, data, dense)
    model = MiniDS(CONFIG.replace(index_topk=dense.seq_len))  # its indexers are untrained
    model.load_state_dict(trained.model.state_dict(), strict=False)
    tokens = next(validation_batches(data, dense)).tokens[:, :-1]

    def judged(chooser: MiniDS) -> dict:
        loss = Trainer(chooser, data, dense).evaluate()
        return {"bits_per_byte": loss, "mass": caught_mass(chooser, tokens, first=CHOSEN)}

    found: dict = {"seed": seed, "dense": {"bits_per_byte": trained.validation}}
    for name, scores in {"window": by_window, "untrained": None, "exact": by_probability}.items():
        found[name] = judged(choosing(model, CHOSEN, scores))
    trainer = Trainer(model, data, warm_up)
    history = trainer.run(progress=False)
    found["warm-up"] = {"indexer_loss": [step["indexer_loss"] for step in history]}
    found["warmed up"] = judged(choosing(model, CHOSEN))
    return found


def main() -> None:
    torch.set_num_threads(1)
    data = builtin_text()
    runs = []
    for seed in SEEDS:
        runs.append(run(seed, data))
        print(f"seed {seed}: " + ", ".join(f"{way} {runs[-1][way]['bits_per_byte']:.3f}" for way in WAYS), flush=True)
    record(RESULTS, config=CONFIG.to_dict(), dense=asdict(DENSE), warm_up=asdict(WARM_UP), chosen=CHOSEN, runs=runs)


if __name__ == "__main__":
    main()
