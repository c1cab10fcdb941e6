import dataclasses
import json
import math
import random

import pytest
import torch

from minids.config import ModelConfig
from minids.data.tokenizer import ByteTokenizer
from minids.model.transformer import MiniDS
from minids.reasoning import commands, rl, rollout, zero
from minids.reasoning.grpo import VARIANTS
from minids.reasoning.rewards import R1_ZERO_WEIGHTS, RuleReward, Score
from minids.reasoning.rl import Diverged, LogpMismatch, RLRecipe, RLTrainer, samples_as_text
from minids.reasoning.rollout import answer, averages, evaluate, mean_with_interval, pad, pass_at_k, sample, token_logps
from minids.reasoning.tasks import Problem, TraceTask

TASK = TraceTask()
RECIPE = RLRecipe(
    steps=4, prompts=2, group_size=4, max_new_tokens=8, evaluate_every=2, evaluation_problems=4, evaluation_samples=2,
    checkpoint_every=2, micro_batch_size=3,
)  # fmt: skip
SAME_WHEN_RESUMED = ("step", "reward", "length", "entropy", "gradient_norm", "logp_gap")


def evens(problems, responses):
    """A reward that every model can be taught: the share of even tokens."""
    shares = (sum(token % 2 == 0 for token in response.tokens) / len(response.tokens) for response in responses)
    return [Score({"accuracy": share}, share) for share in shares]


def small_model():
    torch.manual_seed(0)
    config = zero.base_config(TASK.tokenizer.vocab_size)
    return MiniDS(config.replace(hidden_size=32, moe_intermediate_size=32, num_hidden_layers=2))


def trainer(reward=evens, **changes):
    return RLTrainer(small_model(), TASK.tokenizer, TASK, reward, dataclasses.replace(RECIPE, **changes))


def prompts(count):
    problems = TASK.draw(random.Random(0), count)
    return [[TASK.tokenizer.bos_id, *TASK.tokenizer.encode(problem.prompt)] for problem in problems]


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Sampling


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


# The loop


def test_the_loop_learns_what_is_rewarded():
    taught = trainer(steps=12, prompts=4, group_size=8, learning_rate=1e-2, evaluate_every=12)
    history = taught.run(progress=False)
    assert history[0]["step"] == 0 and history[-1]["step"] == 12
    assert history[-1]["reward"] > history[1]["reward"] + 0.2
    assert all(metrics["logp_gap"] < 1e-4 for metrics in history[1:])


@pytest.mark.parametrize("changes", [{}, {"kl_weight": 0.1, "refresh_reference_every": 3}, {"balance_speed": 0.01}])
def test_resumed_equals_uninterrupted(tmp_path, changes):
    whole = trainer(**changes)
    history = whole.run(progress=False, directory=tmp_path / "whole")

    class Pulled(Exception):
        pass

    def pull_the_plug(metrics):
        if metrics["step"] == 3:
            raise Pulled

    with pytest.raises(Pulled):
        trainer(**changes).run(progress=False, directory=tmp_path / "cut", on_step=pull_the_plug)
    resumed = trainer(**changes)
    with torch.no_grad():
        resumed.model.head.weight.zero_()  # what it starts from must not matter
    later = resumed.run(progress=False, directory=tmp_path / "cut")
    assert [m["step"] for m in later] == [3, 4]
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    figures = [[{k: m.get(k) for k in SAME_WHEN_RESUMED} for m in h] for h in (later, history[-2:])]
    assert figures[0] == figures[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    names = sorted(path.name for path in (tmp_path / "cut" / "samples").iterdir())
    assert names == ["step-00000002.txt", "step-00000004.txt"]


def test_a_run_of_another_recipe_is_not_resumed(tmp_path):
    trainer(steps=2).run(progress=False, directory=tmp_path)
    with pytest.raises(ValueError, match="group_size=5: the run was started with 4"):
        trainer(steps=2, group_size=5).run(progress=False, directory=tmp_path)


def test_micro_batches_do_not_matter():
    gradients = []
    for size in (1, 3, 64):
        one = trainer(micro_batch_size=size, averaging="token", kl_weight=0.1)
        one.train_step()
        gradients.append(weights_of(one.model))
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=2e-5)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=0, atol=2e-5)


def test_flat_groups_cost_no_update_but_are_counted():
    def flat(problems, responses):
        return [Score({"accuracy": 1.0}, 1.0) for _ in responses]

    idle = trainer(flat)
    before = weights_of(idle.model)
    metrics = idle.train_step()
    assert torch.equal(weights_of(idle.model), before)
    assert metrics["zero_advantage_groups"] == 1 and "gradient_norm" not in metrics


