"""From how many layers on do drafts pay? Speculative against plain decoding, for models of different depth.

    python benchmarks/speculative_depth.py --layers 2 6 --steps 300 --repeats 3
    python benchmarks/speculative_depth.py --layers 2 6 --steps 0 --forced 0.6 0.8 1 --repeats 3 --prompts 3
    python benchmarks/speculative_depth.py --layers 2 6 --steps 0 --forced 0.6 0.8 1 --repeats 3 --prompts 3 --compiled

A draft costs a layer and the head, so the deeper the model, the cheaper it is beside a step. Each model is `tiny` with
another number of layers, trained on the built-in corpus. Measured at batch 1 on held-out prompts, at temperature 0.8
and greedy: CPU seconds of plain over speculative decoding, taking turns, and the acceptance rate of the first draft.
Greedy text of a small model falls into loops, where drafts are accepted nearly always or never, so the rate is also
measured teacher-forced: the mean of sum(min(p, q)) over held-out text, the probability that a draft from q is accepted.

With `--forced` each draft is accepted with the given probability, whatever it is, and all work is still done: the time
depends on the rate alone and needs no training (`--steps 0`). The text is then not the model's. (1 + rate) / speed-up
is what a round costs, in steps of plain decoding. Results are appended to benchmarks/results/speculative_depth.jsonl.
"""

import argparse
import dataclasses
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from minids.config import ModelConfig
from minids.data.batches import evaluation_batches
from minids.inference import speculative
from minids.inference.generate import Sampling, generate
from minids.inference.speculative import generate_speculatively
from minids.model.transformer import MiniDS
from minids.training.pretrain import Recipe, TextData, train
from minids.training.pretraining_run import PretrainingRun, read_text

RESULTS = Path(__file__).parent / "results" / "speculative_depth.jsonl"
SAMPLINGS = {"temperature 0.8": Sampling(0.8), "greedy": Sampling(0.0)}


