"""Exercises of chapter 03: V2's gate, dispatch with a capacity, two balance losses, the bias at work, the whole gate.

Gates are a table [tokens, experts] that is 0 where an expert was not chosen, so that the order in which top-k lists
its choice does not matter. Beyond its arguments, the keywords of a reference change one step of it, for the known
mistakes and the planted bugs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.compare import Wrong, describe
from minids.course.exercises.mistakes import Changes, variants
from minids.course.observation import Observation


def choose(biased: Float[Tensor, "tokens experts"], k: int) -> Float[Tensor, "tokens experts"]:
    """1 for the k largest of each row, 0 elsewhere."""
    return torch.zeros_like(biased).scatter(-1, biased.topk(k).indices, 1.0)


def weigh(values: Tensor, chosen: Tensor, by: str = "sum of the chosen") -> Tensor:
    """The chosen values, normalised over each row."""
    if by == "softmax":
        return (values + torch.log(chosen)).softmax(-1)  # the logarithm is 0 for the chosen, -inf for the others
    kept = values * chosen
    return kept / {"sum of the chosen": kept, "nothing": torch.ones_like(kept[:, :1])}[by].sum(-1, keepdim=True)


def gate(
    scores: Float[Tensor, "tokens experts"], bias: Float[Tensor, "experts"], k: int, scale: float
) -> Float[Tensor, "tokens experts"]:
    """V3 eq. 13-16 without groups: choose by score plus bias, weigh by the score alone."""
    return scale * weigh(scores, choose(scores + bias, k))


def group_rank(scores: Float[Tensor, "tokens experts"], groups: int, best: int) -> Float[Tensor, "tokens groups"]:
    """Each group's score: the sum of its `best` largest, of all with 0."""
    grouped = scores.unflatten(-1, (groups, -1))
    return grouped.topk(best or grouped.shape[-1]).values.sum(-1)


def fill_outside(
    scores: Float[Tensor, "tokens experts"], rank: Float[Tensor, "tokens groups"], kept: int, value: float
) -> Float[Tensor, "tokens experts"]:
    """The scores, with `value` in all but the `kept` groups of highest rank."""
    inside = choose(rank, kept).bool()
    each = scores.shape[-1] // rank.shape[-1]
    return scores.masked_fill(~inside.repeat_interleave(each, -1), value)


def limit_groups(
    scores: Float[Tensor, "tokens experts"], groups: int, kept: int, *,
    fill: float = -torch.inf, best: int = 2,
) -> Float[Tensor, "tokens experts"]:  # fmt: skip
    """V3: groups are ranked by the sum of their two best, and what lies outside the best `kept` is -inf."""
    return fill_outside(scores, group_rank(scores, groups, best), kept, fill)


def gate_v2(
    logits: Float[Tensor, "tokens experts"], k: int, groups: int, kept: int, scale: float, *,
    affinity: str = "softmax", best: int = 1, by: str = "nothing", limited: bool = True, scaled: bool = True,
) -> Float[Tensor, "tokens experts"]:  # fmt: skip
    """V2's gate: softmax over all experts, groups ranked by their best expert, gate weights that are not normalised."""
    scores = logits.sigmoid() if affinity == "sigmoid" else logits.softmax(-1)
    rank = group_rank(scores, groups, best)
    chosen = choose(fill_outside(scores, rank, kept if limited else groups, -torch.inf), k)
    if affinity == "softmax of the kept":
        scores = fill_outside(logits, rank, kept, -torch.inf).softmax(-1)
    return (scale if scaled else 1.0) * weigh(scores, chosen, by)


V2_MISTAKES: Changes = {
    "the affinities are sigmoids, as in V3": {"affinity": "sigmoid"},
    "a group is ranked by the sum of its two best, as in V3": {"best": 2},
    "a group is ranked by the mean of its experts": {"best": 0},
    "a token's gate weights are divided by their sum, as in V3": {"by": "sum of the chosen", "best": 1},
    "the softmax is taken over the kept groups only": {"affinity": "softmax of the kept", "by": "nothing"},
    "a token may use experts of all groups": {"limited": False, "best": 1, "affinity": "softmax"},
    "the gate weights are not multiplied by `scale`": {"scaled": False},
}


