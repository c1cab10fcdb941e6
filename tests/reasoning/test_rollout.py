"""Sampled answers, their log-probabilities, and what is measured of them."""

import random

import pytest
import torch
from small_reasoner import TASK, evens, small_model

from minids.reasoning import rollout
from minids.reasoning.rewards import Score
from minids.reasoning.rollout import answer, averages, evaluate, mean_with_interval, pad, pass_at_k, sample, token_logps


def prompts(count):
    problems = TASK.draw(random.Random(0), count)
    return [[TASK.tokenizer.bos_id, *TASK.tokenizer.encode(problem.prompt)] for problem in problems]


def test_sampled_logps_are_those_of_training_and_of_a_forward_pass_of_each_sequence():
    """PITFALLS m: one position off would be far away. Several lengths, another temperature than 1."""
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    model.eval()
    groups = answer(
        model, TASK.tokenizer, TASK.draw(random.Random(0), 3), evens, 3, max_new_tokens=9, temperature=0.7,
        generator=generator,
    )  # fmt: skip
    samples = [s for group in groups for s in group]
    batch = pad(samples)
    logp, entropy, _ = token_logps(model.train(), batch.tokens, 0.7)
    torch.testing.assert_close(logp[batch.mask], batch.old_logp[batch.mask], rtol=0, atol=1e-5)
    for row, s in enumerate(samples):
        tokens = torch.tensor([[*s.prompt, *s.response.tokens]])
        p = (model(tokens).logits[0].double() / 0.7).softmax(-1)
        first = len(s.prompt)
        expected = [p[first + i - 1, token].log().item() for i, token in enumerate(s.response.tokens)]
        assert s.logps == pytest.approx(expected, abs=1e-5)
        assert batch.mask[row].sum() == len(s.response.tokens)
        at = first - 1
        assert entropy[row, at].item() == pytest.approx(-(p[at] * p[at].log()).sum().item(), abs=1e-5)


def test_rollouts_stop_each_for_itself_and_keep_to_the_memory(monkeypatch):
    model = small_model().eval()
    of_one = model.new_cache(1, max(map(len, prompts(7))) + 30).num_bytes()
    held = []

    def watched(model, some, **options):
        held.append(model.new_cache(len(some), max(map(len, some)) + options["max_new_tokens"]).num_bytes())
        return original(model, some, **options)

    original = rollout.stream
    monkeypatch.setattr(rollout, "stream", watched)
    options = dict(max_new_tokens=30, stop=TASK.tokenizer.eos_id, generator=torch.Generator().manual_seed(2))
    tokens, logps = sample(model, prompts(7), max_cache_bytes=3 * of_one, **options)
    assert len(held) == 3 and max(held) <= 3 * of_one
    assert [len(t) for t in tokens] == [len(p) for p in logps]
    ends = [t.index(TASK.tokenizer.eos_id) for t in tokens if TASK.tokenizer.eos_id in t]
    assert ends and all(len(t) == 30 or t[-1] == TASK.tokenizer.eos_id for t in tokens)
    assert all(t.count(TASK.tokenizer.eos_id) <= 1 for t in tokens)
    with pytest.raises(ValueError, match="max_cache_bytes=10: the cache of one sequence"):
        sample(model, prompts(1), max_cache_bytes=10, **options)


def test_narrow_rows_hold_what_the_wide_ones_did():
    groups = answer(small_model().eval(), TASK.tokenizer, TASK.draw(random.Random(0), 2), evens, 3, max_new_tokens=12)
    batch = pad([s for group in groups for s in group])
    rows = torch.tensor([2, 0])
    part = batch.rows(rows)
    seq = part.mask.shape[1]
    assert part.mask.any(0)[-1] and not batch.mask[rows, seq:].any()
    assert torch.equal(part.tokens, batch.tokens[rows, : seq + 1])


def test_pass_at_k_counts_draws_without_replacement():
    hits = [1, 0, 0, 1, 0]
    pairs = [(i, j) for i in range(5) for j in range(i)]
    assert pass_at_k(5, 2, 2) == pytest.approx(sum(hits[i] or hits[j] for i, j in pairs) / len(pairs))
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4) and pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 1, 4) == 1


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    rng = random.Random(0)
    covered = 0
    for _ in range(500):
        mean, half = mean_with_interval([float(rng.random() < 0.3) for _ in range(100)])
        covered += abs(mean - 0.3) <= half
    assert covered / 500 == pytest.approx(0.95, abs=0.03)


def test_evaluation_counts_what_the_reward_says():
    def first_is_right(problems, responses):
        return [Score({"accuracy": float(i % 2 == 0)}, 0.5) for i in range(len(responses))]

    model = small_model().eval()
    metrics = evaluate(model, TASK.tokenizer, TASK.held_out(6), first_is_right, samples=2, max_new_tokens=3)
    assert metrics["pass@1"] == 0.5 and metrics["pass@2"] == 1.0 and metrics["pass@1_interval"] == 0
    assert metrics["reward"] == 0.5 and 1 <= metrics["length"] <= 3


def test_padding_is_no_load():
    groups = answer(small_model().eval(), TASK.tokenizer, TASK.draw(random.Random(0), 2), evens, 2, max_new_tokens=9)
    samples = [s for group in groups for s in group]
    batch = pad(samples)
    model = small_model()
    _, _, (routing,) = token_logps(model, batch.tokens)
    read = sum(len(s.prompt) + len(s.response.tokens) - 1 for s in samples)
    assert batch.tokens_per_expert(routing).sum() == read * model.config.num_experts_per_tok
    alone = [token_logps(model, pad([s]).tokens)[2][0].tokens_per_expert for s in samples]
    assert torch.equal(batch.tokens_per_expert(routing), sum(alone))


def test_averages_by_hand():
    groups = answer(small_model().eval(), TASK.tokenizer, TASK.draw(random.Random(0), 2), evens, 2, max_new_tokens=5)
    samples = [s for group in groups for s in group]
    found = averages(samples)
    assert found["length"] == sum(len(s.response.tokens) for s in samples) / 4
    assert found["reward"] == pytest.approx(sum(s.score.total for s in samples) / 4)
