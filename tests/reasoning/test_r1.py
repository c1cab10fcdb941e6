import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import signal
import zlib
from collections import Counter

import pytest
import torch

from minids import __main__ as command_line
from minids.inference.generate import Sampling, generate
from minids.model.transformer import MiniDS
from minids.reasoning import budget, commands, distill, r1, zero
from minids.reasoning.budget import answer_within, consensus, majority_vote
from minids.reasoning.distill import Attempt, LogitTrainer, distillation_loss, rejection_sample, sample_attempts, select
from minids.reasoning.r1 import SHORT, STAGES, R1Recipe, R1Run, ledger_table
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, Response, RuleReward, Score
from minids.reasoning.rl import RLRecipe
from minids.reasoning.rollout import Sample, evaluate
from minids.reasoning.sft import careful_solutions, read_examples, sft_recipe
from minids.reasoning.tasks import Problem, TraceTask
from minids.training.checkpoint import latest_checkpoint, load_checkpoint
from minids.training.loss import IGNORED, targets

TASK = TraceTask()
TOKENIZER = TASK.tokenizer
TEXT = zero.web_text(TASK, rows=20)
GOOD = {"accuracy": 1.0, "format": 1.0, "language": 1.0}
TINY = R1Recipe(
    base_steps=2, student_steps=2, rl_steps=2, final_rl_steps=1, worked_solutions=5, cold_start_epochs=1,
    rejection_problems=5, attempts=2, general_documents=3, sft_epochs=1, distillation_problems=5,
    distillation_epochs=2, evaluation_problems=3, evaluation_samples=2,
)  # fmt: skip


def small_model(seed=0):
    torch.manual_seed(seed)
    config = zero.base_config(TOKENIZER.vocab_size)
    return MiniDS(config.replace(hidden_size=32, moe_intermediate_size=32, num_hidden_layers=2))


def accept_most(problems, responses):
    """Something for models to be accepted by that have learned nothing: three answers in four, by their tokens."""
    rights = [float(sum(response.tokens) % 4 > 0) for response in responses]
    return [Score(GOOD | {"accuracy": right, "format": right}, right) for right in rights]


# Rejection sampling


def test_answers_are_dropped_for_the_first_reason_that_holds():
    attempts = [
        Attempt("p", "a", GOOD),
        Attempt("p", "b", GOOD | {"accuracy": 0.0, "format": 0.0}),
        Attempt("p", "c", GOOD | {"format": 0.0, "language": 0.0}),
        Attempt("p", "d", GOOD | {"language": 0.5}),
        Attempt("p", "a", GOOD),
        Attempt("p", "e", GOOD),
        Attempt("p", "f", GOOD),
        Attempt("q", "a", GOOD),
    ]
    expected = ["kept", "wrong", "form", "language", "duplicate", "kept", "enough", "kept"]
    assert select(attempts, per_problem=2) == expected
    assert set(expected) == set(distill.REASONS)