@pytest.mark.parametrize("averaging", ["sequence", "token"])
def test_flat_groups_count_in_the_average(averaging):
    """Rows without advantage are left out of the backward pass; the gradient must be that of the whole batch."""
    calls = []

    def half_flat(problems, responses):
        calls.append(len(responses))
        scores = [1.0] * 4 + [float(i % 2) for i in range(len(responses) - 4)]
        return [Score({"accuracy": s}, s) for s in scores]

    loop = trainer(half_flat, averaging=averaging, clip_norm=1e9)
    groups, share = loop.collect()
    assert share == 0.5
    norm = loop.update(groups, check=True)["gradient_norm"]

    again = trainer(half_flat)
    samples = [s for group in groups for s in group]
    batch = pad(samples)
    advantages = [0.0] * 4 + [(r - 0.5) / (math.sqrt(1 / 3) + 1e-4) for r in (0.0, 1.0, 0.0, 1.0)]
    logp, _, _ = token_logps(again.model.train(), batch.tokens)
    loss = torch.zeros(())
    for row, s in enumerate(samples):
        n = len(s.response.tokens)
        divisor = n * 8 if averaging == "sequence" else batch.mask.sum()
        loss = loss - advantages[row] * logp[row][batch.mask[row]].sum() / divisor  # ratio 1: grad ratio = grad logp
    loss.backward()
    grads = [p.grad.flatten() for p in again.model.parameters() if p.grad is not None]
    assert norm == pytest.approx(torch.cat(grads).norm().item(), rel=1e-4)


def test_dynamic_sampling_replaces_flat_groups():
    rounds = []

    def flat_at_first(problems, responses):
        rounds.append(len(responses))
        first = len(rounds) == 1
        scores = [1.0 if first and i < 4 else float(i % 2) for i in range(len(responses))]
        return [Score({"accuracy": s}, s) for s in scores]

    groups, share = trainer(flat_at_first, dynamic_sampling=True).collect()
    assert rounds == [8, 4] and len(groups) == 2 and share == pytest.approx(1 / 3)
    assert all(len({s.score.total for s in group}) > 1 for group in groups)

    rounds.clear()
    always = trainer(lambda p, r: [Score({"accuracy": 1.0}, 1.0) for _ in r], dynamic_sampling=True)
    groups, share = always.collect()
    assert share == 1.0 and len(groups) == 2  # it gives up after a few rounds


def test_the_reference_is_refreshed():
    loop = trainer(kl_weight=0.1, refresh_reference_every=2, learning_rate=1e-2)
    start = weights_of(loop.model)
    first = loop.train_step()
    after_one = weights_of(loop.model)
    loop.train_step()
    assert torch.equal(weights_of(loop.reference), start) and not torch.equal(after_one, start)
    after_two = weights_of(loop.model)
    loop.train_step()
    assert torch.equal(weights_of(loop.reference), after_two)
    assert first["kl"] == pytest.approx(0, abs=1e-12)


def test_router_biases_stay_or_move_as_told():
    frozen, moving = trainer(), trainer(balance_speed=0.01)
    for loop in (frozen, moving):
        loop.train_step()
    assert all((router.bias == 0).all() for router in frozen.model.routers())
    biases = torch.cat([router.bias for router in moving.model.routers()])
    assert (biases != 0).any() and biases.abs().max() <= 0.01 + 1e-9


def test_padding_is_no_load():
    groups = answer(small_model().eval(), TASK.tokenizer, TASK.draw(random.Random(0), 2), evens, 2, max_new_tokens=9)
    samples = [s for group in groups for s in group]
    batch = pad(samples)
    model = small_model()
    _, _, (routing,) = token_logps(model, batch.tokens)
    read = sum(len(s.prompt) + len(s.response.tokens) - 1 for s in samples)
    assert batch.load(routing).sum() == read * model.config.num_experts_per_tok
    alone = [token_logps(model, pad([s]).tokens)[2][0].load for s in samples]
    assert torch.equal(batch.load(routing), sum(alone))


def test_a_loop_that_trains_on_other_probabilities_than_it_sampled_stops(monkeypatch):
    """Planted: log-probabilities one position off (PITFALLS m), and another temperature in training."""

    def shifted(model, tokens, temperature):
        logp, entropy, routings = token_logps(model, tokens, temperature)
        return logp.roll(1, dims=1), entropy, routings

    def hotter(model, tokens, temperature):
        return token_logps(model, tokens, 1.2 * temperature)

    for planted in (shifted, hotter):
        monkeypatch.setattr(rl, "token_logps", planted)
        with pytest.raises(LogpMismatch, match="differ by up to"):
            trainer().train_step()


