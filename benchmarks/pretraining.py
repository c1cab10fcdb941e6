"""The longer runs behind chapters/05_pretraining.ipynb, one experiment each, with three seeds and one thread.

    python benchmarks/pretraining.py ablation            dense, +MLA, +MoE, +bias balancing, +MTP: 4 minutes of one core
    python benchmarks/pretraining.py scaling             rates and a law of four sizes, checked on two: 6 minutes
    python benchmarks/pretraining.py context             four times the trained context, six ways: 3 minutes
    python benchmarks/pretraining.py recipe RUN          the run of `python -m minids train` against gzip, xz, a 5-gram

Results go to benchmarks/results/pretraining_NAME.json with command, seeds, versions, and the configs and recipes from
which the chapter trains its own short versions. A seed decides the first weights and the order of the text.
"""

import argparse
import gzip
import json
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
from minids.course.ngrams import ngram_bits, xz_bytes
from minids.data.batches import Batch, TokenizedCorpus, evaluation_batches
from minids.data.tokenizer import load_tokenizer
from minids.model.transformer import MiniDS
from minids.training.loss import bits_per_byte
from minids.training.pretrain import Recipe, TextData, Trainer
from minids.training.pretraining_run import PretrainingRun, read_text
from minids.training.run import load_run, read_metrics

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
ABLATION_SEEDS = (*SEEDS, 7, 8)  # the last two ran once, after the chapter had been written on the first three
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
            for seed in ABLATION_SEEDS:
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
    return {"seeds": ABLATION_SEEDS, "recipe": asdict(RECIPE), "steps": lengths, "variants": found}


# Scaling ------------------------------------------------------------------------------------------------------------


def sized(width: int) -> ModelConfig:
    """A dense model of this width: heads of 8, a feed-forward about 8/3 as wide."""
    return DENSE.replace(
        hidden_size=width, num_attention_heads=width // 8, num_key_value_heads=width // 8, v_head_dim=8,
        intermediate_size=8 * round(width / 3),
    )  # fmt: skip


FITTED, CHECKED = (8, 12, 16, 24), (32, 48)
LEARNING_RATES = (0.012, 0.024, 0.048, 0.096)


def scaling(tokens_per_parameter: int = 20) -> dict:
    """A ladder that is designed to find a law: D = 20 N, one epoch at most, and a learning rate for each size.

    The learning rate of a fitted size is the best of a sweep with seed 0. That of a checked size is extrapolated, by a
    straight line through the logarithms of the best ones over those of N, as its loss will be.
    """
    data, sizes, best = builtin_text(max_bytes=2_000_000), [], {}
    for width in FITTED + CHECKED:
        config = sized(width)
        weights = matmul_parameters(config)
        recipe = replace(RECIPE, batch_size=16, steps=round(tokens_per_parameter * weights / (16 * RECIPE.seq_len)))
        sweep = {}
        if width in FITTED:
            sweep = {rate: rung(config, data, replace(recipe, learning_rate=rate)) for rate in LEARNING_RATES}
            rate = best[weights] = min(sweep, key=sweep.__getitem__)
        else:
            slope, intercept = np.polyfit(np.log(list(best)), np.log(list(best.values())), 1)
            rate = float(np.exp(intercept + slope * np.log(weights)))
        recipe = replace(recipe, learning_rate=rate)
        bits = [sweep[rate]] if sweep else []  # of seed 0
        bits += [rung(config, data, replace(recipe, seed=seed)) for seed in SEEDS[len(bits) :]]
        tokens = recipe.steps * recipe.batch_size * recipe.seq_len
        size = {"width": width, "weights": weights, "tokens": tokens, "flops": 6 * weights * tokens}
        size |= {"sweep": list(sweep.items()), "bits_per_byte": bits}
        sizes.append(size | {"config": config.to_dict(), "recipe": asdict(recipe)})
        found = {"tokens_per_parameter": tokens_per_parameter, "fitted": len(FITTED), "sizes": sizes}
        write("scaling", found)
    return found