def v2_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, experts, k, groups, kept, scale):
        return 2 * torch.randn(tokens, experts, generator=generator), k, groups, kept, scale

    return [one(4, 8, 2, 4, 2, 16.0), one(6, 12, 3, 3, 1, 1.5), one(3, 24, 6, 8, 3, 16.0), one(8, 12, 3, 4, 2, 2.0)]


def slots(
    experts: Int[Tensor, "tokens k"], affinity: Float[Tensor, "tokens k"], count: int, capacity: int, *,
    order: str = "highest", empty: int = -1, named: str = "token", choices: int | None = None,
) -> Int[Tensor, "count capacity"]:  # fmt: skip
    """The tokens in each expert's slots, highest affinity first; what exceeds the capacity is dropped."""
    table = torch.full((count, capacity), empty)
    place = torch.arange(experts.numel()).view_as(experts)
    token = {"token": place // experts.shape[1], "place": place, "column": place % experts.shape[1]}[named]
    token, experts, affinity = (t[:, :choices] for t in (token, experts, affinity))
    for expert in range(count):
        here = experts == expert
        best = affinity[here].argsort(descending=order != "lowest")
        mine = (token[here] if order == "first" else token[here][best])[:capacity]
        table[expert, : len(mine)] = mine.sort().values if order == "sorted" else mine
    return table


SLOTS_MISTAKES: Changes = {
    "the first tokens of the batch keep their slots, whatever their affinity": {"order": "first"},
    "the tokens of lowest affinity keep their slots": {"order": "lowest"},
    "an expert's tokens are in rising order, not by affinity": {"order": "sorted"},
    "an empty slot holds 0, which is also a token": {"empty": 0},
    "the slots hold places in the flattened table, not tokens": {"named": "place", "choices": None},
    "the slots hold the column of the choice, not the token": {"named": "column", "choices": None},
    "only the first choice of each token is dispatched": {"choices": 1},
}


def slots_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, k, count, capacity, used):
        experts = torch.rand(tokens, used, generator=generator).argsort(-1)[:, :k]
        return experts, torch.rand(tokens, k, generator=generator), count, capacity

    return [one(5, 2, 4, 2, 3), one(3, 1, 4, 2, 4), one(12, 3, 8, 4, 5), one(30, 4, 16, 2, 12)]


def balance_bias(
    bias: Float[Tensor, "experts"], loads: Int[Tensor, "micro experts"], speed: float
) -> Float[Tensor, "experts"]:
    """One update after an optimizer step, from the loads of its micro-batches together (V3 section 2.1.2)."""
    load = loads.sum(0).float()
    return bias + speed * torch.sign(load.mean() - load)


Counted = Callable[[Tensor, int], Tensor]


def frequency(scores: Float[Tensor, "tokens experts"], k: int, counted: Counted = choose) -> Float[Tensor, "experts"]:
    """f: how often each expert is chosen, 1 being an equal share."""
    return counted(scores.detach(), k).mean(0) * scores.shape[-1] / k


def sequence_loss(
    scores: Float[Tensor, "batch seq experts"], k: int, *,
    whole_batch: bool = False, share: Callable[[Tensor], Tensor] = lambda scores: scores / scores.sum(-1, keepdim=True),
    factor: Callable[[int, int], float] = lambda experts, k: 1.0, gradient: bool = True, counted: Counted = choose,
) -> Float[Tensor, ""]:  # fmt: skip
    """V3 eq. 17-20 without alpha: the sum of f times P over experts, for each sequence, then the mean."""
    scores = scores.flatten(0, 1)[None] if whole_batch else scores
    p = share(scores).mean(1)
    f = torch.stack([frequency(sequence, k, counted) for sequence in scores]) * factor(scores.shape[-1], k)
    return (f * (p if gradient else p.detach())).sum(-1).mean()


