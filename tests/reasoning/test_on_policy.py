"""On-policy distillation: the loss against its formula, and a trainer that learns from its own samples."""

import dataclasses

import pytest
import torch
from small_reasoner import RECIPE, TASK, TOKENIZER, accept_most, small_model

from minids.model.transformer import MiniDS
from minids.reasoning.on_policy import OnPolicyTrainer, on_policy_loss, reverse_kl
from minids.reasoning.rollout import pad, token_logps


def two_logits(tokens=5, vocab=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, vocab, generator=generator, dtype=torch.float64)


def test_reverse_kl_and_its_gradient_equal_the_formula():
    student, teacher = two_logits()
    q, p = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (student, teacher))
    expected = [sum(q[t, v] * (q[t, v] / p[t, v]).log() for v in range(7)) for t in range(5)]
    expected_gradient = q * (q.log() - p.log() - torch.stack(expected)[:, None])
    for logits in (student, student + 100.0):  # a constant changes no distribution
        logits = logits.clone().requires_grad_()
        found = reverse_kl(logits, teacher)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    assert reverse_kl(teacher, teacher).abs().max() < 1e-12


def forward_kl(logits, teacher_logits):
    q, p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def frozen_weights(logits, teacher_logits):
    q, p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (q.detach().exp() * (q - p)).sum(-1)


@pytest.mark.parametrize("mistake", [forward_kl, frozen_weights])
def test_reverse_kl_differs_from_its_common_mistakes(mistake):
    """`frozen_weights` is the gradient of a sampled estimate, in expectation: it is zero, and teaches nothing."""
    student, teacher = two_logits()
    gradients = []
    for loss in (reverse_kl, mistake):
        logits = student.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(logits, teacher).sum(), logits)[0])
    assert (gradients[0] - gradients[1]).abs().max() > 0.1
    if mistake is frozen_weights:
        assert gradients[1].abs().max() < 1e-12


def learner(seed=1, teacher_seed=2, **changes):
    recipe = dataclasses.replace(RECIPE, micro_batch_size=3, learning_rate=1e-2, warmup_steps=0, **changes)
    teacher = small_model(teacher_seed)
    teacher.head.weight.data *= 30.0  # an untrained teacher, but one with preferences
    return OnPolicyTrainer(small_model(seed), teacher, TOKENIZER, TASK, accept_most, recipe)


def test_loss_counts_the_sampled_tokens_and_nothing_else():
    trainer = learner()
    groups, _ = trainer.collect()
    samples = [sample for group in groups for sample in group]
    batch, student, teacher = pad(samples), trainer.model, trainer.teacher
    by_hand = 0.0
    for sample in samples:  # one answer at a time, without padding
        tokens = torch.tensor([[*sample.prompt, *sample.response.tokens]])
        with torch.no_grad():
            q, p = (m(tokens[:, :-1]).logits[0, len(sample.prompt) - 1 :].double() for m in (student, teacher))
        by_hand += (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum().item()
    loss = on_policy_loss(student, teacher, batch)
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    loss.backward()
    assert student.head.weight.grad.abs().max() > 0
    assert all(weight.grad is None for weight in teacher.parameters())


def test_update_equals_the_gradient_of_the_mean_over_all_tokens():
    """Micro-batches of different lengths: a mean of their means would be another gradient."""
    trainer = learner(max_new_tokens=40)
    groups, _ = trainer.collect()
    batch = pad([sample for group in groups for sample in group])
    assert len(batch.mask.sum(1).unique()) > 1
    twin = small_model(1)
    loss = on_policy_loss(twin, trainer.teacher, batch) / batch.mask.sum()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in twin.parameters() if weight.grad is not None])
    metrics = trainer.update(groups, check=False)
    assert metrics["reverse_kl"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_training_samples_from_the_student_and_lowers_the_divergence():
    trainer = learner(steps=12, prompts=4, group_size=8)
    before = small_model(1)
    first = trainer.train_step()
    batch = pad([sample for group in trainer.groups for sample in group])
    with torch.no_grad():
        own, others = (token_logps(m, batch.tokens)[0][batch.mask] for m in (before, trainer.teacher))
    old = batch.old_logp[batch.mask]
    assert (own - old).abs().max() < 1e-3 < (others - old).abs().max()  # sampled by the student, not by the teacher
    history = trainer.run(progress=False)
    assert history[-1]["reverse_kl"] < 0.7 * first["reverse_kl"]


def test_a_teacher_of_another_vocabulary_is_refused():
    wide = MiniDS(small_model().config.replace(vocab_size=64))
    with pytest.raises(ValueError, match="vocab_size=55.*64"):
        OnPolicyTrainer(small_model(), wide, TOKENIZER, TASK, accept_most, RECIPE)
