"""Training of sparse attention: planted mistakes in the indexer's loss, its target and what gets a gradient.

A check passes on the package as it is and fails by its own assertion where the mistake is planted (`pitfalls.py`). That
without the loss an indexer never learns is tested in tests/training/test_indexer_training.py.
"""

import plain_indexer as plain
import pytest
import torch
from pitfalls import assert_caught, close
from plain_indexer import SPARSE, model_of, weights_of
from plain_model import NANO, build, random_stream, random_tokens

from minids.model import sparse_attention
from minids.model.kv_cache import IndexerTraining
from minids.model.sparse_attention import SparseLatentAttention

LENGTH = 12


# The loss ------------------------------------------------------------------------------------------------------------


def losses_of(stage, x):
    """The first layer's indexer loss by the package, and by the loops."""
    model, training = model_of(), IndexerTraining(stage)
    attention = model.layers[0].attention
    w = weights_of(attention)
    attention(x, model.attention_context(torch.zeros(1, LENGTH, dtype=torch.int64), indexer=training))
    attended = [set(range(t + 1)) for t in range(LENGTH)]
    if stage == "sparse":
        attended = plain.chosen(plain.index_scores(w, SPARSE, x[0])[0].tolist(), SPARSE.index_topk)
    return sum(training.losses).item(), plain.indexer_loss(w, SPARSE, x[0], attended)


def check_loss_of_the_warm_up():
    got, want = losses_of("dense_warmup", random_stream(1, LENGTH, 64))
    assert abs(got - want) < 1e-9


def check_loss_of_the_sparse_stage():
    got, want = losses_of("sparse", random_stream(1, LENGTH, 64))
    assert abs(got - want) < 1e-9


def plant_no_loss(mp):
    mp.setattr(sparse_attention, "indexer_loss", lambda scores, target, attended: scores.new_zeros(()))


def plant_divergence_the_other_way(mp):
    def reverse(scores, target, attended):
        chance = scores.masked_fill(~attended, -torch.inf).softmax(-1)
        return (torch.xlogy(chance, chance) - torch.xlogy(chance, target + 1e-30)).sum(-1).mean()

    mp.setattr(sparse_attention, "indexer_loss", reverse)


def plant_probabilities(mp, combine, mask_of=lambda mask: mask):
    def probabilities(self, query, entries, mask):
        latent, key_rope = entries.split((self.kv_rank, self.rope_dim), -1)
        up = self.kv_up_proj(latent).unflatten(-1, (self.heads, -1))[..., : self.nope_dim]
        key = torch.cat((up, key_rope[:, :, None].expand(-1, -1, self.heads, -1)), -1)
        logits = torch.einsum("bthd,bshd->bhts", query, key) * self.scale
        return combine(logits + mask_of(mask)).detach()

    mp.setattr(SparseLatentAttention, "probabilities", probabilities)


def plant_mean_of_logits(mp):
    plant_probabilities(mp, lambda logits: logits.mean(1).softmax(-1))


def plant_one_head(mp):
    plant_probabilities(mp, lambda logits: logits.softmax(-1)[:, 0])


def plant_sum_of_heads_not_normalised(mp):
    plant_probabilities(mp, lambda logits: logits.softmax(-1).sum(1))


def plant_dense_target_in_the_sparse_stage(mp):
    """The target covers all visible tokens, so over the chosen ones it does not sum to 1."""

    def causal(mask):
        return torch.full_like(mask, -torch.inf).triu(1)

    plant_probabilities(mp, lambda logits: logits.softmax(-1).mean(1), causal)


def plant_softmax_over_all_visible_tokens(mp):
    loss = sparse_attention.indexer_loss

    def over_all(scores, target, attended):
        return loss(scores, target, torch.ones_like(attended).tril())

    mp.setattr(sparse_attention, "indexer_loss", over_all)


# The gradients: the indexer learns from its own loss only, the model from its own ------------------------------------


def gradients_by(pick):
    """Whether any parameter of the indexers, and any other one, gets a gradient from `pick(out)`."""
    model = model_of()
    loss = pick(model(random_tokens(1, LENGTH), indexer=IndexerTraining("sparse")))
    found = {"indexers": False, "others": False}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in parameters.items() if loss.requires_grad else ():
        (gradient,) = torch.autograd.grad(loss, p, allow_unused=True, retain_graph=True)
        found["indexers" if ".indexer." in name else "others"] |= gradient is not None and bool(gradient.any())
    return found


def check_gradients():
    assert gradients_by(lambda out: sum(out.indexer_losses)) == {"indexers": True, "others": False}
    assert gradients_by(lambda out: out.logits.square().sum()) == {"indexers": False, "others": True}


def plant_inputs_not_detached(mp):
    mp.setattr(torch.Tensor, "detach", lambda self: self)


def plant_target_not_detached(mp):
    mp.setattr(SparseLatentAttention, "probabilities", SparseLatentAttention.probabilities.__wrapped__)


def plant_gradient_through_the_choice(mp):
    """The chosen scores join the attention scores, with value 0 and a gradient."""
    choose, additive, last = sparse_attention.choose, sparse_attention.additive, []

    def remember(scores, visible, k):
        last[:] = [scores]
        return choose(scores, visible, k)

    def leak(attended, like):
        return additive(attended, like) + (last[0] - last[0].detach())[:, None]

    mp.setattr(sparse_attention, "choose", remember)
    mp.setattr(sparse_attention, "additive", leak)


# The warm-up ---------------------------------------------------------------------------------------------------------


def check_warm_up():
    """Dense attention, and nothing but the indexers has a gradient or may change."""
    sparse, dense, tokens = build(SPARSE), build(NANO), random_tokens(1, LENGTH)
    dense.load_state_dict({k: v for k, v in sparse.state_dict().items() if ".indexer." not in k})
    sparse_attention.set_trained_parameters(sparse, "dense_warmup")
    assert all(p.requires_grad == (".indexer." in name) for name, p in sparse.named_parameters())
    with torch.no_grad():
        close(sparse(tokens, indexer=IndexerTraining("dense_warmup")).logits, dense(tokens).logits)


def plant_sparse_attention_in_the_warm_up(mp):
    init = IndexerTraining.__init__
    mp.setattr(IndexerTraining, "__init__", lambda self, stage: init(self, "sparse"))


def plant_nothing_frozen(mp):
    mp.setattr(sparse_attention, "set_trained_parameters", lambda model, stage: None)


MISTAKES = {
    check_loss_of_the_warm_up: (
        plant_no_loss, plant_divergence_the_other_way, plant_mean_of_logits, plant_one_head,
        plant_sum_of_heads_not_normalised,
    ),
    check_loss_of_the_sparse_stage: (plant_dense_target_in_the_sparse_stage, plant_softmax_over_all_visible_tokens),
    check_gradients: (
        plant_inputs_not_detached, plant_target_not_detached, plant_gradient_through_the_choice, plant_no_loss,
    ),
    check_warm_up: (plant_sparse_attention_in_the_warm_up, plant_nothing_frozen),
}  # fmt: skip
ROWS = [(check, plant) for check, plants in MISTAKES.items() for plant in plants]


@pytest.mark.parametrize("check, plant", ROWS, ids=[f"{c.__name__[6:]}-{p.__name__[6:]}" for c, p in ROWS])
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
