"""Load balance: planted mistakes in the bias update and in the sequence-wise loss, caught (PITFALLS 13, 15)."""

import itertools

import plain_model as plain
import pytest
import torch
import torch.nn.functional as F
from pitfalls import after_init, assert_caught, close, each_mistake
from plain_model import NANO, build, random_stream, random_tokens
from routers import router_with
from torch import nn

from minids.config import ModelConfig
from minids.model import moe, transformer
from minids.model.moe import Router
from minids.model.transformer import MiniDS

# 13. The bias update -----------------------------------------------------------------------------------------------


def check_13_bias_moves_by_gamma_against_the_load():
    model = build()
    for router in model.routers():
        router.bias.data.zero_()
    loads = torch.tensor([[9, 1, 4, 2, 4, 4, 4, 4], [4, 4, 4, 4, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0, 0, 32]])
    model.update_balance_bias(loads, 0.001)
    signs = [[-1, 1, 0, 1, 0, 0, 0, 0], [0] * 8, [1, 1, 1, 1, 1, 1, 1, -1]]
    for router, sign in zip(model.routers(), signs, strict=True):
        close(router.bias.double(), 0.001 * torch.tensor(sign, dtype=torch.float64), 1e-9)


def plant_update(mp, step):
    def update(bias, load, speed):
        load = load.float()
        bias.data.add_(speed * step(load.mean() - load))

    mp.setattr(moe, "update_balance_bias", update)
    mp.setattr(transformer, "update_balance_bias", update)


def plant_update_with_the_sign_reversed(mp):
    plant_update(mp, lambda missing: -missing.sign())


def plant_update_in_proportion(mp):
    plant_update(mp, lambda missing: missing)


def plant_one_load_for_all_layers(mp):
    update = MiniDS.update_balance_bias
    mp.setattr(MiniDS, "update_balance_bias", lambda self, loads, v: update(self, loads.sum(0).expand_as(loads), v))


def check_13_bias_moves_once_per_step_whatever_the_micro_batches():
    model, tokens = build(), random_tokens(4, 6)
    before = [router.bias.clone() for router in model.routers()]
    with torch.no_grad():
        whole = model(tokens, mtp=True).tokens_per_expert
    parts = [model(part, mtp=True) for part in tokens.split(2)]
    sum(out.logits.sum() for out in parts).backward()
    model.eval()(tokens)  # evaluation counts for nothing
    for router, bias in zip(model.routers(), before, strict=True):
        assert torch.equal(router.bias, bias)
    model.update_balance_bias(sum(out.tokens_per_expert for out in parts), 0.001)
    for router, bias, load in zip(model.routers(), before, whole.tolist(), strict=True):
        missing = [sum(load) / len(load) - one for one in load]
        sign = torch.tensor([(m > 0) - (m < 0) for m in missing])
        close(router.bias, bias + 0.001 * sign, 1e-7)


def plant_update_in_every_forward_pass(mp):
    forward = Router.forward

    def counting(self, x, experts=None):
        routing = forward(self, x, experts)
        moe.update_balance_bias(self.bias, routing.tokens_per_expert, 0.001)
        return routing

    mp.setattr(Router, "forward", counting)


def plant_update_in_training_passes_only(mp):
    forward = Router.forward

    def counting(self, x, experts=None):
        routing = forward(self, x, experts)
        if self.training and torch.is_grad_enabled():
            moe.update_balance_bias(self.bias, routing.tokens_per_expert, 0.001)
        return routing

    mp.setattr(Router, "forward", counting)


