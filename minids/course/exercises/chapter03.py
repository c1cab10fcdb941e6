"""Exercises of chapter 03: routing, node limits, dispatch, and the two ways to balance.

Gates are a table [tokens, experts] that is 0 where an expert was not chosen, so that the order in which top-k lists
its choice does not matter. Beyond its arguments, the keywords of a reference change one step of it, for the known
mistakes and the planted bugs.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.course.checks import Bug, Function, SpotTheBug
from minids.course.exercises.mistakes import Changes, variants


def choose(biased: Float[Tensor, "tokens experts"], k: int) -> Float[Tensor, "tokens experts"]:
    """1 for the k largest of each row, 0 elsewhere."""
    return torch.zeros_like(biased).scatter(-1, biased.topk(k).indices, 1.0)


def weigh(values: Tensor, chosen: Tensor, by: str = "sum of the chosen") -> Tensor:
    """The chosen values, normalised over each row."""
    if by == "softmax":
        return (values + torch.log(chosen)).softmax(-1)  # the logarithm is 0 for the chosen, -inf for the others
    kept = values * chosen
    return kept / {"sum of the chosen": kept, "sum of all": values, "nothing": torch.ones_like(kept[:, :1])}[by].sum(
        -1, keepdim=True
    )


def gate(
    scores: Float[Tensor, "tokens experts"], bias: Float[Tensor, "experts"], k: int, scale: float, *,
    biased_weights: bool = False, biased_choice: bool = True, by: str = "sum of the chosen", scaled: bool = True,
) -> Float[Tensor, "tokens experts"]:  # fmt: skip
    """V3 eq. 13-16 without groups: choose by score plus bias, weigh by the score alone."""
    chosen = choose(scores + bias * biased_choice, k)
    return (scale if scaled else 1.0) * weigh(scores + bias * biased_weights, chosen, by)


GATE_MISTAKES: Changes = {
    "the bias also enters the weights": {"biased_weights": True},
    "the bias takes no part in the choice": {"biased_choice": False},
    "the chosen scores go through a softmax": {"by": "softmax"},
    "the weights are divided by the sum over all experts": {"by": "sum of all"},
    "the weights are not divided by their sum": {"by": "nothing"},
    "the weights are not multiplied by `scale`": {"scaled": False},
}


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


def limit_groups(
    scores: Float[Tensor, "tokens experts"], groups: int, kept: int, *,
    fill: float = -torch.inf, best: Callable[[int], int] = lambda size: 2, interleaved: bool = False,
    worst: bool = False,
) -> Float[Tensor, "tokens experts"]:  # fmt: skip
    """V3: groups are ranked by the sum of their two best, and what lies outside the best `kept` is -inf."""
    size = scores.shape[-1] // groups
    if interleaved:
        scores = scores.unflatten(-1, (size, groups)).mT.flatten(-2)
    rank = group_rank(scores, groups, best(size))
    limited = fill_outside(scores, -rank if worst else rank, kept, fill)
    return limited.unflatten(-1, (groups, size)).mT.flatten(-2) if interleaved else limited


GROUP_MISTAKES: Changes = {
    "the dropped groups are filled with 0": {"fill": 0.0},
    "a group is ranked by its single best score, as in V2": {"best": lambda size: 1},
    "a group is ranked by the sum of all its scores": {"best": lambda size: size},
    "expert i is put into group i % groups": {"interleaved": True},
    "the lowest groups are kept instead of the best": {"worst": True},
}


def group_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, experts, groups, kept, shift):
        return torch.rand(tokens, experts, generator=generator) + shift, groups, kept

    return [one(4, 8, 2, 1, -0.5), one(3, 12, 4, 2, 0.0), one(6, 12, 3, 1, -0.9), one(2, 32, 8, 4, -0.3)]


def dispatch(
    experts: Int[Tensor, "tokens k"], count: int, *,
    name: Callable[[Tensor, Tensor], Tensor] = lambda order, experts: order // experts.shape[1],
    idle: bool = True, choices: int | None = None, by_expert: bool = True,
) -> tuple[Int[Tensor, "rows"], Int[Tensor, "experts"]]:  # fmt: skip
    """The tokens that expert 0 processes, then those of expert 1, ..., and how many each one processes."""
    experts = experts[:, :choices]
    order = experts.flatten().argsort(stable=True) if by_expert else torch.arange(experts.numel())
    return name(order, experts), torch.bincount(experts.flatten(), minlength=count * idle)


DISPATCH_MISTAKES: Changes = {
    "the rows are places in the flattened table, not tokens": {"name": lambda order, experts: order},
    "the places in the flattened table are taken modulo k": {"name": lambda order, experts: order % experts.shape[1]},
    "the rows are the experts themselves, sorted": {"name": lambda order, experts: experts.flatten()[order]},
    "an expert that no token chose has no entry in the load": {"idle": False},
    "only the first choice of each token is sent": {"choices": 1, "name": lambda order, experts: order},
    "the rows are sorted by token, not by expert": {
        "by_expert": False,
        "name": lambda order, experts: order // experts.shape[1],
    },
}


def dispatch_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, k, count, used):
        return torch.rand(tokens, used, generator=generator).argsort(-1)[:, :k], count

    return [one(3, 2, 4, 3), one(1, 3, 8, 8), one(9, 2, 5, 4), one(20, 4, 16, 12)]


def together(loads: Int[Tensor, "micro experts"]) -> Int[Tensor, "1 experts"]:
    return loads.sum(0, keepdim=True)


def balance_bias(
    bias: Float[Tensor, "experts"], loads: Int[Tensor, "micro experts"], speed: float, *,
    direction: int = 1, step: Callable[[Tensor], Tensor] = lambda load: torch.sign(load.mean() - load),
    parts: Callable[[Tensor], Tensor] = together,
) -> Float[Tensor, "experts"]:  # fmt: skip
    """One update after an optimizer step, from the loads of its micro-batches together (V3 section 2.1.2)."""
    return bias + direction * speed * sum(step(load.float()) for load in parts(loads))


BALANCE_MISTAKES: Changes = {
    "the bias moves once per micro-batch": {"parts": lambda loads: loads},
    "only the last micro-batch is counted": {"parts": lambda loads: loads[-1:]},
    "busy experts are made more attractive": {"direction": -1},
    "the step is in proportion to the error": {"step": lambda load: (load.mean() - load) / load.mean()},
    "the step is the error itself": {"step": lambda load: load.mean() - load, "parts": together},
    "an expert exactly at the mean also moves up": {"step": lambda load: 2.0 * (load <= load.mean()) - 1},
    "the mean is rounded down to a whole number": {"step": lambda load: torch.sign(load.mean().floor() - load)},
    "the loads are compared with their median": {"step": lambda load: torch.sign(load.quantile(0.5) - load)},
}


def balance_examples(generator: torch.Generator) -> list[tuple]:
    def one(micro, experts, most, speed):
        loads = torch.randint(0, most, (micro, experts), generator=generator)
        return torch.randn(experts, generator=generator), loads, speed

    level = torch.tensor([[3, 1, 2, 2], [1, 3, 2, 2]])
    near = torch.tensor([[1, 1, 1, 1], [2, 1, 1, 2]])  # between whole numbers, which the mean is not
    examples = [one(3, 6, 9, 0.1), one(4, 5, 20, 0.01), (torch.zeros(4), level, 0.5), one(2, 16, 50, 0.001)]
    return [*examples, (torch.zeros(4), near, 0.5)]


def frequency(scores: Float[Tensor, "tokens experts"], k: int) -> Float[Tensor, "experts"]:
    """f: how often each expert is chosen, 1 being an equal share."""
    return choose(scores.detach(), k).mean(0) * scores.shape[-1] / k


def sequence_loss(
    scores: Float[Tensor, "batch seq experts"], k: int, *,
    whole_batch: bool = False, share: Callable[[Tensor], Tensor] = lambda scores: scores / scores.sum(-1, keepdim=True),
    factor: Callable[[int, int], float] = lambda experts, k: 1.0, gradient: bool = True,
) -> Float[Tensor, ""]:  # fmt: skip
    """V3 eq. 17-20 without alpha: the sum of f times P over experts, for each sequence, then the mean."""
    scores = scores.flatten(0, 1)[None] if whole_batch else scores
    p = share(scores).mean(1)
    f = torch.stack([frequency(sequence, k) for sequence in scores]) * factor(scores.shape[-1], k)
    return (f * (p if gradient else p.detach())).sum(-1).mean()


LOSS_MISTAKES: Changes = {
    "the whole batch is taken as one sequence": {"whole_batch": True},
    "P is a softmax of the logits": {"share": lambda scores: scores.logit().softmax(-1)},
    "P is a softmax of the scores": {"share": lambda scores: scores.softmax(-1)},
    "the scores of a token are not divided by their sum": {"share": lambda scores: scores},
    "f is a plain share of the choices, without the factor N / k": {"factor": lambda experts, k: k / experts},
    "f has the factor N, not N / k": {"factor": lambda experts, k: k},
    "P is detached, so that the loss has no gradient": {"gradient": False},
}


def loss_examples(generator: torch.Generator) -> list[tuple]:
    def one(batch, seq, experts, k):
        tilt = torch.randn(batch, 1, experts, generator=generator)
        return (torch.randn(batch, seq, experts, generator=generator) + 2 * tilt).sigmoid(), k

    return [one(2, 5, 4, 2), one(3, 8, 6, 1), one(4, 3, 9, 4)]


def route(scores, bias, k, groups, kept, scale, *, limit=limit_groups, biased_weights=False, by="sum of the chosen"):
    """The whole of V3's gate: groups, then experts, by biased score; weights from the scores alone."""
    return scale * weigh(scores + bias * biased_weights, choose(limit(scores + bias, groups, kept), k), by)


