"""Training on many processes against training on one: losses, norms, biases, checkpoints; and processes that die.

Both sides train in float64. Ranks add up the same terms in another order, and AdamW divides a gradient by its own size,
so that in float32 a weight whose gradient is nearly 0 may move another way, and a token may change its expert: how far
two correct runs part would then depend on the processor. In float64 twenty steps differ by some 1e-15, and what a
mistake does (a rank's rows left out, a sum over the wrong group) by far more than `ROUNDING`.
"""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training.helpers import RECIPE, counting_data, counting_text

from minids.config import ModelConfig
from minids.data.tokenizer import load_tokenizer
from minids.model.transformer import MiniDS
from minids.parallel import launch as launch_module
from minids.parallel.launch import launch
from minids.parallel.layout import Layout
from minids.parallel.trainer import ParallelTrainer, memory, waits
from minids.training.checkpoint import latest_checkpoint, load_checkpoint
from minids.training.pretrain import Trainer
from minids.training.pretraining_run import PretrainingRun, read_text
from minids.training.run import load_run, read_metrics

# Balance and its speed weigh enough that a mistake in them shows; 3 validation rows are no multiple of any ranks.
SIZES = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, aux_loss_alpha=0.1)
WANTED = dataclasses.replace(
    RECIPE, steps=20, batch_size=8, seq_len=12, balance_speed=0.05, learning_rate=3e-3, evaluation_batches=2
)
LAYOUTS = {"dp=2": 2, "dp=4": 4, "ep=2": 2, "ep=2,dp=2": 4, "pp=2": 2, "pp=2,ep=2": 4}
ROUNDING = 1e-10
SEEN = ("loss", "mtp_loss", "balance_loss", "gradient_norm", "max_violation")


def model(layers, dtype):
    torch.manual_seed(0)
    return MiniDS(ModelConfig.preset("nano", num_hidden_layers=layers, **SIZES)).to(dtype)


def trainer(text, world, recipe=WANTED, layers=2, dtype=torch.float64, profile=False):
    """On one process of `world` that follow the layout `text`; the loop of one where it is empty."""
    if not text:
        return Trainer(model(layers, dtype), counting_data(), recipe)
    return ParallelTrainer(model(layers, dtype), counting_data(), recipe, Layout.parse(text, world), profile=profile)


def course(each, steps=20):
    """The metrics of the first steps, the bits per byte after them, and the biases that this rank holds."""
    metrics = [each.train_step() for _ in range(steps)]
    biases = {n: p.data for n, p in each.model.named_parameters() if n.endswith("router.bias") and not p.is_meta}
    return [[m[name] for name in SEEN] for m in metrics], each.evaluate(), biases


@functools.cache
def on_one_process(recipe, layers):
    return course(trainer("", 1, recipe, layers=layers))


def assert_same_course(result, expected):
    """The metrics, the bits per byte and the biases that a rank holds are those of one process."""
    (metrics, bits, biases), (its_metrics, its_bits, its_biases) = expected, result
    wanted, got = (torch.tensor(each, dtype=torch.float64) for each in (metrics, its_metrics))
    torch.testing.assert_close(got, wanted, atol=ROUNDING, rtol=0)
    assert its_bits == pytest.approx(bits, abs=ROUNDING)
    assert all(torch.equal(bias, biases[name]) for name, bias in its_biases.items())


@pytest.mark.parametrize("text", LAYOUTS)
def test_the_first_steps_equal_those_of_one_process(text):
    """Every rank reports the same, and what one process would have."""
    layers = 4 if "pp" in text else 2  # a stage has at least one, and a rank of DualPipeV two stages
    recipe = dataclasses.replace(WANTED, micro_batch_size=None if "pp" in text else 2)  # it also cuts the validation
    expected = on_one_process(recipe, layers)
    results = launch(lambda rank: course(trainer(text, LAYOUTS[text], recipe, layers=layers)), LAYOUTS[text])
    for result in results:
        assert_same_course(result, expected)
    _, _, biases = expected
    assert set().union(*(its_biases for _, _, its_biases in results)) == biases.keys()
    assert all(bias.any() for bias in biases.values())


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("text", ["ep=2,dp=2", "pp=2,ep=2"])
def test_one_step_in_few_bits_equals_that_of_one_process(text, precision):
    """Only one: afterwards their rounding differs, since the ranks cut the batch into tiles of their own.

    From float32 weights, since autocast leaves float64 as it is. Losses: sums of some hundred float32 terms of equal
    sign, a few units in the last place of 5.5 (5e-7 each); the precision itself moves them by 1e-3. Gradient norm: each
    side rounds a weight's gradient to bf16, by at most 2^-9 of it, one process once and the ranks once each.
    """
    few_bits = dataclasses.replace(WANTED, precision=precision)

    def one_step(text, recipe):
        return course(trainer(text, 4, recipe, layers=4, dtype=torch.float32), 1)[0][0]

    expected, exact = one_step("", few_bits), one_step("", WANTED)
    for metrics in launch(lambda rank: one_step(text, few_bits), 4):
        *losses, norm, violation = (a - b for a, b in zip(metrics, expected, strict=True))
        assert max(map(abs, losses)) < 1e-5 and violation == 0
        assert abs(norm) < 2 * 2**-9 * expected[SEEN.index("gradient_norm")]
    assert abs(expected[0] - exact[0]) > 3e-4, "the precision shows in the loss"


