"""Engram at toy size: the same parameters divided between routed experts and an n-gram memory; what changes?

    python benchmarks/engram.py facts    random facts, five models, three seeds each: two minutes of one core
    python benchmarks/engram.py text     real text, four divisions, three seeds each: two minutes of one core

The paper (arXiv 2601.07372) finds the lowest loss with 20 to 25 % of the sparse parameters in the memory.

`facts` trains one layer (attention, 64 experts of which a token takes 4) on sequences of random facts (a, b) -> c. A
*local* fact stands as "? ? a b c": the last two tokens say which fact is meant. A *distant* one stands as "a ? ? b c",
with random tokens between: attention has to fetch a. Some experts are replaced by a memory of pairs with as many
parameters, its projections included. These cost 4,096 multiplications a token, so a control without memory takes 7
experts (3 more, 4,608). The task shows what the memory is for. It cannot show a U-curve: with 1,024 facts, four experts
are enough, so that fewer of them never hurt.

`text` trains a model of two layers with 64 routed experts a layer, of which every token takes 2. After 120 steps the
losses differ by less than their seeds: at this size and length the curve cannot be seen.
Results go to benchmarks/results/engram_facts.json and benchmarks/results/engram.json.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.config import EngramConfig, ModelConfig
from minids.course.experiment import builtin_text, record, trial
from minids.model.transformer import MiniDS
from minids.training.optimizer import make_optimizers
from minids.training.pretrain import Recipe

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)

# Random facts --------------------------------------------------------------------------------------------------------

SYMBOLS, FACTS = 256, 512  # facts of each kind
STEPS, SEQUENCES, ASKED, LEARNING_RATE, BALANCE_SPEED = 200, 16, 16, 0.01, 0.001
LAYER = ModelConfig.preset(
    "nano", vocab_size=SYMBOLS, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0,
    n_routed_experts=64, num_experts_per_tok=4, moe_intermediate_size=8, n_group=1, topk_group=1,
)  # fmt: skip
KEPT = (64, 48, 32, 4)


def with_memory(experts: int, config: ModelConfig = LAYER) -> ModelConfig:
    """Replace all but some experts by a memory of pairs of tokens with as many parameters."""
    removed = (config.n_routed_experts - experts) * 3 * config.hidden_size * config.moe_intermediate_size
    if not removed:
        return config
    memory = EngramConfig(layers=(0,), max_ngram=2, heads=4, dim=32, pad_token=0)
    rows = (removed - 2 * memory.dim * config.hidden_size) // memory.dim
    return config.replace(n_routed_experts=experts, engram=replace(memory, rows=rows))


def sequences(facts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences of facts, [batch, 5 * asked], and which facts are local; `facts` is [2, number, 3]."""
    shape = (SEQUENCES, ASKED)
    kind = torch.randint(2, shape, generator=generator)
    a, b, c = facts[kind, torch.randint(facts.shape[1], shape, generator=generator)].unbind(-1)
    one, two = torch.randint(SYMBOLS, (2, *shape), generator=generator)
    local = kind == 0
    places = torch.where(local, one, a), torch.where(local, two, one), torch.where(local, a, two), b, c
    return torch.stack(places, -1).flatten(1), local


def recall(config: ModelConfig, seed: int, steps: int = STEPS, number: int = FACTS) -> dict[str, float]:
    """Train a model on the answers of all facts; return its parameters, and the share that it recalls of each kind."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(SYMBOLS**2, generator=generator)[: 2 * number]
    answers = torch.randint(SYMBOLS, (2 * number,), generator=generator)
    facts = torch.stack((pairs // SYMBOLS, pairs % SYMBOLS, answers), -1).view(2, number, 3)
    model = MiniDS(config)
    (optimizer,) = make_optimizers(model, "adamw", LEARNING_RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10, 3.3 * (1 - step / steps)))
    for _ in range(steps):
        tokens, _ = sequences(facts, generator)
        out = model(tokens)
        optimizer.zero_grad()
        F.cross_entropy(out.logits[:, 3::5].flatten(0, 1), tokens[:, 4::5].flatten()).backward()
        optimizer.step()
        decay.step()
        model.update_balance_bias(out.tokens_per_expert, BALANCE_SPEED)
    with torch.no_grad():
        drawn = [sequences(facts, generator) for _ in range(8)]
        correct = torch.cat([model(tokens).logits[:, 3::5].argmax(-1) == tokens[:, 4::5] for tokens, _ in drawn])
    local = torch.cat([kind for _, kind in drawn])
    shares = {"local": correct[local].float().mean().item(), "distant": correct[~local].float().mean().item()}
    return {"parameters": model.num_parameters()} | shares


def facts() -> None:
    variants = {f"{experts} experts": with_memory(experts) for experts in KEPT}
    variants["64 experts, 7 a token"] = LAYER.replace(num_experts_per_tok=7)
    found = {}
    for name, config in variants.items():
        rows = [recall(config, seed) for seed in SEEDS]
        found[name] = {"share_of_memory": 1 - config.n_routed_experts / LAYER.n_routed_experts, "runs": rows}
        print(name, rows, flush=True)
    record(
        RESULTS / "engram_facts.json", seeds=SEEDS, steps=STEPS, sequences=SEQUENCES, facts_of_each_kind=FACTS,
        learning_rate=LEARNING_RATE, config=LAYER.to_dict(), recalled=found,
    )  # fmt: skip


# Text ----------------------------------------------------------------------------------------------------------------

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


def text() -> None:
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
    record(RESULTS / "engram.json", seeds=SEEDS, recipe=asdict(RECIPE), config=MODEL.to_dict(), divisions=rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("facts", "text"))
    {"facts": facts, "text": text}[parser.parse_args().which]()
