"""What a cache of few values can hold: look-ups by different attributes with MHA, GQA, MQA and MLA.

    python benchmarks/lookups.py      eight models, three seeds each: six minutes of one core

The task and the model are in minids/course/lookups.py; all models are equally large, within 0.2 %. A seed
decides the first weights and the training queries. Results go to benchmarks/results/lookups.json: the share of correct
answers to 4,096 fresh queries, with the values cached per token and the parameters of each model.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import mean

import torch

from minids.cost import kv_values_per_layer
from minids.course.experiment import record
from minids.course.lookups import KINDS, LookupModel, lookup_accuracy

RESULTS = Path(__file__).parent / "results" / "lookups.json"


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of 256 queries")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments or None)
    torch.set_num_threads(1)
    found = {}
    for kind in options.kinds:
        began = time.process_time()
        accuracy = [lookup_accuracy(KINDS[kind], seed, options.steps) for seed in options.seeds]
        found[kind] = {
            "config": KINDS[kind].to_dict(),
            "cached_values": kv_values_per_layer(KINDS[kind]),
            "parameters": sum(p.numel() for p in LookupModel(KINDS[kind]).parameters()),
            "accuracy": accuracy,
            "cpu_seconds_per_run": (time.process_time() - began) / len(accuracy),
        }
        each = " ".join(f"{share:.3f}" for share in accuracy)
        print(f"{kind}: {found[kind]['cached_values']} values, {each}; mean {mean(accuracy):.3f}", flush=True)
    settings = {"steps": options.steps, "seeds": options.seeds, "load_average": os.getloadavg()}
    record(options.results, **settings, found=found)


if __name__ == "__main__":
    main()