# Checkpoints ---------------------------------------------------------------------------------------------------------

SHORT = dataclasses.replace(WANTED, steps=6, micro_batch_size=1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The third step as it was written under three layouts."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(text, world):
        each = trainer(text, world, SHORT, layers=4)
        course(each, 3)
        each.save(folder / text / "checkpoints")

    for text, world in (("ep=2", 2), ("pp=2,ep=2", 4)):
        launch(lambda rank, text=text, world=world: write(text, world), world)
    alone = trainer("", 1, SHORT, layers=4)
    course(alone, 3)
    alone.save(folder / "one" / "checkpoints")
    return folder


@functools.cache
def undisturbed():
    return course(trainer("", 1, SHORT, layers=4), 6)


def resumed(text, world, checkpoint):
    """The steps after the third."""
    each = trainer(text, world, SHORT, layers=4)
    each.load(checkpoint)
    return course(each, 3)


@pytest.mark.parametrize(
    "written, read, world",
    [("ep=2", "", 1), ("pp=2,ep=2", "", 1), ("pp=2,ep=2", "dp=2", 2), ("ep=2", "pp=2", 2), ("one", "pp=2", 2)],
)
def test_a_checkpoint_goes_on_under_any_layout(checkpoints, written, read, world):
    checkpoint = latest_checkpoint(checkpoints / written / "checkpoints")
    metrics, *others = undisturbed()
    work = functools.partial(resumed, read, world, checkpoint)
    for result in launch(lambda rank: work(), world) if read else [work()]:
        assert_same_course(result, (metrics[3:], *others))


def test_a_checkpoint_of_many_looks_like_that_of_one(checkpoints):
    """The same files with the same names in them, and nothing of the shards is left."""
    one, *others = (latest_checkpoint(checkpoints / text / "checkpoints") for text in ("one", "ep=2", "pp=2,ep=2"))
    expected, _ = load_checkpoint(one)
    for checkpoint in others:
        assert {path.name for path in checkpoint.iterdir()} == {path.name for path in one.iterdir()}
        tensors, _ = load_checkpoint(checkpoint)
        for part in ("model", "optimizer"):
            assert tensors[part].keys() == expected[part].keys()
            for name, tensor in tensors[part].items():
                assert tensor.dtype == expected[part][name].dtype
                torch.testing.assert_close(tensor, expected[part][name], atol=ROUNDING, rtol=0)


# What a rank tells of itself ------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts what this rank asks of the others."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.namespace == "c10d"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("text", ["ep=2", "pp=2"])
def test_every_wait_for_others_is_exposed_communication(text):
    """Rank 1 comes two seconds late, for which rank 0 waits, less what itself is late on a busy machine."""

    def work(rank):
        each = trainer(text, 2, layers=4, profile=True)
        each.train_step()
        take_rows = each.rows
        each.rows = lambda batch: time.sleep(2 * rank) or take_rows(batch)
        with Collectives() as collectives, waits() as seconds:
            metrics = each.train_step()
        step = 8 * 12 / metrics["tokens_per_second"]
        assert len(seconds) == collectives.count
        assert metrics["exposed_communication"] * step == pytest.approx(sum(seconds), rel=0.1)
        return sum(seconds), step

    (waited, step), (late_waited, late_step) = launch(work, 2)
    assert 1 < waited < step
    assert late_waited < late_step - 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with what Linux says")
def test_the_memory_of_a_process_is_its_peak():
    released = torch.ones(50_000_000)
    del released
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024 / 1e9
    assert peak > 0.2 and memory("cpu")["memory_gb"] == pytest.approx(peak, rel=0.01)


def test_a_pipeline_in_bf16_multiplies_in_bf16():
    """In training; it is judged in float32, as on one process."""

    def work(rank):
        each = trainer("pp=2", 2, dataclasses.replace(WANTED, precision="bf16"), 4, torch.float32)
        seen = set()
        for module in (module for stage in each.parts for module in stage.modules()):
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda linear, inputs, out: seen.add((linear.training, out.dtype)))
        each.train_step()
        each.evaluate()
        return seen

    assert launch(work, 2) == [{(True, torch.bfloat16), (False, torch.float32)}] * 2


