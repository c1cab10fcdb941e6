"""The stages from a base model to R1, interrupted and resumed, and `minids r1`."""

import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import zlib

import pytest
from small_reasoner import TASK, TEXT, TOKENIZER, accept_most, small_model

from minids import __main__ as command_line
from minids.cli.r1 import r1_command
from minids.reasoning import distill, r1, r1_zero
from minids.reasoning.r1 import SHORT, STAGES, R1Recipe, R1Run, StageStopped, ledger_table
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, Response, RuleReward
from minids.reasoning.rollout import Sample, evaluate
from minids.reasoning.sft import read_examples
from minids.reasoning.trainer import RLRecipe
from minids.training.checkpoint import latest_checkpoint, load_checkpoint

TINY = R1Recipe(
    base_steps=2, student_steps=2, rl_steps=2, final_rl_steps=1, worked_solutions=5, cold_start_epochs=1,
    rejection_problems=5, attempts=2, general_documents=3, sft_epochs=1, distillation_problems=5,
    distillation_epochs=2, evaluation_problems=3, evaluation_samples=2,
)  # fmt: skip


# The chain


def shrink(monkeypatch):
    """Stages of seconds: short answers, few of them, and rules that accept what a model without training writes."""
    monkeypatch.setattr(r1, "pretraining_text", lambda task, seed: TEXT)
    sizes = dict(batch_size=2, checkpoint_every=1, evaluate_every=1, evaluation_batches=1)
    monkeypatch.setattr(r1, "BASE_RECIPE", dataclasses.replace(r1_zero.BASE_RECIPE, **sizes))
    monkeypatch.setattr(r1, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(r1, "RuleReward", lambda weights: accept_most)

    def rl_recipe(**options):
        sizes = dict(prompts=2, group_size=2, max_new_tokens=6, evaluation_samples=1, checkpoint_every=1)
        return RLRecipe(**options | sizes | {"evaluation_problems": 2})

    monkeypatch.setattr(r1, "RLRecipe", rl_recipe)
    original = r1.sft_recipe
    monkeypatch.setattr(
        r1, "sft_recipe", lambda count, **options: dataclasses.replace(
            original(count, **options, batch_size=2), checkpoint_every=1, evaluation_batches=1),
    )  # fmt: skip


@pytest.fixture
def tiny_world(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A chain that was left alone."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        rows = R1Run(directory, TINY, progress=False).run()
    assert [row["stage"] for row in rows] == list(STAGES)
    return directory


def contents(directory):
    """Everything that a run leaves and that must not depend on how often it was killed."""
    found = {}
    for name in STAGES:
        here = directory / name
        row = json.loads((here / "row.json").read_text())
        row.pop("cpu_seconds")
        found[name, "row"] = row
        steps = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
        found[name, "steps"] = [(m["step"], m.get("loss"), m.get("reward")) for m in steps]
        for file in ("examples.jsonl", "attempts.jsonl", "reasons.json", "held_out.jsonl"):
            found[name, file] = (here / file).read_bytes() if (here / file).exists() else None
        tensors, _ = load_checkpoint(latest_checkpoint(here / "checkpoints"))
        found[name, "weights"] = {key: tensor.tolist() for key, tensor in tensors["model"].items()}
    return found


def run_until_killed(directory, events):
    """Go on with the run, and die of SIGKILL at the given number of writes and samplings."""
    left = iter(range(events, 0, -1))

    def mortal(function):
        def call(*args, **options):
            if next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.fsync, distill.answer, distill.as_lines = map(mortal, (os.fsync, distill.answer, distill.as_lines))
    R1Run(directory, TINY, progress=False).run()


def test_a_chain_killed_again_and_again_ends_as_one_left_alone(tmp_path, tiny_world, whole):
    fork, deaths = multiprocessing.get_context("fork"), 0
    for events in (3, 31, 60, 85, 10_000):
        child = fork.Process(target=run_until_killed, args=(tmp_path / "killed", events))
        child.start()
        child.join()
        deaths += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            break
    assert deaths == 4 and child.exitcode == 0
    assert contents(tmp_path / "killed") == contents(whole)


def test_a_stopped_stage_goes_on_from_its_checkpoint(tmp_path, tiny_world, monkeypatch):
    def stop(metrics):
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    run, taken, original = R1Run(tmp_path, TINY, progress=False), [], r1.Trainer.train_step
    with pytest.raises(KeyboardInterrupt):
        STAGES["base"].make(run).run(directory=tmp_path / "base", progress=False, on_step=stop)
    monkeypatch.setattr(r1.Trainer, "train_step", lambda self: taken.append(self.step) or original(self))
    (row,) = run.run(["base"])
    assert taken == [1]  # the second step, of two
    assert row["cpu_seconds"] is None


def test_a_stage_runs_singly_with_what_it_needs_and_only_once(tmp_path, tiny_world):
    run = R1Run(tmp_path, TINY, progress=False)
    assert [row["stage"] for row in run.run(["reasoning_rl"])] == ["base", "cold_start", "reasoning_rl"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    run.run(["base", "cold_start"])
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "ledger.json").read_text()) == run.ledger()
    table = ledger_table(run.ledger()).splitlines()
    assert [line.split()[0] for line in table] == ["stage", "base", "cold_start", "reasoning_rl"]
    figures = run.ledger()[2]
    assert table[3].split()[1:4] == [f"{figures[name]:.3g}" for name in ("pass@1", "pass@2", "cons@2")]


def test_stages_start_where_the_paper_says():
    starts = {name: stage.needs for name, stage in STAGES.items()}
    assert starts["zero"] == starts["cold_start"] == ("base",)
    assert starts["reasoning_rl"] == ("cold_start",) and starts["r1"] == ("rejection_sft",)
    assert starts["rejection_sft"] == ("base", "reasoning_rl")


def test_examples_never_hold_a_held_out_problem(whole):
    for stage in ("cold_start", "rejection_sft", "student_sft"):
        examples = read_examples(whole / stage / "examples.jsonl")
        assert examples and all(zlib.crc32(example.prompt.encode()) % 10 for example in examples)
    attempts = (whole / "rejection_sft" / "attempts.jsonl").read_text().splitlines()
    kept = json.loads((whole / "rejection_sft" / "reasons.json").read_text())["kept"]
    assert len(attempts) == 10 and len(read_examples(whole / "rejection_sft" / "examples.jsonl")) == kept + 3


def test_the_final_rl_asks_short_problems_too(whole, tiny_world):
    run = R1Run(whole, TINY, progress=False)
    final, reasoning = STAGES["r1"].make(run), run.rl("base", R1_ZERO_WEIGHTS, 1)
    assert {p.difficulty for p in final.problems.draw(random.Random(0), 24)} == {1, 2, 3, 4, 5, 6}
    assert {p.difficulty for p in reasoning.problems.draw(random.Random(0), 24)} == {3, 4, 5, 6}


def test_a_row_agrees_with_what_its_answers_say(tmp_path, monkeypatch):
    recipe = dataclasses.replace(TINY, evaluation_problems=6, evaluation_samples=4)
    monkeypatch.setattr(r1, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(R1Run, "text", TEXT)
    run, model = R1Run(tmp_path, recipe, progress=False), small_model()
    figures, groups = run.measure(model)
    options = dict(samples=4, max_new_tokens=12)
    again = evaluate(model, TOKENIZER, TASK.held_out(6), RuleReward(r1.R1_WEIGHTS), **options)
    assert {name: figures[name] for name in again} == again
    thoughts = [sample.response.thought or "" for group in groups for sample in group]
    both = sum(bool(re.search("[a-z]{2}", t) and re.search("[\u4e00-\u9fff]", t)) for t in thoughts)
    assert figures["mixed"] == both / 24
    assert figures["web"] > 1  # bits per byte, of a model that has read nothing


def test_mixed_counts_thoughts_in_two_languages(tmp_path, monkeypatch):
    problem, reward = TASK.held_out(1)[0], RuleReward(r1.R1_WEIGHTS)
    samples = []
    for thought in (" b7+8=15 then c1 然后 d2", " b7+8=15 then c1", " b7 然后 c1", "", None):
        response = Response((1,), "", thought, None, False, True)
        samples.append(Sample(problem, [], response, [], reward([problem], [response])[0]))
    monkeypatch.setattr(r1, "answer", lambda *args, **options: [samples, samples])
    monkeypatch.setattr(R1Run, "text", TEXT)
    recipe = dataclasses.replace(TINY, evaluation_samples=5)
    figures, _ = R1Run(tmp_path, recipe, progress=False).measure(small_model())
    assert figures["mixed"] == 0.2


# The command


def test_mistakes_on_the_command_line_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "r1").mkdir(parents=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "r1.json").write_text('{"seed": ')
    mistakes = {
        ("--stages", "r2"): "there is no 'r2', only base, zero",
        (): "runs/r1 exists: choose another --name, or continue it with --resume runs/r1",
        ("--resume", "nowhere"): "nowhere is not a run: it has no run.json",
        ("--resume", "damaged"): "damaged",
    }
    for arguments, complaint in mistakes.items():
        monkeypatch.setattr("sys.argv", ["minids", "r1", *arguments])
        assert command_line.main() == 2
        said = capsys.readouterr().err
        assert complaint in said and said.count("\n") == 1
    with pytest.raises(ValueError, match="rl_steps=0: must be a whole number, at least 1"):
        R1Recipe(rl_steps=0)


def test_a_stopped_command_says_how_to_go_on(tmp_path, monkeypatch, capsys, tiny_world):
    monkeypatch.chdir(tmp_path)
    began = []

    def begin(directory, recipe, device):
        began.append(recipe)
        return R1Run(directory, TINY, progress=False)

    def stopped(self, stages):
        raise StageStopped("base")

    monkeypatch.setattr(R1Run, "begin", begin)
    monkeypatch.setattr(R1Run, "run", stopped)
    r1_command(short=True, seed=4, name="mine")
    assert "python -m minids r1 --resume runs/mine" in capsys.readouterr().out
    assert began == [dataclasses.replace(SHORT, seed=4)]
