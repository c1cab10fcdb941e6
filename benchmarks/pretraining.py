"""The longer runs behind chapters/05_pretraining.ipynb, one experiment each, with three seeds and one thread.

    python benchmarks/pretraining.py ablation            dense, +MLA, +MoE, +bias balancing, +MTP: 4 minutes of one core
    python benchmarks/pretraining.py scaling             four sizes to fit a law on, a fifth to check it: 2 minutes
    python benchmarks/pretraining.py context             four times the trained context, four ways: 3 minutes
    python benchmarks/pretraining.py recipe RUN          the run of `python -m minids train` against gzip, xz, a 5-gram

Results go to benchmarks/results/pretraining_NAME.json with command, seeds, versions, and the configs and recipes from
which the chapter trains its own short versions. A seed decides the first weights and the order of the text.
"""

import argparse
import gzip
import json
import lzma
import math
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minids.config import ModelConfig, YaRN
from minids.cost import matmul_parameters
from minids.course.experiment import builtin_text
from minids.data.batches import Batch, TokenizedCorpus, evaluation_batches
from minids.data.tokenizer import load_tokenizer
from minids.model.transformer import MiniDS
from minids.training.loss import bits_per_byte
from minids.training.pretrain import Recipe, TextData, Trainer
from minids.training.pretraining_run import PretrainingRun, read_text
from minids.training.run import load_run, read_metrics

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
DENSE = ModelConfig.preset(
    "nano", attention="gqa", num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0,
    moe_intermediate_size=40, aux_loss_alpha=0.0, max_position_embeddings=256,
)  # fmt: skip
RECIPE = Recipe(batch_size=8, seq_len=64, learning_rate=1e-2, warmup_steps=10, evaluation_batches=1000)


def trained(config: ModelConfig, data: TextData, recipe: Recipe, model: MiniDS | None = None) -> tuple[MiniDS, list]:
    """A new model, or `model` from where it stands, and the metrics of its steps."""
    torch.manual_seed(recipe.seed)
    trainer = Trainer(MiniDS(config) if model is None else model, data, replace(recipe, evaluate_every=recipe.steps))
    metrics = trainer.run(progress=False)
    return trainer.model.eval(), metrics


# Ablation -----------------------------------------------------------------------------------------------------------


def ablation() -> dict:
    """Each variant adds one idea to the one before; activated parameters and tokens are the same."""
    mla = DENSE.replace(attention="mla")
    moe = mla.replace(first_k_dense_replace=1)
    variants = {
        "dense": (DENSE, 0.0),
        "+MLA": (mla, 0.0),
        "+MoE": (moe, 0.0),
        "+bias balancing": (moe, 0.003),
        "+MTP": (moe.replace(num_nextn_predict_layers=1), 0.003),
    }
    data, found = builtin_text(), {}
    lengths = {"long": 500, "short": 30}  # the chapter runs the short one again
    for name, (config, speed) in variants.items():
        found[name] = {"config": config.to_dict(), "balance_speed": speed}
        for length, steps in lengths.items():
            recipe = replace(RECIPE, steps=steps, balance_speed=speed)
            found[name][length] = []
            for seed in SEEDS:
                model, metrics = trained(config, data, replace(recipe, seed=seed))
                run = {
                    "seed": seed,
                    "bits_per_byte": metrics[-1]["validation_bits_per_byte"],
                    "loss": [m["loss"] for m in metrics[9::10]],
                    "max_violation": metrics[-1].get("max_violation"),
                }
                found[name][length].append(run)
                print(f"{name}, {steps} steps, seed {seed}: {run['bits_per_byte']:.3f} bits per byte", flush=True)
        found[name] |= {"parameters": model.num_parameters(), "active": model.num_active_parameters()}
    return {"recipe": asdict(RECIPE), "steps": lengths, "variants": found}


# Scaling ------------------------------------------------------------------------------------------------------------


def sized(width: int) -> ModelConfig:
    """A dense model of this width: heads of 8, a feed-forward about 8/3 as wide."""
    return DENSE.replace(
        hidden_size=width, num_attention_heads=width // 8, num_key_value_heads=width // 8, v_head_dim=8,
        intermediate_size=8 * round(width / 3),
    )  # fmt: skip