# Processes that die or hang ------------------------------------------------------------------------------------------


def test_who_hangs_is_named(monkeypatch):
    """The others wait as long as the process group allows, here two seconds, and five more for an answer."""
    monkeypatch.setattr(launch_module, "timedelta", lambda minutes: timedelta(seconds=2))

    def work(rank):
        each, calls = trainer("dp=2,ep=2", 4), []
        take_rows = each.rows

        def rows(batch):
            calls.append(batch)
            if rank == 2 and len(calls) == 2:
                time.sleep(60)
            return take_rows(batch)

        each.rows = rows
        each.run(progress=False)

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="^rank [013] failed: ConnectionError: rank 2 died or hangs since step 2: "):
        launch(work, 4)
    assert time.monotonic() - began < 30


def test_all_stop_when_one_is_asked_to(tmp_path):
    """SIGTERM to one rank: every rank leaves after the same step, and the checkpoint of that step is there."""

    def work(rank):
        each = trainer("dp=2", 2)

        def after(metrics):
            if rank == 1 and metrics["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        return len(each.run(directory=tmp_path, progress=False, on_step=after))

    assert launch(work, 2) == [3, 3]
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000003"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


# The command line ----------------------------------------------------------------------------------------------------

COMMAND = "train --preset nano --tokenizer bytes --data text.jsonl --name run --device cpu --steps 10"
COMMAND += " --batch-size 4 --seq-len 32 --warmup-steps 2 --evaluate-every 10 --checkpoint-every 3"
COMMAND += " --evaluation-batches 1"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's children in /proc")
@pytest.mark.parametrize("layout", ["pp=1,dp=1,ep=2", "pp=2,dp=1,ep=1,schedule=zb1p"])
def test_torchrun_starts_again_after_a_kill_with_the_same_curve(tmp_path, layout):
    """Killed after the fourth step, the run goes on from the third, and its result loads in one process."""
    lines = (json.dumps({"text": document.text, "domain": document.domain}) for document in counting_text())
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    agent = subprocess.Popen(
        [*torchrun, "-m", "minids", *COMMAND.split(), "--parallel", layout], cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = tmp_path / "runs/run/metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 4):
            assert agent.poll() is None, agent.stdout.read()
            time.sleep(0.02)
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        output, _ = agent.communicate(timeout=200)
    finally:
        agent.kill()
    assert agent.returncode == 0, output
    assert output.count(f"plan: 2 processes on cpu: {layout}\n") == 2  # said at each start

    run = PretrainingRun.load(tmp_path / "runs/run")
    tokenizer = load_tokenizer(tmp_path / "runs/run")
    text = read_text(dataclasses.replace(run, data=(str(tmp_path / "text.jsonl"),)), tokenizer)
    torch.manual_seed(run.recipe.seed)
    alone = Trainer(MiniDS(run.config), text, run.recipe)
    before = {name: weight.clone() for name, weight in alone.model.state_dict().items()}
    expected = [alone.train_step()["loss"] for _ in range(10)]
    lines = read_metrics(tmp_path / "runs/run")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=1e-4)
    assert lines[-1]["validation_bits_per_byte"] == pytest.approx(alone.evaluate(), abs=1e-4)
    model, _ = load_run(tmp_path / "runs/run")
    for name, weight in alone.model.state_dict().items():  # float32: what counts is how far apart beside how far moved
        apart, moved = (model.state_dict()[name] - weight).norm(), (weight - before[name]).norm()
        assert apart <= 0.01 * moved, (name, apart, moved)


@pytest.mark.parametrize(
    "recipe, layout, text",
    [(WANTED, "dp=3", "batch_size=8: must be divided evenly"), (WANTED, "dp=4", "must be the 3 processes")],
)
def test_an_impossible_layout_is_refused(recipe, layout, text):
    with pytest.raises(RuntimeError, match=text):
        launch(lambda rank: trainer(layout, 3, recipe), 3)
