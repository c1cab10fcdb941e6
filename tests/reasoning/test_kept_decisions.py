"""V3.2 trains with the decisions of sampling: the experts that were chosen, the tokens that could be drawn."""

import dataclasses
import math
import random

import pytest
import torch
from small_reasoner import RECIPE, TASK, evens, small_model

from minids.inference.generate import Sampling, Trace, stream
from minids.reasoning import trainer as rl_module
from minids.reasoning.rollout import answer, pad, token_logps
from minids.reasoning.trainer import LogpMismatch, RLTrainer


def trainer(**changes):
    return RLTrainer(small_model(), TASK.tokenizer, TASK, evens, dataclasses.replace(RECIPE, **changes))


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def sampled(model, top_p=1.0, **options):
    generator = torch.Generator().manual_seed(0)
    groups = answer(
        model.eval(), TASK.tokenizer, TASK.draw(random.Random(0), 3), evens, 4, max_new_tokens=9, generator=generator,
        top_p=top_p, keep_routing=True, **options,
    )  # fmt: skip
    return [s for group in groups for s in group]


def test_the_experts_of_sampling_are_those_of_a_forward_pass():
    """One entry for each token that was read: all but the last one drawn. In any division of the batch."""
    model = small_model()
    samples = sampled(model)
    for s in samples:
        tokens = torch.tensor([[*s.prompt, *s.response.tokens]])[:, :-1]
        expected = torch.stack([routing.experts[0] for routing in model(tokens).routings], 1)
        assert torch.equal(s.experts.sort(-1).values, expected.sort(-1).values)
    small = 2 * model.new_cache(1, max(len(s.prompt) for s in samples) + 9).num_bytes()
    for some in (samples, sampled(model, max_cache_bytes=small)):
        assert all(len(s.experts) == len(s.prompt) + len(s.response.tokens) - 1 for s in some)


def test_a_prefill_in_chunks_has_the_experts_of_a_whole_one():
    model = small_model().eval()
    prompts = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13]]
    traces = [Trace(), Trace()]
    for trace, chunk in zip(traces, (None, 2), strict=True):
        for _ in stream(model, prompts, max_new_tokens=4, sampling=Sampling(0), prefill_chunk=chunk, trace=trace):
            pass
    for whole, parts, prompt in zip(traces[0].experts, traces[1].experts, prompts, strict=True):
        whole, parts = torch.cat(whole).sort(-1).values, torch.cat(parts).sort(-1).values
        assert torch.equal(whole, parts) and len(whole) == len(prompt) + 3
    with pytest.raises(ValueError, match="^compiled=True: must be False with a trace"):
        next(stream(model, prompts, max_new_tokens=4, compiled=True, trace=Trace()))


def test_given_experts_are_used_with_the_gate_weights_of_their_affinities():
    model = small_model().eval()
    tokens = torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(1))
    own = model(tokens)
    same = model(tokens, experts=torch.stack([routing.experts for routing in own.routings]))
    assert torch.equal(same.logits, own.logits) and torch.equal(same.routings[0].weights, own.routings[0].weights)
    others = torch.tensor([3, 0]).expand(len(own.routings), 2, 5, 2)
    given = model(tokens, experts=others)
    assert torch.equal(given.routings[0].experts, others[0]) and not torch.allclose(given.logits, own.logits)
    scores = given.routings[0].scores[..., [3, 0]]
    torch.testing.assert_close(given.routings[0].weights, scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("keep", [True, False])
def test_kept_routing_mends_a_mismatch(keep):
    """The biases change which experts are chosen and nothing else: with the experts kept, no probability changes."""
    made = trainer(keep_routing=keep)
    groups, _ = made.collect()
    with torch.no_grad():
        for router in made.model.routers():
            router.bias.copy_(torch.tensor([0.5, 0.0, 0.0, -0.5]))
    if keep:
        assert made.update(groups, check=True)["logp_gap"] < 1e-4
    else:
        with pytest.raises(LogpMismatch, match="differ by up to"):
            made.update(groups, check=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_training_renormalises_over_the_tokens_that_could_be_drawn(temperature):
    model = small_model()
    samples = sampled(model, top_p=0.6, temperature=temperature)
    batch = pad(samples)
    assert (batch.allowed.gather(-1, batch.tokens[:, 1:, None])[..., 0] | ~batch.mask).all()
    assert not batch.allowed[batch.mask].all()
    logp, entropy, _ = token_logps(model, batch.tokens, temperature, batch.experts, batch.allowed)
    torch.testing.assert_close(logp[batch.mask], batch.old_logp[batch.mask], rtol=0, atol=1e-5)
    p = (model(batch.tokens[:, :-1]).logits.double() / temperature).softmax(-1) * batch.allowed
    p = p / p.sum(-1, keepdim=True)
    expected = torch.special.entr(p).sum(-1).float()
    torch.testing.assert_close(entropy[batch.mask], expected[batch.mask], rtol=0, atol=1e-5)
    logp.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_run_with_a_nucleus_needs_the_kept_set(monkeypatch):
    assert trainer(top_p=0.6).train_step()["logp_gap"] < 1e-4
    monkeypatch.setattr(rl_module, "token_logps", lambda *inputs: token_logps(*inputs[:4]))  # planted: not kept
    with pytest.raises(LogpMismatch):
        trainer(top_p=0.6).train_step()


def test_a_run_with_everything_of_v32_trains():
    everything = dict(
        top_p=0.9, keep_routing=True, kl_weight=0.1, unbiased_kl=True, mini_batches=2, off_policy_threshold=0.001,
        learning_rate=1e-2, scale_by_std=False, inner_epochs=2,
    )  # fmt: skip
    made = trainer(**everything)
    before = weights_of(made.model)
    metrics = [made.train_step() for _ in range(2)]
    assert not torch.equal(weights_of(made.model), before)
    assert metrics[1]["masked"] > 0 and all(math.isfinite(value) for value in metrics[1].values())


def test_keeping_the_routing_of_a_dense_model_is_refused():
    model = small_model()
    dense = type(model)(model.config.replace(first_k_dense_replace=2))
    with pytest.raises(ValueError, match="^keep_routing=True: the model has no router"):
        RLTrainer(dense, TASK.tokenizer, TASK, evens, dataclasses.replace(RECIPE, keep_routing=True))
