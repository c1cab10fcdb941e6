"""The RL training loop: what it learns, its batches, how it resumes and when it stops."""

import dataclasses
import json
import math

import pytest
import torch
from small_reasoner import RECIPE, TASK, evens, small_model

from minids.config import ModelConfig
from minids.data.tokenizer import ByteTokenizer
from minids.model.transformer import MiniDS
from minids.reasoning import trainer as rl_module
from minids.reasoning.grpo import VARIANTS
from minids.reasoning.rewards import Score
from minids.reasoning.rollout import averages, pad, token_logps
from minids.reasoning.tasks import Problem
from minids.reasoning.trainer import Diverged, LogpMismatch, RLRecipe, RLTrainer, samples_as_text

SAME_WHEN_RESUMED = ("step", "reward", "length", "entropy", "gradient_norm", "logp_gap")


def trainer(reward=evens, **changes):
    return RLTrainer(small_model(), TASK.tokenizer, TASK, reward, dataclasses.replace(RECIPE, **changes))


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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


def test_a_loop_that_trains_on_other_probabilities_than_it_sampled_stops(monkeypatch):
    """Planted: log-probabilities one position off (PITFALLS m), and another temperature in training."""

    def shifted(model, tokens, temperature, *kept):
        logp, entropy, routings = token_logps(model, tokens, temperature, *kept)
        return logp.roll(1, dims=1), entropy, routings

    def hotter(model, tokens, temperature, *kept):
        return token_logps(model, tokens, 1.2 * temperature, *kept)

    for planted in (shifted, hotter):
        monkeypatch.setattr(rl_module, "token_logps", planted)
        with pytest.raises(LogpMismatch, match="differ by up to"):
            trainer().train_step()


def test_a_single_answer_may_be_routed_differently(monkeypatch):
    """As where two experts score alike within rounding, and each pass takes another one. Two of eight are a mistake."""
    for rerouted, allowed in ((1, True), (2, False)):
        met = iter(range(100))

        def elsewhere(model, tokens, temperature, *kept, met=met, rerouted=rerouted):
            logp, entropy, routings = token_logps(model, tokens, temperature, *kept)
            shift = [[0.01 * (next(met) < rerouted)] for _ in logp]
            return logp - torch.tensor(shift), entropy, routings

        monkeypatch.setattr(rl_module, "token_logps", elsewhere)
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
    problems = rl_module.ProblemSet(train=list(map(Problem, texts[:2])), test=list(map(Problem, texts[2:])))
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


@pytest.mark.parametrize("share", [0.5, 2])
@pytest.mark.parametrize("run", [lambda made: made.run(progress=False), lambda made: made.train_step()])
def test_a_reward_of_the_wrong_count_ends_the_run_before_any_step(run, share):
    def some(problems, responses):
        return (evens(problems, responses) * 2)[: int(len(responses) * share)]

    made = trainer(some)
    before = weights_of(made.model)
    with pytest.raises(ValueError, match="^reward some: returned [0-9]+ scores for 8 responses, must return one each$"):
        run(made)
    assert made.step == 0 and torch.equal(weights_of(made.model), before)


def test_a_reward_with_other_parts_in_another_batch_is_named():
    calls = []

    def fickle(problems, responses):
        calls.append(len(responses))
        return [Score({f"part {len(calls)}": 1.0}, 1.0) for _ in responses]

    made = trainer(fickle)
    first, second = (made.collect()[0] for _ in range(2))
    with pytest.raises(ValueError, match="^reward: the parts part 1 of one batch are not those of another$"):
        averages([sample for group in first + second for sample in group])
