"""Compiled layers take the steps of plain ones; evaluation and checkpoints know nothing of it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minids.config import ModelConfig
from minids.model.transformer import MiniDS
from minids.training.compile import check_compiled, compile_layers

TESTS = Path(__file__).parents[1]

STEPS = """
import dataclasses, json, torch
from training.helpers import RECIPE, counting_data, nano
from minids.training.pretrain import Trainer

torch.set_num_threads(1)
recipe, found = dataclasses.replace(RECIPE, steps=2, evaluate_every=1), {}
for compiled in (False, True):
    torch.manual_seed(0)
    trainer = Trainer(nano(first_k_dense_replace=0, num_nextn_predict_layers=0), counting_data(), recipe, compiled)
    found[compiled] = {"metrics": trainer.run(progress=False), "names": list(trainer.model.state_dict())}
counters = torch._dynamo.utils.counters
graphs = counters["stats"]["unique_graphs"]
trainer.evaluate()
found["graphs"] = graphs, counters["stats"]["unique_graphs"] - graphs, dict(counters["graph_break"])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A plain and a compiled trainer, two steps and evaluations each, without the tests' shape checks.

    With a cache of its own: PyTorch's holds code of the processor that filled it, also where another one is imitated.
    """
    paths = {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    environment = os.environ | paths | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    return json.loads(subprocess.check_output([sys.executable, "-c", STEPS], text=True, env=environment))


def test_a_compiled_step_equals_a_plain_one(found):
    """Up to the order of sums: some 100 operations in a row with rounding errors of 6e-8."""
    for before, after in zip(found["false"]["metrics"], found["true"]["metrics"], strict=True):
        for name in ("loss", "balance_loss", "gradient_norm", "validation_bits_per_byte"):
            assert after[name] == pytest.approx(before[name], rel=1e-5), name


def test_the_layers_are_compiled_whole_and_once(found):
    """The two layers share one graph, and the trial of the compiler has another; evaluation makes none."""
    assert found["graphs"] == [2, 0, {}]
    assert found["true"]["names"] == found["false"]["names"]


@pytest.mark.parametrize(
    "losses, norms", [((2.0, 2.1), (1.0, 1.0)), ((2.0, math.nan), (1.0, 1.0)), ((2.0, 2.0), (1.0, 1.1))]
)
def test_wrong_code_of_the_compiler_is_noticed(losses, norms):
    model, loss, norm = MiniDS(ModelConfig.preset("nano")), iter(losses), iter(norms)

    def backward():
        model.norm.weight.grad = next(norm) * torch.nn.functional.one_hot(torch.tensor(0), 64).float()
        return next(loss)

    with pytest.raises(ValueError, match="compile: wrong results"):
        check_compiled(model, backward)
    losses, norms = (2.0, 2.0), (1.0, 1.0)
    loss, norm = iter(losses), iter(norms)
    check_compiled(model, backward)


def test_fp8_is_refused():
    with pytest.raises(ValueError, match="compile: not possible with precision='fp8'"):
        compile_layers(MiniDS(ModelConfig.preset("nano")), "fp8")


def test_without_a_compiler_nothing_is_made(tmp_path):
    command = [sys.executable, "-m", "minids", "train", "--preset", "nano", "--steps", "1", "--compile"]
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = ["--max-bytes", "100000", "--tokenizer", "bytes"]
    finished = subprocess.run(command + options, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 2
    lines = finished.stderr.splitlines()
    assert "compile: the C++ compiler failed" in lines[-1] and "install g++ or set CXX" in lines[-1]
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
