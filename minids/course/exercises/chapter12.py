"""Exercises of chapter 12: Sinkhorn, Muon for a stack, QK-Clip, a hash of n-grams, a scheduler, a test, a gain.

Beyond its arguments, the keywords of a reference change one step of it, for the known mistakes and the planted bugs.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Experiment, Function, SpotTheBug
from minids.course.exercises.mistakes import Changes, variants

Stack = Float[Tensor, "experts rows columns"]

# 12.1 Sinkhorn -------------------------------------------------------------------------------------------------------


def total(matrix: Tensor, dim: int) -> Tensor:
    return matrix.sum(dim, keepdim=True)


def balance(
    logits: Float[Tensor, "*stack n n"], iterations: int, *, order: Sequence[int] = (-1, -2), first: bool = True,
    again: bool = False, norm: Callable[[Tensor, int], Tensor] = total,
) -> Float[Tensor, "*stack n n"]:  # fmt: skip
    """Divide rows, then columns, of exp(logits) by their sums, `iterations` times."""
    matrix = (logits - logits.amax((-2, -1), keepdim=True)).exp() if first else logits.abs()
    for _ in range(iterations):
        for dim in order:
            matrix = matrix.softmax(dim) if again else matrix / norm(matrix, dim)
    return matrix


def balance_examples(g: Generator) -> list[tuple]:
    by_hand = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    sizes = ((3, 3), 1, 1.0), ((4, 4), 5, 2.0), ((2, 3, 3), 2, 1.0), ((5, 2, 4, 4), 20, 3.0)
    return [(by_hand, 1), *((spread * torch.randn(*size, generator=g), n) for size, n, spread in sizes)]


BALANCE_MISTAKES: Changes = {
    "columns are divided before rows": {"order": (-2, -1)},
    "only rows are divided": {"order": (-1,)},
    "only columns are divided": {"order": (-2,)},
    "each division is a softmax, so the exponential is taken again and again": {"again": True, "norm": total},
    "the logits' magnitudes are used in place of their exponentials": {"first": False},
    "rows and columns are divided by their largest element": {"norm": lambda m, dim: m.amax(dim, keepdim=True)},
}

# 12.2 Muon for a stack -----------------------------------------------------------------------------------------------


def nearest_orthogonal(matrices: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left @ right


def tall(matrices: Tensor) -> Tensor:
    return nearest_orthogonal(matrices.flatten(0, 1)).view_as(matrices)


def muon_step(
    weight: Stack, momentum: Stack, grad: Stack, lr: float, *, ahead: float = 0.95, fresh: float = 1.0,
    orthogonal: Callable[[Tensor], Tensor] = nearest_orthogonal, side: Callable[..., int] = max, decay: float = 0.1,
    power: float = 0.5,
) -> tuple[Stack, Stack]:  # fmt: skip
    """V4's update of a stack of matrices, with exact singular values; the new weight and momentum."""
    momentum = 0.95 * momentum + fresh * grad
    update = orthogonal(ahead * momentum + grad if ahead else momentum)
    return weight * (1 - lr * decay) - lr * 0.18 * side(weight.shape[-2:]) ** power * update, momentum


def muon_examples(g: Generator) -> list[tuple]:
    def example(shape, lr):
        size = 10.0 ** -torch.arange(shape[0], dtype=torch.float64)[:, None, None]
        return (*(factor * torch.randn(shape, generator=g, dtype=torch.float64) for factor in (1, size, size)), lr)

    return [example((2, 3, 5), 0.1), example((3, 4, 2), 0.02), example((2, 6, 4), 0.5)]


MUON_MISTAKES: Changes = {
    "the momentum is orthogonalised without looking ahead": {"ahead": 0.0},
    "the gradient enters the momentum with a factor of 0.05": {"fresh": 0.05},
    "the experts are flattened into one tall matrix": {"orthogonal": tall},
    "the factor takes the shorter side of the matrix": {"side": min},
    "the factor has no square root": {"power": 1.0},
    "there is no weight decay": {"decay": 0.0},
}

# 12.3 QK-Clip --------------------------------------------------------------------------------------------------------

Heads = Float[Tensor, "heads out in"]


def clip_heads(
    query: Heads, key: Heads, nope: int, largest: Float[Tensor, "heads"], threshold: float, *,
    rotated: float = 1.0, unrotated: float = 0.5, keys: float = 0.5, up: bool = False, together: bool = False,
) -> tuple[Heads, Heads]:  # fmt: skip
    """Scale the heads above the threshold: roots for the unrotated query and the key, all for the rotated query."""
    factor = threshold / (largest.max().expand_as(largest) if together else largest)
    factor = (factor if up else factor.clamp_max(1.0))[:, None, None]
    parts = query[:, :nope] * factor**unrotated, query[:, nope:] * factor**rotated
    return torch.cat(parts, 1), key * factor**keys


