"""Exercises of chapter 03: routing, node limits, dispatch, and the two ways to balance.

Gates are a table [tokens, experts] that is 0 where an expert was not chosen, so that the order in which top-k lists
its choice does not matter.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.course.checks import Bug, Function, SpotTheBug


def choose(biased: Float[Tensor, "tokens experts"], k: int) -> Float[Tensor, "tokens experts"]:
    """1 for the k largest of each row, 0 elsewhere."""
    return torch.zeros_like(biased).scatter(-1, biased.topk(k).indices, 1.0)


def gate(
    scores: Float[Tensor, "tokens experts"], bias: Float[Tensor, "experts"], k: int, scale: float
) -> Float[Tensor, "tokens experts"]:
    """V3 eq. 13-16 without groups: choose by score plus bias, weigh by the score alone."""
    kept = scores * choose(scores + bias, k)
    return scale * kept / kept.sum(-1, keepdim=True)


def gate_with_leaking_bias(scores, bias, k, scale):
    kept = (scores + bias) * choose(scores + bias, k)
    return scale * kept / kept.sum(-1, keepdim=True)


def gate_without_bias(scores, bias, k, scale):
    return gate(scores, torch.zeros_like(bias), k, scale)


def gate_by_softmax(scores, bias, k, scale):
    outside = torch.log(choose(scores + bias, k))  # 0 for the chosen, -inf for the others
    return scale * (scores + outside).softmax(-1)


def gate_normalised_over_all(scores, bias, k, scale):
    return scale * scores * choose(scores + bias, k) / scores.sum(-1, keepdim=True)


def gate_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, experts, k, scale, width):
        scores = torch.randn(tokens, experts, generator=generator).sigmoid()
        return scores, width * torch.randn(experts, generator=generator), k, scale

    return [one(4, 6, 2, 2.5, 0.3), one(1, 5, 3, 1.0, 0.5), one(7, 3, 1, 2.0, 0.4), one(5, 16, 4, 2.5, 0.2)]


def group_rank(scores: Float[Tensor, "tokens experts"], groups: int, best: int) -> Float[Tensor, "tokens groups"]:
    """Each group's score: the sum of its `best` largest."""
    return scores.unflatten(-1, (groups, -1)).topk(best).values.sum(-1)


def fill_outside(
    scores: Float[Tensor, "tokens experts"], rank: Float[Tensor, "tokens groups"], kept: int, value: float
) -> Float[Tensor, "tokens experts"]:
    """The scores, with `value` in all but the `kept` groups of highest rank."""
    inside = choose(rank, kept).bool()
    each = scores.shape[-1] // rank.shape[-1]
    return scores.masked_fill(~inside.repeat_interleave(each, -1), value)


def limit_groups(scores: Float[Tensor, "tokens experts"], groups: int, kept: int) -> Float[Tensor, "tokens experts"]:
    """V3: groups are ranked by the sum of their two best, and what lies outside the best `kept` is -inf."""
    return fill_outside(scores, group_rank(scores, groups, 2), kept, -torch.inf)


def limit_groups_with_zeros(scores, groups, kept):
    return fill_outside(scores, group_rank(scores, groups, 2), kept, 0.0)


def limit_groups_by_best(scores, groups, kept):
    return fill_outside(scores, group_rank(scores, groups, 1), kept, -torch.inf)


