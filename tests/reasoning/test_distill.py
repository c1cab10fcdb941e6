"""Rejection sampling and distillation by logits."""

import dataclasses
import json
import math
import random
from collections import Counter

import pytest
import torch
from small_reasoner import GOOD, TASK, TEXT, TOKENIZER, accept_most, small_model

from minids.model.transformer import MiniDS
from minids.reasoning import distill
from minids.reasoning.distill import Attempt, LogitTrainer, distillation_loss, rejection_sample, sample_attempts, select
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward
from minids.reasoning.sft import careful_solutions, sft_recipe
from minids.training.loss import IGNORED, targets

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
    with pytest.raises(ValueError, match="vocab_size=55.*64"):
        LogitTrainer(small_model(), wide, examples, TEXT, recipe)