def clip_examples(g: Generator) -> list[tuple]:
    def example(heads, nope, rope, width, rank, largest, threshold):
        query, key = torch.randn(heads, nope + rope, width, generator=g), torch.randn(heads, nope, rank, generator=g)
        return query, key, nope, torch.tensor(largest), threshold

    return [
        example(2, 4, 2, 3, 5, [60.0, 20.0], 30.0), example(3, 2, 2, 4, 4, [100.0, 400.0, 99.0], 100.0),
        example(4, 3, 4, 2, 3, [0.5, 2.0, 8.0, 1.0], 1.0),
    ]  # fmt: skip


CLIP_MISTAKES: Changes = {
    "the rotated query gets the root, as the unrotated part does": {"rotated": 0.5},
    "the rotated query is not scaled": {"rotated": 0.0},
    "query and key both get the whole factor": {"unrotated": 1.0, "keys": 1.0},
    "the query gets the whole factor and the key none": {"unrotated": 1.0, "keys": 0.0},
    "heads below the threshold are scaled up to it": {"up": True},
    "all heads are scaled by the factor of the largest logit": {"together": True, "up": False},
}

# 12.4 The hash -------------------------------------------------------------------------------------------------------


def hash_rows(
    ids: list[int], multipliers: list[int], primes: list[int], pad: int, *,
    newest_first: bool = True, combine: Callable[[int, int], int] = lambda a, b: a ^ b, padded: bool = True,
    bound: Callable[[list[int], int], int] = lambda primes, head: primes[head],
) -> Int[Tensor, "positions heads"]:  # fmt: skip
    """The rows of the n-grams that end at each position, in one table per prime; n is the number of multipliers."""
    length, rows = len(multipliers), []
    for position in range(len(ids)):
        places = [ids[position - back] if back <= position else pad for back in range(length)]
        if not padded:
            places = places[: position + 1]
        factors = multipliers if newest_first else multipliers[::-1]
        mixed = reduce(combine, (token * factor for token, factor in zip(places, factors, strict=False)))
        rows.append([mixed % bound(primes, head) for head in range(len(primes))])
    return torch.tensor(rows)


HASH_MISTAKES: Changes = {
    "the first multiplier belongs to the oldest token": {"newest_first": False},
    "the products are added, not combined by exclusive or": {"combine": lambda a, b: a + b},
    "n-grams at the start are shorter, without the padding token": {"padded": False},
    "all tables have the first prime": {"bound": lambda primes, head: primes[0]},
}


def hash_examples(g: Generator) -> list[tuple]:
    def example(vocab, positions, multipliers, primes, pad):
        return torch.randint(vocab, (positions,), generator=g).tolist(), multipliers, primes, pad

    return [
        ([7, 4, 2, 7, 4], [3, 5], [11, 13], 1), example(50, 6, [3, 5, 9], [17], 2),
        example(4096, 9, [123457, 998877, 31415], [101, 103, 107], 3),
    ]  # fmt: skip


# 12.5 The scheduler --------------------------------------------------------------------------------------------------


def admit(
    confidences: list[list[float]], seconds: list[float], *, by_survival: bool = True, stop: bool = True,
    own: bool = True, start: bool = True,
) -> list[int]:  # fmt: skip
    """How many drafts of each request to verify; `seconds[n]` is the time of a step with n positions (DSpark)."""
    drafts = []
    for request, row in enumerate(confidences):
        survival = 1.0
        for confidence in row:
            survival = survival * confidence if by_survival else confidence
            drafts.append((-survival, request))
    requests = len(confidences)
    positions, expected = requests if start else 0, float(requests) if own else 0.0
    counts = best = [0] * requests
    rate = expected / seconds[positions]
    for survival, request in sorted(drafts):
        positions, expected = positions + 1, expected - survival
        counts = [count + (i == request) for i, count in enumerate(counts)]
        if expected / seconds[positions] >= rate:
            best, rate = counts, expected / seconds[positions]
        elif stop:
            break
    return best


ADMIT_MISTAKES: Changes = {
    "drafts are sorted by their own confidence, not by survival": {"by_survival": False},
    "the search goes on after the first fall": {"stop": False},
    "the token that each request gets in any case is not counted": {"own": False, "stop": True},
    "the position that each request needs in any case is not counted": {"start": False, "stop": True},
}


def admit_examples(g: Generator) -> list[tuple]:
    def linear(cost):
        return [1 + cost * n for n in range(40)]

    three = [[0.95, 0.9, 0.85, 0.8], [0.7, 0.6, 0.5, 0.4], [0.4, 0.3, 0.2, 0.1]]
    jump = [1.0] * 4 + [1.6] + [1.6] * 30
    uneven = torch.rand(5, 4, generator=g).sort(descending=True).values.tolist()
    rising = [[0.5, 0.99, 0.98], [0.6, 0.2, 0.2]]
    return [
        (three, linear(0.01)), (three, linear(0.1)), (three, linear(0.3)), ([[0.9, 0.8, 0.7], [0.85, 0.8, 0.7]], jump),
        (uneven, linear(0.2)), (rising, linear(0.25)), ([[0.6, 0.5], [0.3, 0.1]], [1.0, 1.0, 1.0, 1.1, 1.5, 1.9, 2.2]),
    ]  # fmt: skip


