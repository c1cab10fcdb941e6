"""From how many layers on do drafts pay? Speculative against plain greedy decoding, for models of different depth.

    python benchmarks/speculative_depth.py --layers 2 6

A draft costs a layer and the head, so the deeper the model, the cheaper it is beside a step. Each model is `tiny` with
another number of layers, trained on the built-in corpus; the measurement is that of `minids bench speculative`. Results
are appended to benchmarks/results/speculative_depth.jsonl.
"""

import argparse
import dataclasses
import json
import platform
import tempfile
from pathlib import Path

import torch

from minids import bench
from minids.config import ModelConfig
from minids.model.transformer import MiniDS
from minids.training.pretrain import Recipe, train
from minids.training.pretraining_run import PretrainingRun, read_text

RESULTS = Path(__file__).parent / "results" / "speculative_depth.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, learning_rate=4e-3, evaluate_every=arguments.steps)
    text = read_text(PretrainingRun(ModelConfig.preset("tiny"), recipe, ("pydocs", "stdlib")), "bpe:2048")
    for layers in arguments.layers:
        torch.manual_seed(0)
        config = ModelConfig.preset("tiny", num_hidden_layers=layers, vocab_size=text.tokenizer.vocab_size)
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(MiniDS(config), text, recipe, directory=Path(folder), progress=False)
            text.tokenizer.save(folder)
            torch.set_num_threads(1)
            rows = bench.speculation(arguments.repeats, Path(folder))
            torch.set_num_threads(threads)
        result = {
            "layers": layers,
            "validation_bits_per_byte": metrics[-1]["validation_bits_per_byte"],
            "rows": rows,
            "recipe": dataclasses.asdict(recipe),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        for row in rows:
            spread = f"{row['low']:.2f} to {row['high']:.2f}"
            print(f"{layers} layers: {row['what']}: {row['median']:.2f} ({spread})", flush=True)


if __name__ == "__main__":
    main()
