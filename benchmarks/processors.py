"""How far apart do runs with the same seed end on different processors? What chapters 05 and 09 say of it.

    python -m benchmarks.processors        about fifteen minutes of two cores

Each training runs with seed 0 on every processor of tests/processors.py, the imitated ones included:
"pretraining" is the one of chapter 05 (240 steps; bits per byte), "drafts" the one of chapter 04 (200 steps; share of
the drafts that is accepted when sampling) and "r1_zero" that of chapter 09 (the base and 60 steps of
reinforcement learning; pass@1). Results go to benchmarks/results/processors.json, together with the real processor.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.mtp import VARIANTS, measure, train
from minids.config import ModelConfig
from minids.course.experiment import builtin_text, record, trial
from minids.reasoning.r1_zero import base_trainer, rule_reward
from minids.reasoning.tasks import TraceTask
from minids.reasoning.trainer import RLRecipe, RLTrainer
from minids.training.pretrain import Recipe
from tests import gradient_noise
from tests.processors import PROCESSORS

RESULTS = Path(__file__).parent / "results" / "processors.json"


def pretraining() -> dict[str, float]:
    """Chapter 05's model after its 240 steps."""
    data = builtin_text("bpe:1024")
    config = ModelConfig.preset("nano", vocab_size=data.tokenizer.vocab_size, num_hidden_layers=2)
    recipe = Recipe(steps=240, batch_size=16, seq_len=64, warmup_steps=10, evaluate_every=240, evaluation_batches=100)
    return {"bits per byte": trial(config, data, recipe).validation}


def drafts() -> dict[str, float]:
    """Chapter 04's model with one prediction module after its 200 steps."""
    model, bits = train(VARIANTS["MTP"], data := builtin_text(), steps=200, seed=0)
    measured = measure(model, data)
    accepted = {f"accepted, {way}": measured[way][0] for way in ("sampled", "greedy")}
    return {"bits per byte": bits} | accepted


def r1_zero() -> dict[str, float]:
    """Chapter 09's base, and what reinforcement learning makes of it."""
    task = TraceTask()
    pretrainer = base_trainer(task)
    pretrainer.run(progress=False)
    learner = RLTrainer(pretrainer.model, task.tokenizer, task, rule_reward("trace"), RLRecipe())
    before = learner.evaluate()["held_out/pass@1"]
    for _ in range(RLRecipe().steps):
        learner.train_step()
    return {"pass@1 of the base": before, "pass@1 after 60 steps": learner.evaluate()["held_out/pass@1"]}


TRAININGS = {"pretraining": pretraining, "drafts": drafts, "r1_zero": r1_zero}


def on(processor: str, training: str) -> dict[str, float]:
    """The figures of one training, run in a process of its own that takes this one for `processor`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | PROCESSORS[processor]
    command = [sys.executable, "-m", "benchmarks.processors", training]
    figures = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{training}, {processor}: {figures}", flush=True)
    return figures


def real_processor() -> str:
    """Its name, where Linux tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return f"{found.get('model name', 'unknown')}, family {found.get('cpu family')}, model {found.get('model')}"


def main(*arguments: str) -> None:
    if arguments:
        torch.set_num_threads(1)
        if seed := os.environ.get("MINIDS_GRADIENT_NOISE"):
            gradient_noise.install(int(seed))
        print(json.dumps(TRAININGS[arguments[0]]()))
        return
    pairs = [(processor, training) for training in reversed(TRAININGS) for processor in PROCESSORS]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(pairs, pool.map(lambda pair: on(*pair), pairs), strict=True))
    trainings = {name: {processor: found[processor, name] for processor in PROCESSORS} for name in TRAININGS}
    command = "python -m benchmarks.processors"
    record(RESULTS, command=command, processor=real_processor(), emulations=PROCESSORS, trainings=trainings)


if __name__ == "__main__":
    main(*sys.argv[1:])
