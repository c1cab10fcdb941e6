"""Exercises of chapter 4: a prediction module's input and loss, the check of its drafts, and tests for both.

Everything is for one sequence. Depths count from 1; a loop over depths is fine, none over positions is needed.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from minids.config import ModelConfig
from minids.course.checks import Bug, Function, SpotTheBug
from minids.inference.speculative import verify
from minids.model.transformer import MiniDS

# 4.1 Who is told what -----------------------------------------------------------------------------------------------


def align(tokens: Int[Tensor, "targets_plus_1"], depth: int) -> tuple[Int[Tensor, "asked"], Int[Tensor, "asked"]]:
    """At each position: the token that the module of this depth is told, and its label (V3 eq. 21 and 24)."""
    return tokens[depth:-1], tokens[depth + 1 :]


# 4.2 Joining --------------------------------------------------------------------------------------------------------


def norm(x: Float[Tensor, "positions dim"], gain: Float[Tensor, "dim"]) -> Float[Tensor, "positions dim"]:
    return F.rms_norm(x, x.shape[-1:], gain, 1e-6)


def join(
    hidden: Float[Tensor, "positions dim"],
    embedding: Float[Tensor, "positions dim"],
    hidden_gain: Float[Tensor, "dim"],
    embedding_gain: Float[Tensor, "dim"],
    m: Float[Tensor, "dim two_dims"],
) -> Float[Tensor, "positions dim"]:
    """V3 eq. 21, in the paper's order."""
    return torch.cat((norm(hidden, hidden_gain), norm(embedding, embedding_gain)), -1) @ m.T


def join_examples(g: Generator) -> list[tuple]:
    def example(positions, dim):
        hidden, embedding = 5 * torch.randn(positions, dim, generator=g), torch.randn(positions, dim, generator=g)
        gains = 0.5 + torch.rand(2, dim, generator=g)
        return hidden, embedding, *gains, torch.randn(dim, 2 * dim, generator=g)

    return [example(3, 4), example(1, 8), example(7, 5)]


# 4.3 The loss -------------------------------------------------------------------------------------------------------


def mtp_loss(
    logits: Sequence[Float[Tensor, "positions vocab"]],
    tokens: Int[Tensor, "targets_plus_1"],
    mtp_weight: float,
    ahead: int = 1,
    divide_by_asked: bool = False,
    average: bool = True,
) -> Tensor:
    """V3 eq. 24 and 25. `logits[k - 1]` are those of depth k, with as many rows as it is asked at."""
    total = torch.zeros(())
    for depth, rows in enumerate(logits, start=1):
        labels = tokens[depth + ahead :][: len(rows)]
        summed = F.cross_entropy(rows[: len(labels)], labels, reduction="sum")
        total = total + summed / (len(rows) if divide_by_asked else len(tokens) - 1)
    return mtp_weight * total / (len(logits) if average else 1)


def loss_examples(g: Generator) -> list[tuple]:
    def example(targets, vocab, depths, weight):
        tokens = torch.randint(vocab, (targets + 1,), generator=g)
        logits = [torch.randn(targets - k, vocab, generator=g) for k in range(1, depths + 1)]
        return logits, tokens, weight

    return [example(6, 5, 2, 0.3), example(3, 7, 1, 0.1), example(9, 4, 3, 1.0)]


# 4.4 The check ------------------------------------------------------------------------------------------------------


def rightly(p: Tensor, q: Tensor, u: Tensor | float) -> Tensor:
    """Accept with probability min(1, p / q); u is uniform in [0, 1)."""
    return u * q < p


def upside_down(p, q, u):
    return u * p < q


def check_draft_with(accepts: Callable, rest: Callable = lambda p, q: (p - q).clamp(min=0)) -> Callable:
    """A `check_draft`, right or wrong: is `draft` accepted, and what is drawn from after a rejection (PITFALLS 20)?"""

    def check_draft(p: Float[Tensor, "vocab"], q: Float[Tensor, "vocab"], draft: int, u: float) -> tuple[bool, Tensor]:
        left = rest(p, q)
        return bool(accepts(p[draft], q[draft], u)), left / left.sum()

    return check_draft


check_draft = check_draft_with(rightly)