def route_unscaled(scores, bias, k, groups, kept, scale):
    return route(scores, bias, k, groups, kept, 1.0)


EXERCISES = [
    Function(
        "3.1", "gate", gate, gate_examples,
        mistakes=variants(gate, GATE_MISTAKES),
        hints=(
            "the bias decides which experts a token uses, and nothing else; which steps see it?",
            "two tables: scores + bias for topk only; the scores without bias, kept at the chosen places (scatter), "
            "divided by their sum per token, times scale",
        ),
        section="chapter 03, sections 2.3 to 2.5: gate weights, the bias",
        points=2,
    ),
    Function(
        "3.2", "limit_groups", limit_groups, group_examples,
        mistakes=variants(limit_groups, GROUP_MISTAKES),
        hints=(
            "first one value per group, then the best groups, then a mask over experts; which shapes have these three?",
            "scores.unflatten(-1, (groups, -1)) puts the experts of a group side by side; topk(2).values.sum(-1) ranks "
            "the groups; -inf, not 0, because a biased score may be negative",
        ),
        section="chapter 03, sections 2.6 and 2.7: the node limit",
        points=2,
    ),
    Function(
        "3.3", "dispatch", dispatch, dispatch_examples,
        mistakes=variants(dispatch, DISPATCH_MISTAKES),
        hints=(
            "sorting the flattened table by expert gives the order of its places; a place is not yet a token",
            "argsort with stable=True; place p of the flattened table is of token p // k; bincount has a minlength",
        ),
        section="chapter 03, section 3: dispatch",
        points=2, outputs=("the rows", "the load"),
    ),
    Function(
        "3.4", "balance_bias", balance_bias, balance_examples,
        mistakes=variants(balance_bias, BALANCE_MISTAKES),
        hints=(
            "one load per expert for the whole step first; only the side of the mean on which it lies counts",
            "loads are integers, of which torch takes no mean: load = loads.sum(0).float(); then the sign of "
            "load.mean() - load",
        ),
        section="chapter 03, sections 2.4 and 3: the bias",
    ),
    Function(
        "3.5", "sequence_loss", sequence_loss, loss_examples,
        mistakes=variants(sequence_loss, LOSS_MISTAKES),
        hints=(
            "for one sequence, f and P are vectors over experts: f averages to 1, P sums to 1. Through which one does "
            "the gradient flow?",
            "f: count the topk choices (F.one_hot), the mean over tokens times N / k; P: scores / scores.sum(-1, "
            "keepdim=True), the mean over tokens, not detached; sum f * P over experts, then the mean over sequences",
        ),
        section="chapter 03, section 3.1: the sequence-wise loss",
        points=3,
        gradients=("scores",),
    ),
    SpotTheBug(
        "3.6", "test_route", route,
        (
            Bug("the bias leaks into the weights", partial(route, biased_weights=True), "does a bias change weights?"),
            Bug(
                "dropped groups are filled with 0", partial(route, limit=partial(limit_groups, fill=0.0)),
                "what if all biased scores are negative?",
            ),
            Bug(
                "groups are ranked by their best expert", partial(route, limit=partial(limit_groups, best=lambda n: 1)),
                "a group with one very good expert against a group with two good ones",
            ),
            Bug("the chosen scores go through a softmax", partial(route, by="softmax"), "compute one token by hand"),
            Bug("the weights are not scaled", route_unscaled, "what should a token's weights sum to?"),
        ),
        hints=(
            "choose inputs for which you can compute the gates on paper: one token, four experts",
            "one token without groups, computed by hand; then scores [0.9, 0.1, 0.7, 0.6] in two groups, of which one "
            "is kept, with the same bias for all experts: 0, 0.5 and -2",
        ),
        section="chapter 03, sections 2.3 to 2.7: the whole gate",
    ),
]  # fmt: skip
