"""The router: planted mistakes in its choice, gate weights and precision, caught (PITFALLS 10-12, 14)."""

import plain_model as plain
import torch
import torch.nn.functional as F
from pitfalls import assert_caught, close, each_mistake
from plain_model import NANO, build, random_stream
from routers import V2, router_with

from minids.model import moe
from minids.model.moe import Router

# 10. The bias selects and does nothing else ------------------------------------------------------------------------


def weights_by_expert(routing):
    dense = torch.zeros_like(routing.scores)
    return dense.scatter(-1, routing.experts, routing.weights)


def check_10_bias_selects_and_weights_are_unbiased():
    x = random_stream(1, 8, 64)
    router = router_with(bias=torch.zeros(8))
    before = weights_by_expert(router(x))
    router.bias.data.fill_(0.4)  # nobody is preferred: the same experts, so the same weights
    close(weights_by_expert(router(x)), before, 0)
    router.bias.data.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0]))  # only the first two can be chosen
    routing = router(x)
    assert routing.tokens_per_expert.tolist() == [8, 8, 0, 0, 0, 0, 0, 0]
    s = (x @ router.weight.T).sigmoid()[..., :2]
    close(weights_by_expert(routing)[..., :2], 2.5 * s / s.sum(-1, keepdim=True))


def plant_router(mp, weigh, scores_of=lambda self, x: self.scores(x)):
    """`weigh(self, scores, experts)` makes the weights of the chosen."""

    def forward(self, x, experts=None):
        scores = scores_of(self, x)
        experts = self.choose(scores.detach())
        return moe.Routing(experts, weigh(self, scores, experts), scores)

    mp.setattr(Router, "forward", forward)


def normalised(weights, scaling=2.5):
    return weights / weights.sum(-1, keepdim=True) * scaling


def plant_biased_weights(mp):
    plant_router(mp, lambda self, s, e: normalised((s + self.bias).gather(-1, e)))


def plant_bias_inside_the_sigmoid(mp):
    def scores(self, x):
        return (F.linear(x, self.weight) + self.bias).sigmoid()

    plant_router(mp, lambda self, s, e: normalised(s.gather(-1, e)), scores)


def plant_bias_ignored(mp):
    mp.setattr(Router, "choose", lambda self, s: self.within_best_groups(s).topk(2).indices)


def plant_softmax_over_the_chosen(mp):
    plant_router(mp, lambda self, s, e: 2.5 * s.gather(-1, e).logit().softmax(-1))


def plant_weights_not_normalised(mp):
    plant_router(mp, lambda self, s, e: 2.5 * s.gather(-1, e))


def plant_weights_normalised_over_all_experts(mp):
    plant_router(mp, lambda self, s, e: 2.5 * (s / s.sum(-1, keepdim=True)).gather(-1, e))


def plant_weights_without_the_scaling_factor(mp):
    plant_router(mp, lambda self, s, e: normalised(s.gather(-1, e), 1.0))


# 11. Groups are ranked by their two best experts -------------------------------------------------------------------


