"""Which small model learns most in two minutes on two CPU cores? The experiment behind the preset `tiny`.

    python benchmarks/tiny_size.py --names bytes-128x6 bpe2048-192x4

Every candidate gets the same time (steps are timed first, and the schedule is cut to the number that fits), trains on
the built-in corpus with the same recipe, and is judged by bits per byte on the held-out text.
Results are appended to benchmarks/results/tiny_size.jsonl, with seed, versions and the candidate's config.
"""

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from minids.config import ModelConfig
from minids.data.batches import tokenize
from minids.data.corpus import read_documents, split_documents
from minids.data.tokenizer import BPETokenizer, ByteTokenizer
from minids.inference.generate import Sampling, generate
from minids.model.transformer import MiniDS
from minids.training.pretrain import Recipe, TextData, Trainer, train

RESULTS = Path(__file__).parent / "results" / "tiny_size.jsonl"


def candidate(name: str) -> tuple[str, ModelConfig, Recipe]:
    """Read a name such as bpe2048-192x4-e16x64k4-b16x256-lr3: tokenizer, width x layers, experts, batch, 1e-3 rate."""
    parts = name.split("-")
    width, layers = map(int, parts[1].split("x"))
    options = {part[0]: part[1:] for part in parts[2:] if not part.startswith("lr")}
    rate = next((float(part[2:]) for part in parts if part.startswith("lr")), 3.0)
    experts, inner_k = options.get("e", f"16x{width // 2}k4").split("x")
    inner, k = map(int, inner_k.split("k"))
    batch, seq_len = map(int, options.get("b", "16x256").split("x"))
    vocab = {"bytes": 272}.get(parts[0]) or int(parts[0].removeprefix("bpe"))
    config = ModelConfig.preset(
        "tiny", vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, intermediate_size=3 * width,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, q_lora_rank=width // 2,
        kv_lora_rank=max(width // 4, 32), moe_intermediate_size=inner, n_routed_experts=int(experts),
        num_experts_per_tok=k,
    )  # fmt: skip
    return parts[0], config, Recipe(batch_size=batch, seq_len=seq_len, learning_rate=rate * 1e-3, warmup_steps=30)


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    documents = list(itertools.chain(read_documents("pydocs"), read_documents("stdlib")))
    training, validation = split_documents(documents)
    for name in arguments.names:
        kind, config, recipe = candidate(name)
        tokenizer = (
            ByteTokenizer()
            if kind == "bytes"
            else BPETokenizer.train((d.text for d in training), int(kind.removeprefix("bpe")))
        )
        data = TextData(tokenize(training, tokenizer), tokenize(validation, tokenizer), tokenizer)
        torch.manual_seed(arguments.seed)
        trial = Trainer(MiniDS(config), data, recipe)
        steps = int(arguments.seconds / median(seconds(trial.train_step) for _ in range(20)))

        torch.manual_seed(arguments.seed)
        model = MiniDS(config)
        recipe = replace(recipe, steps=steps, evaluate_every=steps, evaluation_batches=64)
        began = time.perf_counter()
        metrics = train(model, data, recipe, progress=False)
        prompt = [tokenizer.bos_id, *tokenizer.encode("The with statement ")]
        sample = generate(model.eval(), [prompt], max_new_tokens=60, sampling=Sampling(0.0))[0]
        result = {
            "name": name,
            "validation_bits_per_byte": metrics[-1]["validation_bits_per_byte"],
            "steps": steps,
            "tokens": metrics[-1]["tokens"],
            "seconds": time.perf_counter() - began,
            "threads": arguments.threads,
            "max_violation": metrics[-1]["max_violation"],
            "parameters": model.num_parameters(),
            "active_parameters": model.num_active_parameters(),
            "seed": arguments.seed,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "config": config.to_dict(),
            "sample": tokenizer.decode(sample),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{name:36} {result['validation_bits_per_byte']:.4f} bits/byte, {steps} steps", flush=True)


if __name__ == "__main__":
    main()