def plant_loads_of_the_last_micro_batch(mp):
    """What a model does that keeps its own count and overwrites it."""
    update = MiniDS.update_balance_bias
    forward = MiniDS.forward

    def remembering(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if torch.is_grad_enabled() and self.training:
            self.last_loads = out.tokens_per_expert
        return out

    mp.setattr(MiniDS, "forward", remembering)
    mp.setattr(MiniDS, "update_balance_bias", lambda self, loads, speed: update(self, self.last_loads, speed))


def check_13_bias_is_saved_in_float32_and_not_trained():
    model, twin = build(), build(seed=5)
    twin.load_state_dict(model.state_dict())
    for router, copy in zip(model.routers(), twin.routers(), strict=True):
        assert router.bias.any() and torch.equal(copy.bias, router.bias)
        assert not router.bias.requires_grad
    low = build().bfloat16()
    for router in low.routers():
        router.bias.data.fill_(1.0)
    for _ in range(3):  # steps of 0.001 around 1 vanish in bfloat16
        low.update_balance_bias(torch.tensor([[9, 1, 1, 1, 1, 1, 1, 1]] * 3), 0.001)
    for router in low.routers():
        close(router.bias.float(), torch.tensor([0.997] + [1.003] * 7), 1e-6)


def replace_bias(make):
    def change(self):
        bias = self.bias.data
        del self._parameters["bias"]
        make(self, bias)

    return change


def plant_bias_lost_in_the_checkpoint(mp):
    def not_saved(self, bias):
        self.register_buffer("bias", bias.normal_(0, 0.05), persistent=False)

    after_init(mp, Router, replace_bias(not_saved))


def plant_bias_trained_by_gradient(mp):
    after_init(mp, Router, lambda self: self.bias.requires_grad_(True))


def plant_bias_in_bfloat16(mp):
    mp.setattr(Router, "_apply", nn.Module._apply)


# 15. The sequence-wise loss ----------------------------------------------------------------------------------------


def check_15_sequence_loss_is_the_papers():
    router = router_with(bias=[3.0, 0, 0, 0, 0, 0, 0, -3.0])
    routing = router(random_stream(3, 6, 64))
    want = sum(plain.sequence_balance_loss(rows, 2) for rows in routing.scores.tolist()) / 3
    loss = moe.balance_loss(routing, NANO.replace(aux_loss_alpha=0.5))
    assert loss.item() == pytest.approx(0.5 * want)
    assert moe.balance_loss(routing, NANO).item() == pytest.approx(1e-4 * want)  # V3's alpha where a config is silent
    assert ModelConfig.preset("v3").aux_loss_alpha == 1e-4
    even = torch.full((1, 4, 8), 0.3, dtype=torch.float64)
    for token, expert in itertools.product(range(4), range(2)):
        even[0, token, 2 * token + expert] = 0.6
    assert moe.sequence_balance_loss(even, 2).item() == pytest.approx(1.0)
    assert torch.autograd.grad(loss, router.weight)[0].any()


def plant_sequence_loss(mp, frequency_of=None, probability_of=lambda s: (s / s.sum(-1, keepdim=True)).mean(1)):
    def loss(scores, k):
        chosen = F.one_hot(scores.topk(k).indices, scores.shape[-1]).sum(-2).to(scores.dtype)
        frequency = (frequency_of or right_frequency)(chosen, k)
        return (frequency * probability_of(scores)).sum(-1).mean()

    mp.setattr(moe, "sequence_balance_loss", loss)


def right_frequency(chosen, k):
    return chosen.mean(1) * chosen.shape[-1] / k


def plant_softmax_of_the_scores(mp):
    plant_sequence_loss(mp, probability_of=lambda s: s.softmax(-1).mean(1))


def plant_softmax_of_the_logits(mp):
    plant_sequence_loss(mp, probability_of=lambda s: s.logit().softmax(-1).mean(1))


def plant_probabilities_not_normalised(mp):
    plant_sequence_loss(mp, probability_of=lambda s: s.mean(1))


def plant_frequency_per_token_only(mp):
    plant_sequence_loss(mp, lambda chosen, k: chosen.mean(1))


def plant_frequency_of_the_whole_batch(mp):
    plant_sequence_loss(mp, lambda chosen, k: right_frequency(chosen, k).mean(0, keepdim=True))


def plant_frequency_of_the_biased_choice(mp):
    def loss(routing, config):
        frequency, probability = moe._frequency_and_probability(routing.experts, routing.scores)
        return config.aux_loss_alpha * (frequency * probability).sum(-1).mean()

    mp.setattr(moe, "balance_loss", loss)


def plant_alpha_forgotten(mp):
    mp.setattr(moe, "balance_loss", lambda routing, config: routing.scores.new_zeros((), requires_grad=True))


# The table ---------------------------------------------------------------------------------------------------------

PITFALLS = [
    (13, check_13_bias_moves_by_gamma_against_the_load, {
        "sign reversed": plant_update_with_the_sign_reversed,
        "proportional step": plant_update_in_proportion,
        "one load for all layers": plant_one_load_for_all_layers,
    }),
    (13, check_13_bias_moves_once_per_step_whatever_the_micro_batches, {
        "update per forward pass": plant_update_in_every_forward_pass,
        "update per micro-batch": plant_update_in_training_passes_only,
        "last micro-batch only": plant_loads_of_the_last_micro_batch,
    }),
    (13, check_13_bias_is_saved_in_float32_and_not_trained, {
        "not in the checkpoint": plant_bias_lost_in_the_checkpoint,
        "trained by gradient": plant_bias_trained_by_gradient,
        "bias in bfloat16": plant_bias_in_bfloat16,
    }),
    (15, check_15_sequence_loss_is_the_papers, {
        "softmax of the scores": plant_softmax_of_the_scores,
        "softmax of the logits": plant_softmax_of_the_logits,
        "P not normalised": plant_probabilities_not_normalised,
        "f without N/k": plant_frequency_per_token_only,
        "f over the batch": plant_frequency_of_the_whole_batch,
        "f of the biased choice": plant_frequency_of_the_biased_choice,
        "alpha forgotten": plant_alpha_forgotten,
    }),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