def batch_loss(scores: Float[Tensor, "batch seq experts"], k: int, **changes: object) -> Float[Tensor, ""]:
    """The batch-wise balance loss of V3's ablation, without its factor: f and P are counted over the whole batch."""
    return sequence_loss(scores, k, **{"whole_batch": True, **changes})  # type: ignore[arg-type]


LOSS_MISTAKES: Changes = {
    "each sequence is balanced by itself, as in V3's own loss": {"whole_batch": False},
    "P is a softmax of the logits": {"share": lambda scores: scores.logit().softmax(-1)},
    "P is a softmax of the scores": {"share": lambda scores: scores.softmax(-1)},
    "the scores of a token are not divided by their sum": {"share": lambda scores: scores},
    "P is divided by the sum over tokens, not over experts": {
        "share": lambda scores: scores / scores.sum(-2, keepdim=True),
        "gradient": True,  # its mean over tokens is constant
    },
    "f counts the scores above a half, not the k highest": {"counted": lambda scores, k: (scores > 0.5).float()},
    "f is a plain share of the choices, without the factor N / k": {"factor": lambda experts, k: k / experts},
    "f has the factor N, not N / k": {"factor": lambda experts, k: k},
    "P is detached, so that the loss has no gradient": {"gradient": False},
}


def loss_examples(generator: torch.Generator) -> list[tuple]:
    def one(batch, seq, experts, k):
        tilt = torch.randn(batch, 1, experts, generator=generator)
        return (torch.randn(batch, seq, experts, generator=generator) + 2 * tilt).sigmoid(), k

    return [one(2, 5, 4, 2), one(3, 8, 6, 1), one(4, 3, 9, 4)]


@dataclass(frozen=True)
class Design(Function):
    """An exercise to make an input with a property; `objection` says what is wrong with a result, or None."""

    objection: Callable[..., str | None] = lambda result, *arguments: None

    def _compare(self, seen: Observation, arguments: tuple) -> None:
        wrong = self.objection(seen.result, *arguments)
        if wrong:
            raise Wrong(wrong)