def limit_groups_by_sum(scores, groups, kept):
    return fill_outside(scores, group_rank(scores, groups, scores.shape[-1] // groups), kept, -torch.inf)


def limit_groups_interleaved(scores, groups, kept):
    tokens, experts = scores.shape
    turned = scores.view(tokens, experts // groups, groups).mT.reshape(tokens, experts)
    limited = limit_groups(turned, groups, kept)
    return limited.view(tokens, groups, experts // groups).mT.reshape(tokens, experts)


def group_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, experts, groups, kept, shift):
        return torch.rand(tokens, experts, generator=generator) + shift, groups, kept

    return [one(4, 8, 2, 1, -0.5), one(3, 12, 4, 2, 0.0), one(6, 12, 3, 1, -0.9), one(2, 32, 8, 4, -0.3)]


def dispatch(experts: Int[Tensor, "tokens k"], count: int) -> tuple[Int[Tensor, "rows"], Int[Tensor, "experts"]]:
    """The tokens that expert 0 reads, then those of expert 1, ..., and how many each one reads."""
    order = experts.flatten().argsort(stable=True)
    return order // experts.shape[1], torch.bincount(experts.flatten(), minlength=count)


def dispatch_slots(experts, count):
    return experts.flatten().argsort(stable=True), dispatch(experts, count)[1]


def dispatch_experts(experts, count):
    return experts.flatten().sort(stable=True).values, dispatch(experts, count)[1]


def dispatch_forgetting_idle(experts, count):
    return dispatch(experts, count)[0], torch.bincount(experts.flatten())


def dispatch_first_choice(experts, count):
    return dispatch(experts[:, :1], count)


def dispatch_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, k, count, used):
        return torch.rand(tokens, used, generator=generator).argsort(-1)[:, :k], count

    return [one(3, 2, 4, 3), one(1, 3, 8, 8), one(9, 2, 5, 4), one(20, 4, 16, 12)]


def balance_bias(
    bias: Float[Tensor, "experts"], loads: Int[Tensor, "micro experts"], speed: float
) -> Float[Tensor, "experts"]:
    """One update after an optimizer step, from the loads of its micro-batches together (V3 section 2.1.2)."""
    load = loads.sum(0).float()
    return bias + speed * torch.sign(load.mean() - load)


def balance_each_micro_batch(bias, loads, speed):
    for load in loads:
        bias = balance_bias(bias, load[None], speed)
    return bias


def balance_the_wrong_way(bias, loads, speed):
    return balance_bias(bias, loads, -speed)


def balance_in_proportion(bias, loads, speed):
    load = loads.sum(0).float()
    return bias + speed * (load.mean() - load) / load.mean()


def balance_by_last(bias, loads, speed):
    return balance_bias(bias, loads[-1:], speed)


def balance_examples(generator: torch.Generator) -> list[tuple]:
    def one(micro, experts, most, speed):
        loads = torch.randint(0, most, (micro, experts), generator=generator)
        return torch.randn(experts, generator=generator), loads, speed

    level = torch.tensor([[3, 1, 2, 2], [1, 3, 2, 2]])
    return [one(3, 6, 9, 0.1), one(4, 5, 20, 0.01), (torch.zeros(4), level, 0.5), one(2, 16, 50, 0.001)]


def frequency(scores: Float[Tensor, "tokens experts"], k: int) -> Float[Tensor, "experts"]:
    """f: how often each expert is chosen, 1 being an equal share."""
    return choose(scores.detach(), k).mean(0) * scores.shape[-1] / k


def sequence_loss(scores: Float[Tensor, "batch seq experts"], k: int) -> Float[Tensor, ""]:
    """V3 eq. 17-20 without alpha: the sum of f times P over experts, for each sequence, then the mean."""
    share = scores / scores.sum(-1, keepdim=True)
    return torch.stack([(frequency(s, k) * p.mean(0)).sum() for s, p in zip(scores, share, strict=True)]).mean()


def sequence_loss_over_batch(scores, k):
    return sequence_loss(scores.flatten(0, 1)[None], k)


def sequence_loss_of_softmax(scores, k):
    share = scores.logit().softmax(-1)
    return torch.stack([(frequency(s, k) * p.mean(0)).sum() for s, p in zip(scores, share, strict=True)]).mean()


def sequence_loss_unnormalised(scores, k):
    return torch.stack([(frequency(s, k) * s.mean(0)).sum() for s in scores]).mean()


def sequence_loss_without_share(scores, k):
    return sequence_loss(scores, k) * k / scores.shape[-1]


def loss_examples(generator: torch.Generator) -> list[tuple]:
    def one(batch, seq, experts, k):
        tilt = torch.randn(batch, 1, experts, generator=generator)
        return (torch.randn(batch, seq, experts, generator=generator) + 2 * tilt).sigmoid(), k

    return [one(2, 5, 4, 2), one(3, 8, 6, 1), one(4, 3, 9, 4)]


def route(scores, bias, k, groups, kept, scale):
    """The whole of V3's gate: groups, then experts, by biased score; weights from the scores alone."""
    return scale * _weigh(scores, choose(limit_groups(scores + bias, groups, kept), k))


def route_with_leaking_bias(scores, bias, k, groups, kept, scale):
    return scale * _weigh(scores + bias, choose(limit_groups(scores + bias, groups, kept), k))


def route_with_zeros(scores, bias, k, groups, kept, scale):
    return scale * _weigh(scores, choose(limit_groups_with_zeros(scores + bias, groups, kept), k))


def route_by_best(scores, bias, k, groups, kept, scale):
    return scale * _weigh(scores, choose(limit_groups_by_best(scores + bias, groups, kept), k))


def route_by_softmax(scores, bias, k, groups, kept, scale):
    outside = torch.log(choose(limit_groups(scores + bias, groups, kept), k))
    return scale * (scores + outside).softmax(-1)


def route_unscaled(scores, bias, k, groups, kept, scale):
    return route(scores, bias, k, groups, kept, 1.0)


def _weigh(values, chosen):
    return values * chosen / (values * chosen).sum(-1, keepdim=True)


EXERCISES = [
    Function(
        "3.1", "gate", gate, gate_examples,
        mistakes={
            "the bias also enters the weights": gate_with_leaking_bias,
            "the bias takes no part in the choice": gate_without_bias,
            "the chosen scores go through a softmax": gate_by_softmax,
            "the weights are divided by the sum over all experts": gate_normalised_over_all,
        },
        hint="two tables: one of scores + bias, for topk only; one of scores, of which the chosen entries remain",
        points=2,
    ),
    Function(
        "3.2", "limit_groups", limit_groups, group_examples,
        mistakes={
            "the dropped groups are filled with 0": limit_groups_with_zeros,
            "a group is ranked by its single best score, as in V2": limit_groups_by_best,
            "a group is ranked by the sum of all its scores": limit_groups_by_sum,
            "expert i is put into group i % groups": limit_groups_interleaved,
        },
        hint="scores.unflatten(-1, (groups, -1)) puts the experts of a group side by side",
        points=2,
    ),
    Function(
        "3.3", "dispatch", dispatch, dispatch_examples,
        mistakes={
            "places in the flattened table are taken for tokens": dispatch_slots,
            "the experts themselves are returned, sorted": dispatch_experts,
            "an expert that nobody chose has no entry in the load": dispatch_forgetting_idle,
            "only the first choice of each token is sent": dispatch_first_choice,
        },
        hint="flatten, argsort with stable=True, and ask which token place p of the flattened table belongs to",
        points=2, outputs=("the rows", "the load"),
    ),
    Function(
        "3.4", "balance_bias", balance_bias, balance_examples,
        mistakes={
            "the bias moves once per micro-batch": balance_each_micro_batch,
            "busy experts are made more attractive": balance_the_wrong_way,
            "the step is in proportion to the error": balance_in_proportion,
            "only the last micro-batch is counted": balance_by_last,
        },
        hint="one load per expert for the whole step first; then compare it with the mean over experts",
    ),
    Function(
        "3.5", "sequence_loss", sequence_loss, loss_examples,
        mistakes={
            "the whole batch is taken as one sequence": sequence_loss_over_batch,
            "P is a softmax of the logits": sequence_loss_of_softmax,
            "the scores of a token are not divided by their sum": sequence_loss_unnormalised,
            "f is a plain share of the choices, without the factor N / k": sequence_loss_without_share,
        },
        hint="for one sequence: f and P are vectors over experts; f averages to 1, P sums to 1",
        points=3,
    ),
    SpotTheBug(
        "3.6", "test_route", route,
        (
            Bug("the bias leaks into the weights", route_with_leaking_bias, "does a bias change weights?"),
            Bug("dropped groups are filled with 0", route_with_zeros, "what if all biased scores are negative?"),
            Bug("groups are ranked by their best expert", route_by_best, "one star against two good ones"),
            Bug("the chosen scores go through a softmax", route_by_softmax, "compute one token's weights by hand"),
            Bug("the weights are not scaled", route_unscaled, "what should a token's weights sum to?"),
        ),
    ),
]  # fmt: skip