def held_out_prompts(data: TextData, count: int, length: int = 24) -> list[list[int]]:
    """Stretches of the held-out text, evenly spread."""
    tokens = data.validation.tokens
    return [tokens[i : i + length].tolist() for i in range(0, len(tokens) - length, len(tokens) // count)][:count]


@torch.inference_mode()
def teacher_forced_acceptance(model: MiniDS, data: TextData, sampling: Sampling, seq_len: int) -> float:
    """Mean probability over held-out text that the first module's draft is accepted."""
    rates = []
    for batch in evaluation_batches(data.validation, batch_size=8, seq_len=seq_len):
        out = model(batch.tokens[:, :-1], mtp=True)
        p, q = sampling.probabilities(out.logits[:, 1:]), sampling.probabilities(out.mtp_logits[0])
        rates.append(torch.minimum(p, q).sum(-1).mean().item())
        if len(rates) == 16:
            break
    return statistics.mean(rates)


@contextmanager
def forced(rate: float) -> Iterator[None]:
    """Have every draft accepted with this probability; the verification is computed all the same."""
    coin, verify = random.Random(0), speculative.verify

    def matches(draft, own):
        return coin.random() < rate

    def verify_and_ignore(drafts, draft_chances, chances, generator=None):
        settled, count = verify(drafts, draft_chances, chances, generator)
        taken = coin.random() < rate
        return torch.cat((drafts, settled[:, -1:]), 1) if taken else settled, torch.full_like(count, 1 + taken)

    with mock.patch.object(speculative, "verify", verify_and_ignore):
        with mock.patch.object(speculative, "_matches", matches):
            yield


def seconds_of(decode, model: MiniDS, prompts: list[list[int]], **options) -> tuple[float, list]:
    """CPU seconds of decoding each prompt alone, and what was returned."""
    began = time.process_time()
    results = [decode(model, [prompt], **options) for prompt in prompts]
    return time.process_time() - began, results


def measure(model: MiniDS, prompts: list[list[int]], repeats: int, **options) -> tuple[dict, dict]:
    """Plain over speculative decoding, one ratio per round after a first pair, and the acceptance rate by prompt."""
    ratios, rates = [], []
    for seed in range(repeats + 1):
        plain, _ = seconds_of(generate, model, prompts, generator=torch.Generator().manual_seed(seed), **options)
        generator = torch.Generator().manual_seed(seed)
        fast, results = seconds_of(generate_speculatively, model, prompts, generator=generator, **options)
        rates += [acceptance.rate() for _, acceptance in results if acceptance.rounds]
        ratios.append(plain / fast)
    return spread(ratios[1:]), spread(rates)


def spread(figures: list[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}


def forced_table(
    model: MiniDS, prompts: list[list[int]], rates: list[float], repeats: int, tokens: int, compiled: bool
):
    """Speed-up by forced acceptance rate; `compiled`: of both sides' compiled steps."""
    modes = {
        f"{name}, compiled" if compiled else name: dict(sampling=sampling, compiled=compiled)
        for name, sampling in SAMPLINGS.items()
    }
    table = {}
    for mode, options in modes.items():
        table[mode] = []
        for rate in rates:
            with forced(rate):
                speed_up, found = measure(model, prompts, repeats, max_new_tokens=tokens, **options)
            table[mode].append({"forced": rate, "accepted": found["median"], "plain / speculative": speed_up})
    return table


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, required=True)
    parser.add_argument("--steps", type=int, default=400, help="of training; 0: only the forced table is measured")
    parser.add_argument("--forced", nargs="*", type=float, default=[], help="acceptance rates to force")
    parser.add_argument("--compiled", action="store_true", help="force them in compiled decoding, on both sides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="generated after each prompt")
    parser.add_argument("--tokenizer", default="bpe:2048")
    parser.add_argument("--max-bytes", type=int, default=PretrainingRun.max_bytes, help="of each source of text")
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--seq-len", type=int, default=Recipe.seq_len)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments or None)
    recipe = Recipe(
        steps=max(options.steps, 1), batch_size=options.batch_size, seq_len=options.seq_len, learning_rate=4e-3,
        warmup_steps=min(Recipe.warmup_steps, max(options.steps, 1)), evaluate_every=max(options.steps, 1),
    )  # fmt: skip
    run = PretrainingRun(ModelConfig.preset("tiny"), recipe, ("pydocs", "stdlib"), options.max_bytes)
    text = read_text(run, options.tokenizer) if options.steps else None
    command = "python benchmarks/speculative_depth.py " + " ".join(arguments or sys.argv[1:])
    threads = torch.get_num_threads()
    for layers in options.layers:
        torch.manual_seed(0)
        vocab = text.tokenizer.vocab_size if text else ModelConfig.preset("tiny").vocab_size
        model = MiniDS(ModelConfig.preset("tiny", num_hidden_layers=layers, vocab_size=vocab)).eval()
        result: dict = {"command": command, "layers": layers}
        prompts = torch.randint(vocab, (options.prompts, 24)).tolist()
        if text:
            metrics = train(model, text, recipe, progress=False)
            model.eval()
            prompts = held_out_prompts(text, options.prompts)
            result |= {"validation_bits_per_byte": metrics[-1]["validation_bits_per_byte"]}
        torch.set_num_threads(1)
        if text:
            result |= acceptance(model, text, prompts, options)
        if options.forced:
            result["forced"] = forced_table(
                model, prompts, options.forced, options.repeats, options.tokens, options.compiled
            )
        torch.set_num_threads(threads)
        if text:
            result["recipe"] = dataclasses.asdict(recipe)
        result["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        report(result)


def acceptance(model: MiniDS, text: TextData, prompts: list[list[int]], options: argparse.Namespace) -> dict:
    """Acceptance on held-out text, and in decoding with its speed-up, at each way of sampling."""
    found: dict = {"teacher_forced_acceptance": {}, "decoding": {}}
    for name, sampling in SAMPLINGS.items():
        rate = teacher_forced_acceptance(model, text, sampling, options.seq_len)
        found["teacher_forced_acceptance"][name] = rate
        speed_up, rates = measure(model, prompts, options.repeats, max_new_tokens=options.tokens, sampling=sampling)
        found["decoding"][name] = {"plain / speculative": speed_up, "acceptance rate": rates}
    return found


def report(result: dict) -> None:
    """Print the medians, and the spread of the rounds."""
    layers = f"{result['layers']} layers"
    for name, rate in result.get("teacher_forced_acceptance", {}).items():
        print(f"{layers}, {name}: acceptance on held-out text {rate:.2f}", flush=True)
    for name, rows in result.get("decoding", {}).items():
        for what, row in rows.items():
            print(f"{layers}, {name}: {what}: {row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})", flush=True)
    for name, rows in result.get("forced", {}).items():
        for row in rows:
            ratio = row["plain / speculative"]
            spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            print(f"{layers}, {name}, acceptance forced to {row['forced']}: plain / speculative {spread}", flush=True)


if __name__ == "__main__":
    main()