def draft_examples(g: Generator) -> list[tuple]:
    def example(vocab, u, draft):
        p, q = (2 * torch.randn(2, vocab, generator=g)).softmax(-1)
        order = (p / q).argsort()  # from the drafts that the module likes too much to those that it likes too little
        return p, q, int(order[draft]), u

    return [example(4, 0.9, 0), example(6, 0.9, -1), example(5, 0.01, 0), example(3, 0.6, 1), example(8, 0.5, 3)]


# 4.5 The loop -------------------------------------------------------------------------------------------------------


def speculate(
    best: Callable[[list[int]], list[int]],
    draft: Callable[[list[int]], list[int]],
    prompt: list[int],
    new_tokens: int,
    bonus: int = 1,
    cut: bool = True,
    believe: bool = False,
) -> tuple[list[int], int]:
    """Greedy: the tokens that follow `prompt`, and how many passes of the model (calls of `best`) they took.

    `best` gives the model's best next token at every position, `draft` some tokens that may come next.
    """
    text, passes = list(prompt), 0
    while len(text) - len(prompt) < new_tokens:
        drafts = draft(text)
        model_says = best(text + drafts)[len(text) - 1 :]
        passes += 1
        kept = 0
        while kept < len(drafts) and (believe or drafts[kept] == model_says[kept]):
            kept += 1
        text += drafts[:kept] + model_says[kept : kept + max(bonus, kept < len(drafts))]
    return text[len(prompt) :][: new_tokens if cut else None], passes


def loop_examples(g: Generator) -> list[tuple]:
    def example(vocab, depths, right, prompt, new_tokens):
        """The next token follows from the last two; drafts are right in about `right` of 8 places."""
        table = torch.randint(vocab, (vocab, vocab), generator=g).tolist()
        good = (torch.randint(8, (vocab, vocab), generator=g) < right).tolist()

        def best(tokens):
            return [table[a][b] for a, b in zip([0, *tokens], tokens, strict=False)]

        def draft(tokens):
            text = [0, *tokens]
            for _ in range(depths):
                a, b = text[-2:]
                text.append(table[a][b] if good[a][b] else (table[a][b] + 1) % vocab)
            return text[-depths:]

        return best, draft, prompt, new_tokens

    return [example(5, 1, 5, [1], 9), example(7, 2, 6, [3, 0], 12), example(4, 3, 8, [2], 10), example(6, 1, 0, [5], 4)]


# 4.6 and 4.7 Spot the bug -------------------------------------------------------------------------------------------


@functools.cache
def small_model() -> MiniDS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ModelConfig.preset("nano", vocab_size=16, num_hidden_layers=1, first_k_dense_replace=1)
        return MiniDS(config).double().eval()


