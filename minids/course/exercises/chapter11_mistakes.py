"""Implementations of the exercises of chapter 11 whose keyword arguments make the known mistakes."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minids.course.exercises.mistakes import Changes

# 11.1 ----------------------------------------------------------------------------------------------------------------


def index_scores(
    q: Float[Tensor, "queries heads dim"],
    w: Float[Tensor, "queries heads"],
    k: Float[Tensor, "tokens dim"],
    *,
    product: Callable[[Tensor], Tensor] = torch.relu,
    weight: Callable[[Tensor], Tensor] = lambda w: w,
    late_relu: bool = False,
    first: int | None = None,
    masked: bool = True,
) -> Float[Tensor, "queries tokens"]:
    """Index scores of the last queries of a sequence; -inf for later tokens. `first`: position of the first query."""
    products = torch.einsum("thd,sd->ths", q, k)
    products = products if late_relu else product(products)
    scores = torch.einsum("th,ths->ts", weight(w), products)
    scores = scores.relu() if late_relu else scores
    positions = torch.arange(len(q))[:, None] + (len(k) - len(q) if first is None else first)
    return scores.masked_fill(torch.arange(len(k)) > positions, -torch.inf) if masked else scores


SCORE_MISTAKES: Changes = {
    "there is no ReLU": {"product": lambda x: x, "late_relu": False},
    "ReLU is applied to the sum over heads, not to each product": {"late_relu": True},
    "the head weights go through a softmax": {"weight": lambda w: w.softmax(-1)},
    "the queries are taken for the first tokens of the sequence, where they are the last": {"first": 0},
    "later tokens are not masked": {"masked": False, "first": None},
}

# 11.2 ----------------------------------------------------------------------------------------------------------------


def choose_with_window(
    scores: Float[Tensor, "tokens tokens"],
    k: int,
    window: int,
    *,
    later: bool = False,
    compete: bool = False,
    leak: bool = False,
    longer: int = 0,
) -> Bool[Tensor, "tokens tokens"]:
    """Mask of the last `window` tokens of each query and of the k best tokens before them."""
    n = len(scores)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for t, row in enumerate(scores.tolist()):
        start = max(0, t - window - longer + 1)
        mask[t, start : t + 1] = True
        candidates = range(n if leak else t + 1) if compete or leak else range(start)
        best = sorted(candidates, key=lambda s, row=row: (-row[s], -s if later else s))  # type: ignore[misc]
        mask[t, best[:k]] = True
    return mask


CHOICE_MISTAKES: Changes = {
    "of equal scores the later token is chosen": {"later": True},
    "the tokens of the window also take places among the k": {"compete": True},
    "later tokens can be chosen": {"leak": True, "compete": False},
    "the window leaves out the query itself": {"longer": -1},
    "the window is one token too long": {"longer": 1},
}

# 11.3 ----------------------------------------------------------------------------------------------------------------


def sparse_loss(
    scores: Float[Tensor, "tokens tokens"],
    probabilities: Float[Tensor, "heads tokens tokens"],
    chosen: Bool[Tensor, "tokens tokens"],
    *,
    renormalise: bool = True,
    per_head: bool = False,
    reverse: bool = False,
    everywhere: bool = False,
    entropy: bool = True,
    total: bool = False,
) -> Float[Tensor, ""]:
    """KL of the sparse stage, mean over queries; `probabilities` are those of dense attention."""
    target = probabilities.detach() * chosen
    if per_head:
        target = target / target.sum(-1, keepdim=True)
    target = target.sum(0)
    if renormalise:
        target = target / target.sum(-1, keepdim=True)
    visible = torch.ones_like(chosen).tril() if everywhere else chosen
    log_chance = scores.masked_fill(~visible, -torch.inf).log_softmax(-1).masked_fill(~visible, 0.0)
    if reverse:
        log_target = target.clamp_min(1e-30).log()
        rows = (log_chance.exp() * (log_chance - log_target) * chosen).sum(-1)
    else:
        rows = -(target * log_chance).sum(-1) + (torch.xlogy(target, target).sum(-1) if entropy else 0.0)
    return rows.sum() if total else rows.mean()


LOSS_MISTAKES: Changes = {
    "the target does not sum to 1 over the chosen tokens": {"renormalise": False},
    "each head is divided by its sum over the chosen tokens before the heads are added": {"per_head": True},
    "target and prediction are exchanged in the KL divergence": {"reverse": True},
    "the softmax of the scores runs over all visible tokens, not over the chosen ones": {"everywhere": True},
    "it is the cross-entropy, without the entropy of the target": {"entropy": False, "reverse": False},
    "it is the sum over queries, not their mean": {"total": True},
}

# 11.4 ----------------------------------------------------------------------------------------------------------------


def csa_entries(
    content: Float[Tensor, "tokens 2 width"],
    logits: Float[Tensor, "tokens 2 width"],
    bias: Float[Tensor, "m 2 width"],
    *,
    own: int = 0,
    across: int = 0,
    apart: bool = False,
    padded: bool = False,
    biased: bool = True,
    following: int = -1,
) -> Float[Tensor, "entries width"]:
    """Entries of CSA: series 0 of a token goes into the entry of its block, series 1 into the following one."""
    m = len(bias)
    blocks = len(content) // m
    z = logits[: blocks * m].unflatten(0, (blocks, m)) + biased * bias
    c = content[: blocks * m].unflatten(0, (blocks, m))
    entries = []
    for i in range(blocks):
        parts = [(c[i, :, own], z[i, :, own])]
        if 0 <= i + following < blocks:
            parts.append((c[i + following, :, 1 - own], z[i + following, :, 1 - own]))
        elif padded:
            parts.append((torch.zeros_like(parts[0][0]), torch.zeros_like(parts[0][1])))
        if apart:
            entries.append(sum((x * y.softmax(0)).sum(0) for x, y in parts) / len(parts))
        else:
            x, y = (torch.cat(each) for each in zip(*parts, strict=True))
            entries.append((x * (y.softmax(0) if across == 0 else y.mean(1, keepdim=True).softmax(0))).sum(0))
    return torch.stack(entries)


ENTRY_MISTAKES: Changes = {
    "the two series are exchanged": {"own": 1},
    "the weights are the same for all channels": {"across": 1, "apart": False},
    "each block has a softmax of its own, and the two results are averaged": {"apart": True},
    "the block before the first one counts with zeros, not at all": {"padded": True},
    "the bias is forgotten": {"biased": False},
    "the second series comes from the block after, not from the block before": {"following": 1},
}

# 11.5 ----------------------------------------------------------------------------------------------------------------


def attend_compressed(
    x: Float[Tensor, "tokens width"],
    m: int,
    window: int,
    *,
    late: int = 0,
    own_block: bool = False,
    longer: int = 0,
    without_query: bool = False,
    summed: bool = False,
) -> Float[Tensor, "tokens width"]:
    """One head over mean-pooled entries of m tokens and the last `window` tokens, all key and value at once."""
    blocks = [x[i : i + m] for i in range(0, len(x), m)]
    entries = torch.stack([block.sum(0) / (1 if summed else len(block)) for block in blocks])
    out = []
    for t in range(len(x)):
        finished = min(t // m + 1 if own_block else (t + 1 - late) // m, len(entries))
        recent = x[max(0, t + 1 - window - longer) : t + (0 if without_query and t else 1)]
        seen = torch.cat((entries[:finished], recent))
        out.append((seen @ x[t]).softmax(0) @ seen)
    return torch.stack(out)


# 11.6 ----------------------------------------------------------------------------------------------------------------


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """Hadamard matrix of n rows, a power of two, divided by sqrt(n): an orthogonal matrix of equal magnitudes."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / n**0.5