# 12.6 A test of the streams ------------------------------------------------------------------------------------------


def write_streams(
    x: Float[Tensor, "n dim"], out: Float[Tensor, "dim"], write: Float[Tensor, "n"], mix: Float[Tensor, "n n"], *,
    transposed: bool = False, weighted: bool = True, late: bool = False, kept: bool = False, mean: bool = False,
) -> Float[Tensor, "n dim"]:  # fmt: skip
    """Mix the streams, then add the weighted output to each; mix[j, k] is what stream k gets of stream j."""
    added = write[:, None] * out if weighted else out.expand_as(x)
    matrix = mix if transposed else mix.T
    if late:
        return matrix @ (x + added)
    mixed = matrix @ x + x * kept
    return (mixed.mean(0).expand_as(x) if mean else mixed) + added


# 12.7 An experiment --------------------------------------------------------------------------------------------------

GAIN = 1.7, 3.9

EXERCISES = [
    Function(
        "12.1", "balance", balance, balance_examples, variants(balance, BALANCE_MISTAKES),
        hints=(
            "the exponential is taken once, before the loop; in the loop there are only divisions",
            "matrix = logits.exp(); in each iteration divide by matrix.sum(-1, keepdim=True), then by the sum over -2",
        ),
        section="chapter 12, section 2.3: rows and columns that sum to 1",
    ),
    Function(
        "12.2", "muon_step", muon_step, muon_examples, variants(muon_step, MUON_MISTAKES),
        hints=(
            "torch.linalg.svd works on stacks: each expert is a matrix of its own",
            "M = 0.95 M + G; U, _, Vh = svd(0.95 M + G, full_matrices=False); the update is U @ Vh, times 0.18, times "
            "the root of the longer side; the decay multiplies the old weight by 1 - 0.1 lr",
        ),
        section="chapter 12, sections 3.3 and 3.4: the package's version, a stack of experts",
        points=2, outputs=("the weight", "the momentum"),
    ),
    Function(
        "12.3", "clip_heads", clip_heads, clip_examples, variants(clip_heads, CLIP_MISTAKES),
        hints=(
            "the factor is one number per head and never above 1; which of the three parts is shared by all heads?",
            "g = (threshold / largest).clamp_max(1): the first `nope` rows of a head's query and all rows of its key "
            "get the root of g, the other rows of its query get g",
        ),
        section="chapter 12, section 4.1: QK-Clip by hand",
        points=2, outputs=("the query", "the key"),
    ),
    Function(
        "12.4", "hash_rows", hash_rows, hash_examples, variants(hash_rows, HASH_MISTAKES),
        hints=(
            "for each position list the n tokens that end there, the newest first, and `pad` before the start",
            "mixed = 0, then mixed ^= token * multiplier for each of them; one remainder for each prime",
        ),
        section="chapter 12, section 5.2: the hash by hand",
    ),
    Function(
        "12.5", "admit", admit, admit_examples, variants(admit, ADMIT_MISTAKES),
        hints=(
            "a draft counts only if all before it were accepted; start from the step without any draft",
            "survival is the cumulative product in a request; sort all of them, the largest first; admit while "
            "(expected + survival) / seconds[positions + 1] is not below expected / seconds[positions]",
        ),
        section="chapter 12, section 6.3: DSpark, how many drafts to verify",
        points=2,
    ),
    SpotTheBug(
        "12.6", "test_write", write_streams,
        (
            Bug("the mixing matrix is transposed", partial(write_streams, transposed=True), "try a matrix that is not "
                "symmetric"),
            Bug("every stream gets the output once", partial(write_streams, weighted=False), "try unequal weights"),
            Bug("the output is mixed too", partial(write_streams, late=True), "try a matrix that is not the identity, "
                "and an output"),
            Bug("the old streams are added again", partial(write_streams, kept=True), "with no output and the identity "
                "as mix, what should come out?"),
            Bug("all streams become their mean", partial(write_streams, mean=True), "are the new streams different?"),
        ),
        hints=(
            "choose x, out, write and mix so that the result can be written down by hand",
            "x = torch.eye(2) makes the mixed part mix.T; with out = torch.tensor([10.0, 100.0]) and write = "
            "torch.tensor([1.0, 2.0]) the added part is easy to tell from it",
        ),
        section="chapter 12, sections 2.1 and 2.4: one site by hand, and whose rows are whose",
    ),
    Experiment(
        "12.7", "worst_gain", "worst gain after 60 sites with 20 iterations", *GAIN,
        hints=(
            "the product grows from the left: product = matrix @ product, for all 50 draws at once",
            "gain of a matrix: the larger of .abs().sum(-1).amax(-1) and .abs().sum(-2).amax(-1); return the largest "
            "over the draws, as a float",
        ),
        section="chapter 12, sections 2.2 and 2.3: the gain, the constraint",
    ),
]  # fmt: skip