def check_11_groups_are_ranked_by_their_two_best():
    def chosen(config, scores, bias=None):
        router = router_with(config.replace(topk_group=1), bias)
        return set(router.choose(torch.tensor([[scores]], dtype=torch.float64)).flatten().tolist())

    one_star_or_two_good = [0.9, 0.1, 0.6, 0.5, 0.3, 0.2, 0.1, 0.1]
    assert chosen(NANO, one_star_or_two_good, torch.zeros(8)) == {2, 3}
    assert chosen(V2, one_star_or_two_good) == {0, 1}  # V2 ranks by the best one
    assert chosen(NANO, one_star_or_two_good, [0, 0, 0, 0, 0.5, 0.5, 0, 0]) == {4, 5}  # biased scores rank
    wide = NANO.replace(n_group=2, num_experts_per_tok=2)
    many_mediocre_or_two_good = [0.8, 0.7, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    assert chosen(wide, many_mediocre_or_two_good, torch.zeros(8)) == {0, 1}


def plant_group_score(mp, rank_of, mask=-torch.inf):
    def within_best_groups(self, scores):
        groups = scores.unflatten(-1, (self.config.n_group, -1))
        kept = rank_of(self, groups).topk(self.config.topk_group).indices
        outside = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
        return groups.masked_fill(outside[..., None], mask).flatten(-2)

    mp.setattr(Router, "within_best_groups", within_best_groups)


def best(count):
    return lambda self, groups: groups.topk(min(count, groups.shape[-1])).values.sum(-1)


def plant_group_score_of_the_best_one(mp):
    plant_group_score(mp, best(1))


def plant_group_score_of_all_members(mp):
    plant_group_score(mp, best(100))


def plant_v2_groups_ranked_like_v3(mp):
    plant_group_score(mp, best(2))


def plant_group_score_without_the_bias(mp):
    def rank(self, groups):
        bias = 0 if self.bias is None else self.bias.view(groups.shape[-2:])
        return (groups - bias).topk(2 if self.config.selects_with_bias else 1).values.sum(-1)

    plant_group_score(mp, rank)


# 12. What lies outside the kept groups is -inf ---------------------------------------------------------------------


def check_12_dropped_groups_cannot_win_with_negative_biases():
    router, x = router_with(bias=[-2.0, -1.5, -2.0, -1.5, -1.0, -2.0, -3.0, -1.0]), random_stream(1, 64, 64)
    w = dict(router.named_parameters())
    for token, chosen in zip(x[0], router(x).experts[0].tolist(), strict=True):
        assert set(chosen) == set(plain.route(w, NANO, token))


def right_rank(self, groups):
    return groups.topk(2 if self.config.selects_with_bias else 1).values.sum(-1)


def plant_zero_instead_of_minus_infinity(mp):
    plant_group_score(mp, right_rank, mask=0.0)


def plant_groups_not_limited(mp):
    mp.setattr(Router, "within_best_groups", lambda self, scores: scores)


# 14. The gate in float32 -------------------------------------------------------------------------------------------


def check_14_gate_is_computed_in_float32():
    for config in (NANO, V2):
        router = build(config, torch.bfloat16).layers[1].ffn.router
        x = random_stream(1, 6, 64, dtype=torch.bfloat16)
        logits = x.double() @ router.weight.double().T
        want = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        scores = [router(x).scores]
        router = router.float()
        with torch.autocast("cpu", torch.bfloat16):
            scores.append(router(x.float()).scores)
        for got in scores:
            assert got.dtype == torch.float32
            close(got.double(), want, 1e-6)


def plant_scores(mp, logits_of):
    def scores(self, x):
        logits = logits_of(self, x)
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)

    mp.setattr(Router, "scores", scores)


def plant_gate_in_bfloat16(mp):
    plant_scores(mp, lambda self, x: F.linear(x, self.weight))


def plant_gate_matmul_in_bfloat16_sigmoid_in_float32(mp):
    plant_scores(mp, lambda self, x: F.linear(x, self.weight).float())


def plant_gate_under_autocast(mp):
    """The casts are there, but autocast is left on and undoes them."""
    plant_scores(mp, lambda self, x: F.linear(x.float(), self.weight.float()).float())


# The table ---------------------------------------------------------------------------------------------------------

PITFALLS = [
    (10, check_10_bias_selects_and_weights_are_unbiased, {
        "biased weights": plant_biased_weights,
        "bias inside the sigmoid": plant_bias_inside_the_sigmoid,
        "bias ignored": plant_bias_ignored,
        "softmax over the chosen": plant_softmax_over_the_chosen,
        "weights not normalised": plant_weights_not_normalised,
        "normalised over all": plant_weights_normalised_over_all_experts,
        "no scaling factor": plant_weights_without_the_scaling_factor,
    }),
    (11, check_11_groups_are_ranked_by_their_two_best, {
        "group score of the best one": plant_group_score_of_the_best_one,
        "group score of all members": plant_group_score_of_all_members,
        "V2 ranked like V3": plant_v2_groups_ranked_like_v3,
        "group score unbiased": plant_group_score_without_the_bias,
    }),
    (12, check_12_dropped_groups_cannot_win_with_negative_biases, {
        "0 instead of -inf": plant_zero_instead_of_minus_infinity,
        "groups not limited": plant_groups_not_limited,
    }),
    (14, check_14_gate_is_computed_in_float32, {
        "gate in bfloat16": plant_gate_in_bfloat16,
        "gate matmul in bfloat16": plant_gate_matmul_in_bfloat16_sigmoid_in_float32,
        "autocast left on": plant_gate_under_autocast,
    }),
]  # fmt: skip


@each_mistake(PITFALLS)
def test_check_passes_and_catches_the_planted_mistake(check, plant, monkeypatch):
    assert_caught(check, plant, monkeypatch)