def disagree(experts: int, k: int, tokens: int, *, own: bool = True, even: bool = False, rest: float = 0.001) -> Tensor:
    """Scores of experts / k sequences, each of which uses k experts of its own: the batch is even, no sequence is."""
    sequence, token = torch.arange(experts // k)[:, None], torch.arange(tokens)
    first = (sequence if own else 0) + (token if even else 0) + 0 * (sequence + token)
    used = (first[..., None] * k + torch.arange(k)) % experts
    return torch.full((experts // k, tokens, experts), rest).scatter(-1, used, 0.9)


def agreement(scores: object, experts: int, k: int, tokens: int) -> str | None:
    shape = (experts // k, tokens, experts)
    if not isinstance(scores, Tensor) or scores.shape != shape:
        return f"the scores should be a tensor of shape {shape}, got {describe(scores)}"
    if not scores.is_floating_point() or not ((scores > 0) & (scores < 1)).all():
        return "every score should lie between 0 and 1, without them: sigmoids never reach either"
    load = choose(scores.flatten(0, 1), k).sum(0)
    if (load != load.mean()).any():
        return f"the loads of the whole batch are {load.int().tolist()}: the bias would move"
    loss, wanted = sequence_loss(scores, k).item(), 0.9 * experts / k
    return None if loss >= wanted else f"the sequence-wise loss is {loss:.2f}; it should be at least {wanted:.2f}"


DESIGN_MISTAKES: Changes = {
    "all sequences use the same experts": {"own": False},
    "the tokens of a sequence use different experts, so that each sequence is even too": {"even": True},
    "the other affinities are 0.5, so that P is nearly even": {"rest": 0.5},
}


def route(scores, bias, k, groups, kept, scale, *, limit=limit_groups, biased_weights=False, by="sum of the chosen"):
    """The whole of V3's gate: groups, then experts, by biased score; weights from the scores alone."""
    return scale * weigh(scores + bias * biased_weights, choose(limit(scores + bias, groups, kept), k), by)


def route_unscaled(scores, bias, k, groups, kept, scale):
    return route(scores, bias, k, groups, kept, 1.0)


EXERCISES = [
    Function(
        "3.1", "gate_v2", gate_v2, v2_examples,
        mistakes=variants(gate_v2, V2_MISTAKES),
        hints=(
            "section 5.2 lists what differs from V3's gate: the affinity, the rank of a group, and what happens to the "
            "chosen affinities",
            "logits.softmax(-1) over all experts; unflatten(-1, (groups, -1)).amax(-1) ranks the groups; -inf outside "
            "the best `kept`; then topk, and the softmax values at the chosen places times scale, not divided",
        ),
        section="chapter 03, sections 2.3, 2.6 and 5.2: gate weights, groups, what changed from V2",
        points=2,
    ),
    Function(
        "3.2", "slots", slots, slots_examples,
        mistakes=variants(slots, SLOTS_MISTAKES),
        hints=(
            "one expert at a time: which places of the table have chosen it, and which of these have the highest "
            "affinity?",
            "here = experts == i; tokens = here.nonzero()[:, 0]; affinity[here] is in the same order; argsort it with "
            "descending=True, keep the first `capacity`, and write them into a table filled with -1",
        ),
        section="chapter 03, section 4.6: capacity and dropped tokens",
        points=2,
    ),
    Function(
        "3.3", "batch_loss", batch_loss, loss_examples,
        mistakes=variants(batch_loss, LOSS_MISTAKES),
        hints=(
            "f and P are vectors over experts: f averages to 1, P sums to 1. Over which tokens are they counted here, "
            "and through which one does the gradient flow?",
            "flatten batch and sequence first. f: count the topk choices (F.one_hot), mean over tokens times N / k; "
            "P: scores / scores.sum(-1, keepdim=True), the mean over tokens, not detached; then the sum of f * P",
        ),
        section="chapter 03, sections 3.1 and 5.3: balance losses, the published control",
        points=2,
        gradients=("scores",),
    ),
    Design(
        "3.4", "disagree", disagree, lambda generator: [(8, 2, 5), (6, 3, 4), (12, 1, 3), (16, 4, 7)],
        mistakes=variants(disagree, DESIGN_MISTAKES),
        hints=(
            "section 3.1 has such a batch of two sequences for N = 4 and k = 2; what would N / k sequences do?",
            "sequence i uses experts i k to i k + k - 1 for all its tokens, with a high affinity; the other affinities "
            "have to be small for P to be uneven",
        ),
        section="chapter 03, section 3.1: the balance loss",
        points=2,
        objection=agreement,
    ),
    Experiment(
        "3.5", "updates_until_balanced", "updates until MaxVio is below 0.1", 100, 135,
        hints=(
            "choose by affinity plus bias, count, compare MaxVio with 0.1, and only then update; the tokens stay the "
            "same",
            "chosen = (affinity + bias).topk(4).indices; load = torch.bincount(chosen.flatten(), minlength=64).float()"
            "; bias = bias + 0.002 * (load.mean() - load).sign(); count the updates",
        ),
        section="chapter 03, sections 2.4 and 4.7: the bias and its speed",
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
                "groups are ranked by their best expert", partial(route, limit=partial(limit_groups, best=1)),
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
    OpenTask(
        "3.7", "fine_or_coarse",
        (
            "weights kept and weights used per token are equal in both layers, and printed",
            "it says before the run why the task should need combinations of experts",
            "at least three seeds, with their spread, and a dense control",
            "it says what the result does not show",
        ),
        hints=(
            "a random fact has nothing in common with another; what if an answer had several parts, each of which many "
            "facts share?",
            "a key made of four parts with 16 values each, and an answer that is a function of each part alone",
        ),
        section="chapter 03, sections 2.1 and 4.1: fine-grained experts, random facts",
    ),
]  # fmt: skip