def predictor(told: Callable = lambda tokens: tokens[:, 1:], masked: bool = True, weight: float = 1.0) -> Callable:
    """A function from tokens to the logits of depth 1, right or wrong; `told` picks the tokens it is told of."""

    @torch.no_grad()
    def predict(tokens: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens_less_1 vocab"]:
        model, module = small_model(), small_model().mtp[0]
        hidden, following = model.trunk(tokens[None])[0][:, :-1], told(tokens[None])
        context = model.attention_context(following)
        if not masked:
            context = replace(context, mask=hidden.new_zeros(1, 1, hidden.shape[1], hidden.shape[1]))
        hidden, _ = module(hidden, weight * model.embedding(following), context)
        return model.head(module.norm(hidden))[0]

    return predict


def verify_with(keeps: Callable, in_order: bool = True) -> Callable:
    """A `verify` that keeps drafts by another rule, and draws what follows them straight from the model's chances."""

    def verify(drafts, draft_chances, chances, generator=None):
        p, q = (c[:, : drafts.shape[1]].gather(-1, drafts[..., None])[..., 0] for c in (chances, draft_chances))
        fits = keeps(p, q, torch.rand(drafts.shape, generator=generator)).long()
        kept = (fits.cumprod(1) if in_order else fits).sum(1)
        final = torch.multinomial(chances[torch.arange(len(drafts)), kept], 1, generator=generator)
        return torch.cat((drafts, final), 1).scatter(1, kept[:, None], final), kept + 1

    return verify


EXERCISES = [
    Function(
        id="4.1",
        name="align",
        reference=align,
        examples=lambda g: [
            (torch.randint(100, (n,), generator=g), depth) for n, depth in ((8, 1), (6, 2), (12, 3), (4, 2), (5, 0))
        ],
        mistakes={
            "the module is told its own label": lambda t, k: (t[k + 1 :], t[k + 1 :]),
            "the label is the main model's": lambda t, k: (t[k:-1], t[1 : len(t) - k]),
            "every depth is aligned like depth 1": lambda t, k: (t[1:-1], t[2:]),
            "the text wraps around at its end": lambda t, k: (t.roll(-k)[:-1], t.roll(-k - 1)[:-1]),
        },
        hint="write the tokens of a short text in a row, and below each position i the tokens i + k and i + k + 1",
        outputs=("the tokens told", "the labels"),
    ),
    Function(
        id="4.2",
        name="join",
        reference=join,
        examples=join_examples,
        mistakes={
            "the embedding comes first": lambda h, e, hg, eg, m: join(e, h, eg, hg, m),
            "the embedding is not normalised": lambda h, e, hg, eg, m: torch.cat((norm(h, hg), e * eg), -1) @ m.T,
            "the hidden state is not normalised": lambda h, e, hg, eg, m: torch.cat((h * hg, norm(e, eg)), -1) @ m.T,
        },
        hint="each vector is divided by its own root mean square (eps=1e-6), then the two are concatenated",
    ),
    Function(
        id="4.3",
        name="mtp_loss",
        reference=mtp_loss,
        examples=loss_examples,
        mistakes={
            "each depth is divided by its own number of labels": functools.partial(mtp_loss, divide_by_asked=True),
            "the depths are added up and not averaged": functools.partial(mtp_loss, average=False),
            "the labels are one place too early": functools.partial(mtp_loss, ahead=0),
        },
        hint="depth k has T - k labels, but its sum is divided by T",
        points=2,
    ),
    Function(
        id="4.4",
        name="check_draft",
        reference=check_draft,
        examples=draft_examples,
        mistakes={
            "the ratio is upside down": check_draft_with(upside_down),
            "a rejection is drawn from p itself": check_draft_with(rightly, rest=lambda p, q: p),
            "a rejection is drawn from |p - q|": check_draft_with(rightly, rest=lambda p, q: (p - q).abs()),
            "the module's chance is not asked for": check_draft_with(lambda p, q, u: u < p),
        },
        hint="accept with probability min(1, p/q); what q has not covered is max(p - q, 0), and has to sum to 1",
        points=2,
        outputs=("the verdict", "the distribution after a rejection"),
    ),
    Function(
        id="4.5",
        name="speculate",
        reference=speculate,
        examples=loop_examples,
        mistakes={
            "the drafts are believed": functools.partial(speculate, believe=True),
            "the token after the last draft is not used": functools.partial(speculate, bonus=0),
            "the last round runs over the limit": functools.partial(speculate, cut=False),
        },
        hint="best(text + drafts)[len(text) - 1] is what the model wants in place of the first draft",
        points=3,
        outputs=("the new tokens", "the number of passes"),
    ),
    SpotTheBug(
        id="4.6",
        name="test_prediction",
        right=predictor(),
        bugs=(
            Bug("a layer without a causal mask (bug h)", predictor(masked=False), "change the last token"),
            Bug("no embedding of the next token (bug i)", predictor(weight=0.0), "what has to move?"),
            Bug("told its own label (pitfall 18)", predictor(lambda t: t.roll(-2)[:, :-1]), "what may row 0 not know?"),
            Bug("told the token it stands on (pitfall 18)", predictor(lambda t: t[:, :-1]), "what has to move?"),
        ),
    ),
    SpotTheBug(
        id="4.7",
        name="test_verification",
        right=verify,
        bugs=(
            Bug("confidence, no check (pitfall 20)", verify_with(lambda p, q, u: q > 0.5), "be sure of a wrong draft"),
            Bug("a rejection drawn from p itself", verify_with(rightly), "count the first token of many rounds"),
            Bug("drafts kept after a rejected one", verify_with(rightly, in_order=False), "two drafts, one wrong"),
            Bug("the ratio upside down", verify_with(upside_down), "count the first token of many rounds"),
        ),
    ),
]
