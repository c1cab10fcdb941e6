"""From how many layers on do drafts pay? Speculative against plain decoding, for models of different depth.

    python benchmarks/speculative_depth.py --layers 2 6 --steps 700

A draft costs a layer and the head, so the deeper the model, the cheaper it is beside a step. Each model is `tiny` with
another number of layers, trained on the built-in corpus. Measured at batch 1 on held-out prompts, at temperature 0.8
and greedy: CPU seconds of plain over speculative decoding, taking turns, and the acceptance rate of the first draft.
Greedy text of a small model falls into loops, where drafts are accepted nearly always or never, so the rate is also
measured teacher-forced: the mean of sum(min(p, q)) over held-out text, the probability that a draft from q is accepted.
Results are appended to benchmarks/results/speculative_depth.jsonl.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from minids.config import ModelConfig
from minids.data.batches import evaluation_batches
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


def measure(model: MiniDS, prompts: list[list[int]], sampling: Sampling, tokens: int, repeats: int) -> dict:
    """Plain over speculative decoding, one ratio per round after a first pair, and the acceptance rate by prompt."""
    ratios, rates = [], []
    for seed in range(repeats + 1):
        seconds = []
        for speculative in (False, True):
            generator, began = torch.Generator().manual_seed(seed), time.process_time()
            for prompt in prompts:
                options = dict(max_new_tokens=tokens, sampling=sampling, generator=generator)
                if speculative:
                    _, acceptance = generate_speculatively(model, [prompt], **options)
                    rates += [acceptance.rate()] if acceptance.rounds else []
                else:
                    generate(model, [prompt], **options)
            seconds.append(time.process_time() - began)
        ratios.append(seconds[0] / seconds[1])
    found = {"plain / speculative": ratios[1:], "acceptance rate": rates}
    return {
        what: {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}
        for what, figures in found.items()
    }


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, required=True)
    parser.add_argument("--steps", type=int, default=400, help="of training")
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
        steps=options.steps, batch_size=options.batch_size, seq_len=options.seq_len, learning_rate=4e-3,
        warmup_steps=min(Recipe.warmup_steps, options.steps), evaluate_every=options.steps,
    )  # fmt: skip
    run = PretrainingRun(ModelConfig.preset("tiny"), recipe, ("pydocs", "stdlib"), options.max_bytes)
    text = read_text(run, options.tokenizer)
    threads = torch.get_num_threads()
    for layers in options.layers:
        torch.manual_seed(0)
        model = MiniDS(ModelConfig.preset("tiny", num_hidden_layers=layers, vocab_size=text.tokenizer.vocab_size))
        metrics = train(model, text, recipe, progress=False)
        model.eval()
        torch.set_num_threads(1)
        prompts = held_out_prompts(text, options.prompts)
        result = {
            "layers": layers,
            "validation_bits_per_byte": metrics[-1]["validation_bits_per_byte"],
            "teacher_forced_acceptance": {
                name: teacher_forced_acceptance(model, text, sampling, options.seq_len)
                for name, sampling in SAMPLINGS.items()
            },
            "decoding": {
                name: measure(model, prompts, sampling, options.tokens, options.repeats)
                for name, sampling in SAMPLINGS.items()
            },
            "recipe": dataclasses.asdict(recipe),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        torch.set_num_threads(threads)
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        for name, rate in result["teacher_forced_acceptance"].items():
            print(f"{layers} layers, {name}: acceptance on held-out text {rate:.2f}", flush=True)
        for name, rows in result["decoding"].items():
            for what, row in rows.items():
                spread = f"{row['low']:.2f} to {row['high']:.2f}"
                print(f"{layers} layers, {name}: {what}: {row['median']:.2f} ({spread})", flush=True)


if __name__ == "__main__":
    main()