def test_a_single_answer_may_be_routed_differently(monkeypatch):
    """As where two experts score alike within rounding, and each pass takes another one. Two of eight are a mistake."""
    for rerouted, allowed in ((1, True), (2, False)):
        met = iter(range(100))

        def elsewhere(model, tokens, temperature, met=met, rerouted=rerouted):
            logp, entropy, routings = token_logps(model, tokens, temperature)
            shift = [[0.01 * (next(met) < rerouted)] for _ in logp]
            return logp - torch.tensor(shift), entropy, routings

        monkeypatch.setattr(rl, "token_logps", elsewhere)
        if allowed:
            metrics = trainer().train_step()
            assert metrics["logp_gap"] == pytest.approx(0.01, abs=1e-3)
        else:
            with pytest.raises(LogpMismatch, match="in 2 of 8 answers"):
                trainer().train_step()


def test_an_exploded_gradient_stops_the_run():
    broken = trainer()
    broken.model.head.weight.register_hook(lambda g: g * math.inf)
    before = weights_of(broken.model)
    with pytest.raises(Diverged, match="learning_rate"):
        broken.train_step()
    assert torch.equal(weights_of(broken.model), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs(variant):
    loop = trainer(**VARIANTS[variant], inner_epochs=2)
    before = weights_of(loop.model)
    metrics = loop.train_step()
    assert not torch.equal(weights_of(loop.model), before)
    assert metrics["clipped"] >= 0 and metrics["entropy"] > 0
    assert samples_as_text(loop.groups).count("accuracy") == 8


def test_a_custom_reward_on_another_tokenizer_takes_few_lines():
    """An engineer's way: any MiniDS, lists of prompts, a function in which nothing is right or wrong."""
    asked = []

    def short(problems, responses):
        asked.append({problem.prompt for problem in problems})
        return [Score({"short": 1 / len(r.tokens)}, 1 / len(r.tokens)) for r in responses]

    texts = ["hello", "a longer prompt", "held out", "this too", "one too many"]
    problems = rl.ProblemSet(train=list(map(Problem, texts[:2])), test=list(map(Problem, texts[2:])))
    tokenizer = ByteTokenizer()
    model = MiniDS(ModelConfig.preset("nano", num_nextn_predict_layers=1))
    recipe = dataclasses.replace(RECIPE, steps=2, prompts=8, evaluation_problems=2)
    history = RLTrainer(model, tokenizer, problems, short, recipe).run(progress=False)
    assert history[-1]["held_out/reward/short"] > 0 and not any("pass@" in name for name in history[-1])
    assert [prompts == set(texts[2:4]) for prompts in asked] == [True, False, False, True]
    assert asked[1] | asked[2] == set(texts[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size=1: must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be a finite number above 0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"kl_weight": math.nan}, "kl_weight=nan"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RLRecipe(**changes)


def test_averages_by_hand():
    groups = answer(small_model().eval(), TASK.tokenizer, TASK.draw(random.Random(0), 2), evens, 2, max_new_tokens=5)
    samples = [s for group in groups for s in group]
    found = averages(samples)
    assert found["length"] == sum(len(s.response.tokens) for s in samples) / 4
    assert found["reward"] == pytest.approx(sum(s.score.total for s in samples) / 4)


# R1-Zero


def test_every_row_of_the_web_begins_with_a_document():
    text = zero.web_text(TASK, rows=20)
    rows = text.train.tokens[:-zero.BASE_RECIPE.seq_len].reshape(20, -1)
    assert (rows[:, 0] == TASK.tokenizer.bos_id).all()
    assert text.train.fingerprint == zero.web_text(TASK, rows=20).train.fingerprint
    assert text.train.fingerprint != zero.web_text(TASK, rows=20, seed=1).train.fingerprint


def test_the_command_trains_a_base_teaches_it_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original = zero.web_text
    monkeypatch.setattr(zero, "web_text", lambda *args: original(*args, rows=40))
    recipe = dataclasses.replace(RECIPE, steps=3)
    commands.rl_command(recipe=recipe, base_steps=4, variant="dr_grpo", name="one")
    assert "held_out/pass@1: " in capsys.readouterr().out
    folder = tmp_path / "runs" / "one"
    assert json.loads((folder / "rl.json").read_text())["recipe"]["averaging"] == "constant"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    commands.rl_command(recipe=recipe, base=folder, name="two")  # its model is a base like any other
    with pytest.raises(ValueError, match="exists: choose another --name"):
        commands.rl_command(name="two")
    with pytest.raises(ValueError, match="has no rl.json"):
        commands.rl_command(resume=tmp_path)
    commands.rl_command(resume=folder)


def test_the_reward_of_the_recipe_is_accuracy_and_a_tenth_for_the_form():
    reward = zero.rule_reward("trace")
    assert reward == RuleReward(R1_ZERO_WEIGHTS) and reward.weights == {"accuracy": 1.0, "format": 0.1}