def test_a_cut_off_file_of_attempts_is_completed_as_if_it_had_not_been(tmp_path):
    model, problems = small_model(), TASK.draw(random.Random(0), 7)
    options = dict(samples=2, seed=3, at_once=3, max_new_tokens=6, progress=False)
    whole = sample_attempts(model, TOKENIZER, problems, accept_most, tmp_path / "whole", **options)
    content = (tmp_path / "whole").read_bytes()
    assert [attempt.prompt for attempt in whole] == [p.prompt for p in problems for _ in range(2)]
    assert len({attempt.answer for attempt in whole}) > 7
    assert b"\\u" in content and content.isascii()  # both languages, and no character that could be cut in half
    for cut in (0, 1, len(content) // 3, len(content) // 2, len(content) - 1, len(content)):
        (tmp_path / "cut").write_bytes(content[:cut])
        again = sample_attempts(model, TOKENIZER, problems, accept_most, tmp_path / "cut", **options)
        assert again == whole and (tmp_path / "cut").read_bytes() == content
    other = sample_attempts(model, TOKENIZER, problems, accept_most, tmp_path / "other", **options | {"seed": 4})
    assert other != whole


def test_rejection_sampling_keeps_what_rules_accept(tmp_path):
    options = dict(samples=4, kept_of_each=2, max_new_tokens=6, progress=False)
    problems = TASK.draw(random.Random(0), 4)
    kept = rejection_sample(small_model(), TOKENIZER, problems, accept_most, tmp_path, **options)
    attempts = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    right = {(a["prompt"], a["answer"]) for a in attempts if a["parts"]["accuracy"] == 1}
    assert {(example.prompt, example.answer) for example in kept} <= right
    assert max(Counter(example.prompt for example in kept).values()) == 2
    reasons = json.loads((tmp_path / "reasons.json").read_text())
    assert reasons["kept"] == len(kept) and sum(reasons.values()) == 16
    with pytest.raises(ValueError, match="rules accept none of 16 answers"):
        rules = RuleReward(R1_ZERO_WEIGHTS)
        rejection_sample(small_model(), TOKENIZER, problems, rules, tmp_path / "..", **options)


# Distillation by logits


def test_distillation_loss_is_the_divergence_of_the_student_from_the_teacher():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    for temperature in (1.0, 2.5):
        p, q = ((x / temperature).exp() / (x / temperature).exp().sum(1, keepdim=True) for x in (teacher, student))
        expected = temperature**2 * sum(p[t, v] * math.log(p[t, v] / q[t, v]) for t in range(5) for v in range(7))
        found = distillation_loss(student, teacher, temperature)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_learning_from_logits_takes_the_teacher_s_distribution_on_answers_only():
    examples = careful_solutions(TASK, random.Random(0), 6, (1, 3), widths=(1,))
    recipe = dataclasses.replace(sft_recipe(6, epochs=12, learning_rate=1e-2, batch_size=6), evaluation_batches=1)
    teacher = small_model(1)
    student = LogitTrainer(small_model(2), teacher, examples, TEXT, recipe)
    batch = student.stream.batch(0)
    sums, loads = student.backward(batch, 0.0)
    gradient = student.model.head.weight.grad.clone()
    twin, answered = small_model(2), targets(batch) != IGNORED
    q, p = (m(batch.tokens[:, :-1]).logits[answered].softmax(-1) for m in (twin, teacher))
    loss = (p.detach() * (p.detach() / q).log()).sum(-1).mean()
    loss.backward()
    assert sums.main.item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(gradient, twin.head.weight.grad, atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for p in teacher.parameters())
    student.model.zero_grad()
    history = student.run(progress=False)
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    wide = MiniDS(teacher.config.replace(vocab_size=64))
    with pytest.raises(ValueError, match="vocab_size=55.*64 tokens"):
        LogitTrainer(small_model(), wide, examples, TEXT, recipe)


# Thinking at test time


def test_a_thought_is_cut_at_its_budget_and_answered():
    model, problems = small_model().eval(), TASK.held_out(4)
    thoughts = {}
    for tokens in (0, 3, 9):
        options = dict(thought_tokens=tokens, answer_tokens=5, temperature=0.0)
        groups = answer_within(model, TOKENIZER, problems, accept_most, 2, **options)
        assert [s.problem for group in groups for s in group] == [p for p in problems for _ in range(2)]
        thoughts[tokens] = []
        for sample in (group[0] for group in groups):
            begun, _, rest = sample.response.text.removeprefix("<think>").partition("</think><answer>")
            thoughts[tokens].append(begun)
            inside = TOKENIZER.encode(begun)
            assert len(inside) <= tokens and sample.response.text.startswith("<think>")
            asked = [TOKENIZER.bos_id, *TOKENIZER.encode(sample.problem.prompt), TOKENIZER.token_id("<think>"), *inside]
            asked += [TOKENIZER.token_id("</think>"), TOKENIZER.token_id("<answer>")]
            (alone,) = generate(model, [asked], max_new_tokens=5, sampling=Sampling(0.0), stop=[TOKENIZER.eos_id])
            assert TOKENIZER.decode(alone, skip_special=False).startswith(rest.removesuffix("<eos>"))
    assert thoughts[0] == [""] * 4 and any(thoughts[3])
    assert all(long.startswith(short) for short, long in zip(thoughts[3], thoughts[9], strict=True))


def test_a_thought_that_ends_by_itself_is_not_filled_up(monkeypatch):
    close, eos = TOKENIZER.token_id("</think>"), TOKENIZER.eos_id
    seven, eight, nine = map(TOKENIZER.encode, "789")
    drawn = iter([[[*seven, close], [*eight, eos, *nine]], [[eos]] * 2])
    monkeypatch.setattr(budget, "sample", lambda *args, **options: (next(drawn), []))
    problems = TASK.held_out(2)
    groups = answer_within(small_model(), TOKENIZER, problems, accept_most, 1, thought_tokens=9)
    texts = [group[0].response.text for group in groups]
    assert texts == ["<think>7</think><answer><eos>", "<think>8</think><answer><eos>"]


def sample_of(text, right=0.0):
    response = Response((), "", None, text, text is not None, True)
    return Sample(Problem("?"), [], response, [], Score({"accuracy": right}, right))


def test_what_cannot_be_read_has_no_vote():
    unreadable, five, six = sample_of(None), sample_of("5"), sample_of("6", 1.0)
    assert majority_vote([unreadable, unreadable, unreadable, six]) is six
    assert majority_vote([unreadable]) is None and majority_vote([]) is None
    assert majority_vote([five, six, sample_of(" 6 ")]) is six
    assert majority_vote([six, five]) is six and majority_vote([five, six]) is five


def test_consensus_counts_votes_of_disjoint_samples():
    five, six, nothing = sample_of("5"), sample_of("6", 1.0), sample_of(None)
    groups = [[six, five, six, five, five, six, six], [nothing, nothing, nothing, six, five, five, five]]
    assert consensus(groups, 1) == [pytest.approx(4 / 7), pytest.approx(1 / 7)]
    assert consensus(groups, 3) == [0.5, 0.0]
    assert consensus(groups, 2) == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    with pytest.raises(ValueError, match="voters=8: must be at least 1, and at most the 7 samples"):
        consensus(groups, 8)


# The chain


def shrink(monkeypatch):
    """Stages of seconds: short answers, few of them, and rules that accept what a model without training writes."""
    monkeypatch.setattr(r1, "web_text", lambda task, seed: TEXT)
    sizes = dict(batch_size=2, checkpoint_every=1, evaluate_every=1, evaluation_batches=1)
    monkeypatch.setattr(r1, "BASE_RECIPE", dataclasses.replace(zero.BASE_RECIPE, **sizes))
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
        STAGES["base"](run).run(directory=tmp_path / "base", progress=False, on_step=stop)
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
    final, reasoning = STAGES["r1"](run), run.rl("base", R1_ZERO_WEIGHTS, 1)
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
        (): "runs/r1 exists: choose another --name, or go on with --resume runs/r1",
        ("--resume", "nowhere"): "nowhere is no run of r1",
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

    def begin(directory, recipe):
        began.append(recipe)
        return R1Run(directory, TINY, progress=False)

    def stopped(self, stages):
        raise KeyboardInterrupt

    monkeypatch.setattr(R1Run, "begin", begin)
    monkeypatch.setattr(R1Run, "run", stopped)
    commands.r1_command(short=True, seed=4, name="mine")
    assert "python -m minids r1 --resume runs/mine" in capsys.readouterr().out
    assert began == [dataclasses.replace(SHORT, seed=4)]
