"""Decoding against its lower limit: the model, the compiled step and transformers, at batch 1 and 16.

    python benchmarks/decoding.py --repeats 7      about ten minutes of one core

All sides have the same weights, those of the 10 M config of `minids bench`, in float32 on one thread, and continue the
same prompts of 16 tokens greedily by `--tokens` tokens. They take turns; a ratio is the median of the rounds with its
smallest and largest value, of CPU seconds. The limit of a step is the time in which one core reads the weights that it
uses: the bytes, counted from the experts that were chosen, over the bandwidth, measured in the same rounds by summing a
tensor that no cache holds. Results go to benchmarks/results/decoding.json.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minids.cli.side_by_side import CONFIG, in_transformers
from minids.config import ModelConfig
from minids.course.experiment import record
from minids.inference.compiled import FusedDecoder, load_step
from minids.inference.fused import FusedStep
from minids.inference.generate import Sampling, generate, prefill
from minids.model.transformer import MiniDS

RESULTS = Path(__file__).parent / "results" / "decoding.json"
PROMPT = 16
GREEDY = Sampling(temperature=0.0)
IMPLEMENTATIONS = ("eager", "grouped_mm")  # of transformers' experts


def sides(model: MiniDS, batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    """What is compared: functions that generate `tokens` tokens after each of `batch` prompts."""
    prompts = torch.randint(1, model.config.vocab_size, (batch, PROMPT))

    def theirs(implementation: str) -> Callable[[], object]:
        twin = in_transformers(model).eval()
        twin.set_experts_implementation(implementation)
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return torch.inference_mode()(lambda: twin.generate(prompts, **options))

    def ours(compiled: bool) -> Callable[[], object]:
        options = dict(max_new_tokens=tokens, sampling=GREEDY, compiled=compiled)
        return lambda: generate(model, prompts.tolist(), **options)

    found = {"plain": ours(False), "compiled": ours(True)}
    return found | {f"transformers {name}": theirs(name) for name in IMPLEMENTATIONS}


def bytes_read(model: MiniDS, batch: int) -> float:
    """Bytes of the weights that one step reads: all, but of the experts those that `batch` random tokens choose."""
    step = FusedStep(model)
    chosen = []
    hooks = [
        router.register_forward_hook(lambda _, __, routing: chosen.append(routing.experts.unique().numel()))
        for router in model.routers()
    ]
    with torch.inference_mode():
        for seed in range(8):
            torch.manual_seed(seed)
            prompts = torch.randint(model.config.vocab_size, (batch, PROMPT))
            cache = model.new_cache(batch, PROMPT + 1)
            model.trunk(prompts, cache)
            chosen.clear()  # of the prompts
            model.trunk(prompts[:, :1], cache)
    for hook in hooks:
        hook.remove()
    share = statistics.mean(chosen) / model.config.n_routed_experts if chosen else 0.0
    rows = {"embedding.weight", "cos", "sin"}  # of which a token reads one row
    weights = {name: weight.nbytes for name, weight in step.state_dict().items() if name not in rows}
    stacked = {name for name, weight in step.state_dict().items() if ".ffn." in name and weight.ndim == 3}
    return sum(size * (share if name in stacked else 1.0) for name, size in weights.items())


def steps_of(model: MiniDS, batch: int, tokens: int) -> Callable[[], None]:
    """Decoding without the prefill: compiled steps on random tokens, as greedy loops would choose the same experts."""
    step = load_step(model, batch)
    cache = model.new_cache(batch, PROMPT)
    with torch.inference_mode():
        prefill(model, torch.randint(model.config.vocab_size, (batch, PROMPT)).tolist(), cache)

    drawn = torch.randint(model.config.vocab_size, (tokens, batch))

    @torch.inference_mode()
    def steps() -> None:
        decoder = FusedDecoder(step, step.batch, cache, tokens)
        for following in drawn:
            decoder.step(following)

    return steps


def cpu_seconds(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def spread(figures: list[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}


def measure(config: ModelConfig, batch: int, tokens: int, repeats: int, reading_mib: int) -> dict:
    """Seconds of every side and of the limit, round by round, and their ratios."""
    torch.manual_seed(0)
    model = MiniDS(config).eval()
    began = time.perf_counter()
    load_step(model, batch)
    start = time.perf_counter() - began
    compared = sides(model, batch, tokens) | {"compiled steps": steps_of(model, batch, tokens)}
    large = torch.ones(reading_mib * 2**18)  # float32
    rounds = []
    for _ in range(repeats + 1):
        seconds = {name: cpu_seconds(side) for name, side in compared.items()}
        rounds.append(seconds | {"bandwidth": large.nbytes / cpu_seconds(large.sum)})
    rounds = rounds[1:]
    best = min(
        (f"transformers {name}" for name in IMPLEMENTATIONS), key=lambda n: statistics.median(r[n] for r in rounds)
    )
    limit = bytes_read(model, batch)
    return {
        "batch": batch,
        "seconds_until_compiled": start,
        "ratios": {
            "plain / compiled": spread([r["plain"] / r["compiled"] for r in rounds]),
            f"{best} / plain": spread([r[best] / r["plain"] for r in rounds]),
            f"{best} / compiled": spread([r[best] / r["compiled"] for r in rounds]),
            "compiled step / limit": spread([r["compiled steps"] / tokens * r["bandwidth"] / limit for r in rounds]),
        },
        "milliseconds_per_step": {name: spread([r[name] / tokens * 1e3 for r in rounds]) for name in compared},
        "limit": {
            "mebibytes_per_step": limit / 2**20,
            "gigabytes_per_second": spread([r["bandwidth"] / 1e9 for r in rounds]),
        },
    }


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--layers", type=int, default=CONFIG.num_hidden_layers, help="fewer for a quick try")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--reading-mib", type=int, default=256, help="size of the tensor that measures the bandwidth")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments or None)
    torch.set_num_threads(1)
    config = CONFIG.replace(num_hidden_layers=options.layers)
    load = os.getloadavg()
    found = [measure(config, b, options.tokens, options.repeats, options.reading_mib) for b in options.batches]
    for result in found:
        for what, figures in result["ratios"].items():
            extremes = f"{figures['low']:.2f} to {figures['high']:.2f}"
            print(f"batch {result['batch']}: {what}: {figures['median']:.2f} ({extremes})")
    settings = {"config": config.to_dict(), "tokens": options.tokens, "load_average": [load, os.getloadavg()]}
    record(options.results, **settings, found=found)


if __name__ == "__main__":
    main()