def rung(config: ModelConfig, data: TextData, recipe: Recipe) -> float:
    """Bits per byte of one run of the ladder."""
    bits = trained(config, data, recipe)[1][-1]["validation_bits_per_byte"]
    run = f"width {config.hidden_size}, {recipe.steps} steps, rate {recipe.learning_rate:.4f}, seed {recipe.seed}"
    print(f"{run}: {bits:.3f}", flush=True)
    return bits


# Longer context -----------------------------------------------------------------------------------------------------

SHORT, LONG = 64, 256
KEY, CODES = "<answer>", np.arange(248, 256)  # byte values that no UTF-8 text holds
CONTEXT = DENSE.replace(attention="mla")
CONTEXT_RECIPE = replace(RECIPE, batch_size=1024 // SHORT, learning_rate=6e-3, evaluation_batches=1)


def with_needles(data: TextData, length: int, seed: int, count: int, places: list[int] | int = 5) -> TokenizedCorpus:
    """Stretches of text of `length` tokens. Into every one a key and a code are put, always the same code within a row.

    A number of `places` is so many random ones, for training. A list is those, and the last place of the row, for a
    test: a model that attends to an earlier pair knows the code there.
    """
    random, tokens, tokenizer = np.random.default_rng(seed), data.train.tokens, data.tokenizer
    rows = tokens[random.integers(len(tokens) - length, size=count)[:, None] + np.arange(length)].copy()
    rows[rows >= 256] = ord("\n")  # the marks between documents
    codes, every = random.choice(CODES, count), np.arange(count)
    if isinstance(places, int):
        chosen = random.permuted(np.tile(np.arange(1, length - 2, 3), (count, 1)), axis=1)[:, :places].T
    else:
        chosen = [*places, length - 3]
    for place in chosen:
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
    """A model trained at 64 tokens, and five ways to use it at 256.

    YaRN has two parts, slower rotations and a sharper softmax; each is tried alone, without training. As in V3 the
    context then grows in two phases, and YaRN stretches by the final factor from the start of the first. The control
    trains on the same rows without YaRN.
    """
    data = builtin_text()
    yarn = YaRN(LONG / SHORT, SHORT)
    corpora = {length: with_needles(data, length, seed, 8000) for length in (SHORT, 2 * SHORT, LONG)}
    recipe = replace(CONTEXT_RECIPE, steps=base_steps, seed=seed)
    base, _ = trained(CONTEXT, replace(data, train=corpora[SHORT]), recipe)
    models = {
        "no extension": base,
        "frequencies only": with_scaling(base, replace(yarn, mscale=0.0, mscale_all_dim=0.0)),  # temperature 1
        "temperature only": with_scaling(base, YaRN(LONG / SHORT, 10**9)),  # no pair is slow enough to be stretched
        "YaRN, not trained": with_scaling(base, yarn),
    }
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
        for seed in SEEDS if length == "long" else SEEDS[:1]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["ablation", "scaling", "context", "recipe"])
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the folder of a finished run, for recipe")
    arguments = parser.parse_args()
    if (arguments.experiment == "recipe") != (arguments.run is not None):
        parser.error("recipe, and only recipe, needs the folder of a run")
    torch.set_num_threads(1)
    if arguments.experiment == "recipe":
        results = recipe(arguments.run)
    else:
        results = {"ablation": ablation, "scaling": scaling, "context": context}[arguments.experiment]()
    write(arguments.experiment, results)


def write(experiment: str, results: dict) -> None:
    """Store `results` with the command, versions and seeds."""
    arguments = " RUN" if experiment == "recipe" else ""
    found = {
        "command": f"python benchmarks/pretraining.py {experiment}{arguments}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "seeds": SEEDS,
    }
    path = RESULTS / f"pretraining_{experiment}.json"
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