def scaling(tokens_per_parameter: int = 3) -> dict:
    """Models and texts grow together: D = 3 N tokens for N matrix weights, 6 N D floating-point operations."""
    data, sizes = builtin_text(), []
    for width in (16, 24, 32, 48, 72):
        config = sized(width)
        weights = matmul_parameters(config)
        steps = round(tokens_per_parameter * weights / (RECIPE.batch_size * RECIPE.seq_len))
        recipe = replace(RECIPE, steps=steps, learning_rate=0.02 * (16 / width) ** 0.5)
        tokens = steps * recipe.batch_size * recipe.seq_len
        bits = []
        for seed in SEEDS:
            bits.append(trained(config, data, replace(recipe, seed=seed))[1][-1]["validation_bits_per_byte"])
            print(f"width {width}, {weights:,} weights, {steps} steps, seed {seed}: {bits[-1]:.3f}", flush=True)
        size = {"config": config.to_dict(), "recipe": asdict(recipe), "weights": weights, "tokens": tokens}
        sizes.append(size | {"width": width, "flops": 6 * weights * tokens, "bits_per_byte": bits})
    return {"tokens_per_parameter": tokens_per_parameter, "sizes": sizes}


# Longer context -----------------------------------------------------------------------------------------------------

SHORT, LONG = 64, 256
KEY, CODES = "<answer>", np.arange(248, 256)  # byte values that no UTF-8 text holds
CONTEXT = DENSE.replace(attention="mla")
CONTEXT_RECIPE = replace(RECIPE, batch_size=1024 // SHORT, learning_rate=6e-3, evaluation_batches=1)


def with_needles(data: TextData, length: int, seed: int, count: int, places: list[int] | int = 4) -> TokenizedCorpus:
    """Stretches of text of `length` tokens. Into every one a key and a code are put, always the same code within a row.

    They stand at `places`, or at so many random ones, and once more at the end: whoever finds an earlier pair knows the
    code there.
    """
    random, tokens, tokenizer = np.random.default_rng(seed), data.train.tokens, data.tokenizer
    rows = tokens[random.integers(len(tokens) - length, size=count)[:, None] + np.arange(length)].copy()
    rows[rows >= 256] = ord("\n")  # the marks between documents
    codes, every = random.choice(CODES, count), np.arange(count)
    if isinstance(places, int):
        places = random.permuted(np.tile(np.arange(1, length - 4, 3), (count, 1)), axis=1)[:, :places].T
    for place in [*places, length - 3]:
        rows[every, place], rows[every, place + 1] = tokenizer.token_id(KEY), codes
    rows[:, 0], rows[:, -1] = tokenizer.bos_id, tokenizer.eos_id
    return TokenizedCorpus(rows.ravel(), every * length, np.zeros(count, int), ("text",))


@torch.inference_mode()
def loss_by_position(model: MiniDS, data: TextData, every: int = 16) -> list[float]:
    """Nats per byte of held-out text without needles, in rows of `LONG`: a mean for each `every` positions."""
    batches = evaluation_batches(data.validation, batch_size=16, seq_len=LONG)
    losses = [F.cross_entropy(model(b.tokens[:, :-1]).logits.mT, b.tokens[:, 1:], reduction="none") for b in batches]
    return torch.cat(losses).mean(0).unflatten(0, (-1, every)).mean(-1).tolist()


@torch.inference_mode()
def needle_test(model: MiniDS, data: TextData, rows: int = 96) -> dict[int, float]:
    """How often the right code is the likeliest one at the end of `LONG` tokens, by the distance of its needle."""
    found, codes = {}, torch.from_numpy(CODES)
    for distance in (8, 24, 40, 56, 80, 112, 144, 176, 208, 240):
        haystack = with_needles(replace(data, train=data.validation), LONG, 1, rows, [LONG - 3 - distance])
        tokens = torch.from_numpy(haystack.tokens.astype(np.int64)).view(rows, LONG)
        guess = codes[model(tokens[:, :-2]).logits[:, -1, codes].argmax(-1)]
        found[distance] = (guess == tokens[:, -2]).double().mean().item()
    return found


def extended(seed: int, base_steps: int, phase_steps: int) -> dict[str, MiniDS]:
    """A model trained at 64 tokens, and three ways to use it at 256.

    As in V3 the context grows in two phases, and YaRN stretches by the final factor from the start of the first. The
    control trains on the same rows without YaRN.
    """
    data = builtin_text()
    yarn = YaRN(LONG / SHORT, SHORT)
    corpora = {length: with_needles(data, length, seed, 8000) for length in (SHORT, 2 * SHORT, LONG)}
    recipe = replace(CONTEXT_RECIPE, steps=base_steps, seed=seed)
    base, _ = trained(CONTEXT, replace(data, train=corpora[SHORT]), recipe)
    models = {"no extension": base, "YaRN, not trained": with_scaling(base, yarn)}
    for name, scaling in {"two phases, no YaRN": None, "two phases with YaRN": yarn}.items():
        model = with_scaling(base, scaling)
        for length in (2 * SHORT, LONG):
            phase = replace(recipe, steps=phase_steps, seq_len=length, batch_size=1024 // length, learning_rate=2e-3)
            trained(CONTEXT, replace(data, train=corpora[length]), replace(phase, warmup_steps=1), model)
        models[name] = model
    return models


def context() -> dict:
    """Loss by position and a needle test of each way."""
    data, found = builtin_text(), {}
    lengths = {"short": (60, 10), "long": (300, 40)}  # steps of the base and of a phase; the chapter repeats the short
    for length, steps in lengths.items():
        for seed in SEEDS:
            for name, model in extended(seed, *steps).items():
                run = {"seed": seed, "loss": loss_by_position(model, data), "needle": needle_test(model, data)}
                found.setdefault(length, {}).setdefault(name, []).append(run)
                parts = {"below 64": run["loss"][:4], "from 128": run["loss"][8:], "needle": run["needle"].values()}
                shown = ", ".join(f"{what} {sum(part) / len(part):.2f}" for what, part in parts.items())
                print(f"{length}, {name}, seed {seed}: {shown}", flush=True)
    return {"config": CONTEXT.to_dict(), "recipe": asdict(CONTEXT_RECIPE), "steps": lengths, "ways": found}


def with_scaling(model: MiniDS, scaling: YaRN | None) -> MiniDS:
    """A copy of the model whose rotary embedding is stretched."""
    copy = MiniDS(model.config.replace(rope_scaling=scaling))
    copy.load_state_dict(model.state_dict())
    return copy.eval()


# The README's recipe ------------------------------------------------------------------------------------------------


def recipe(directory: Path) -> dict:
    """A finished run and three compressors on the very text of its validation figure."""
    run = PretrainingRun.load(directory)
    data = read_text(run, load_tokenizer(directory))
    model, tokenizer = load_run(directory)
    r = run.recipe
    options = dict(batch_size=r.batch_size, seq_len=r.seq_len, max_batches=r.evaluation_batches)
    batches: list[Batch] = list(evaluation_batches(data.validation, **options))
    held_out = "".join(tokenizer.decode(row) for batch in batches for row in batch.tokens[:, 1:]).encode()
    training = tokenizer.decode(data.train.tokens).encode()
    validated = [m for m in read_metrics(directory) if "validation_bits_per_byte" in m]
    return {
        "trained_with": "python -m minids train",
        "seeds": [r.seed],
        "model": bits_per_byte(model, batches, tokenizer.token_bytes()),
        "gzip": 8 * len(gzip.compress(held_out, 9)) / len(held_out),
        "xz": 8 * xz_bytes(held_out) / len(held_out),
        "xz, having read": 8 * (xz_bytes(training + held_out) - xz_bytes(training)) / len(held_out),
        "5-gram": ngram_bits(training, held_out, 5),
        "held_out_bytes": len(held_out),
        "training_bytes": len(training),
        "validation": [[m["tokens"], m["validation_bits_per_byte"]] for m in validated],
        "config": run.config.to_dict(),
        "recipe": asdict(r),
    }


def xz_bytes(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))


def ngram_bits(training: bytes, held_out: bytes, order: int) -> float:
    """Bits per byte of a byte n-gram, interpolated with all shorter ones by Witten and Bell's rule."""
    seen, asked = (np.frombuffer(text, np.uint8).astype(np.int64) for text in (training, held_out))
    chance = np.full(len(asked), 1 / 256)
    grams, wanted = np.zeros_like(seen), np.zeros_like(asked)
    for n in range(order):
        grams[n:] += seen[: len(seen) - n] << 8 * n
        wanted[n:] += asked[: len(asked) - n] << 8 * n
        kinds, counts = np.unique(grams[n:], return_counts=True)
        contexts, starts = np.unique(kinds >> 8, return_index=True)
        total = np.add.reduceat(counts, starts)
        followers = np.diff(starts, append=len(kinds))
        times, known = looked_up(wanted, kinds, counts), looked_up(wanted >> 8, contexts, total)
        distinct = looked_up(wanted >> 8, contexts, followers)
        chance = np.where(known > 0, (times + distinct * chance) / np.maximum(known + distinct, 1), chance)
    return float(-np.log2(chance).mean())


def looked_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none; `keys` is sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["ablation", "scaling", "context", "recipe"])
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a finished run, for recipe")
    arguments = parser.parse_args()
    if (arguments.experiment == "recipe") != (arguments.run is not None):
        parser.error("recipe, and only recipe, needs the folder of a run")
    torch.set_num_threads(1)
    experiment = {"ablation": ablation, "scaling": scaling, "context": context}.get(arguments.experiment)
    results = recipe(arguments.run) if experiment is None else experiment()
    found = {
        "command": f"python benchmarks/pretraining.py {arguments.experiment}{' RUN' if arguments.run else ''}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "seeds": SEEDS,
    }
    path = RESULTS / f"pretraining_{arguments.experiment}.json"
    path.write_text(json.dumps(rounded(found | results)) + "\n")


def rounded(value: object) -> object:
    """Floats to five digits, all through: the file is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else value
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    sys.exit(main())
