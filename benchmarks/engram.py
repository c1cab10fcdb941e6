"""Engram's U-curve at toy size: the same parameters divided between routed experts and an n-gram memory.

    python benchmarks/engram.py      four divisions, three seeds each: two minutes of one core

The paper (arXiv 2601.07372) finds the lowest loss with 20 to 25 % of the sparse parameters in the memory. Here a model
of two layers has 64 routed experts a layer, of which every token takes 2; a fraction of them is replaced by a memory
with as many parameters, so that all models have equal totals, up to the prime sizes of the tables, and the memory's key
and value projections (8,320 parameters). After 120 steps the losses differ by less than their seeds: at this size and
length the curve cannot be seen. Results go to benchmarks/results/engram.json.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from minids.config import EngramConfig, ModelConfig
from minids.course.experiment import builtin_text, record, trial
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results" / "engram.json"
SEEDS = (0, 1, 2)
EXPERTS = (64, 48, 32, 8)
MODEL = ModelConfig.preset(
    "nano", vocab_size=2048, num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0,
    n_routed_experts=64, num_experts_per_tok=2, n_group=1, topk_group=1,
)  # fmt: skip
RECIPE = Recipe(
    steps=120, batch_size=8, seq_len=128, learning_rate=0.01, warmup_steps=10, mtp_weight=0.0, evaluate_every=120,
    evaluation_batches=16,
)  # fmt: skip


def divided(config: ModelConfig, experts: int, bos: int, pad: int) -> ModelConfig:
    """Replace all but some routed experts by a memory with as many parameters, read before the second layer."""
    removed = config.n_routed_experts - experts
    if not removed:
        return config
    memory = EngramConfig(layers=(1,), heads=4, dim=32, bos_token=bos, pad_token=pad)
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    tables, width = memory.heads * (memory.max_ngram - 1), memory.dim // memory.heads
    rows = removed * config.num_hidden_layers * per_expert // (tables * width)
    return config.replace(n_routed_experts=experts, engram=replace(memory, rows=rows))


def main() -> None:
    torch.set_num_threads(1)
    data = builtin_text("bpe:2048")
    tokenizer, rows = data.tokenizer, []
    for experts in EXPERTS:
        config = divided(MODEL.replace(vocab_size=tokenizer.vocab_size), experts, tokenizer.bos_id, tokenizer.pad_id)
        runs = [trial(config, data, replace(RECIPE, seed=seed)) for seed in SEEDS]
        model = runs[0].model
        row = {
            "experts": experts,
            "share_of_memory": 1 - experts / MODEL.n_routed_experts,
            "parameters": model.num_parameters(),
            "active": model.num_active_parameters(),
            "validation_bits_per_byte": [run.validation for run in runs],
        }
        print(row, flush=True)
        rows.append(row)
    record(RESULTS, seeds=SEEDS, recipe=asdict(RECIPE), config=MODEL.to_dict(), divisions=rows)


if __name__ == "__main__":
    main()
