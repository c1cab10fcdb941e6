"""Exercises of chapter 4: an MTP module's input, import and loss, the verification of its drafts, and tests for both.

Everything is for one sequence. Depths count from 1; a loop over depths is fine, none over positions is needed. Beyond
its arguments, the keywords of a reference change one step of it, for the known mistakes and the planted bugs.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises.chapter04_bugs import predictor, verify_with
from minids.course.exercises.chapter04_mistakes import (
    ALIGN_MISTAKES,
    DRAFT_MISTAKES,
    IMPORT_MISTAKES,
    LOOP_MISTAKES,
    LOSS_MISTAKES,
    by_column,
    by_inverse_ratio,
    by_ratio,
)
from minids.course.exercises.mistakes import variants
from minids.course.observation import Observation
from minids.inference.speculative import verify

# 4.1 Inputs and labels ----------------------------------------------------------------------------------------------


def align(
    tokens: Int[Tensor, "targets_plus_1"], depth: int, *,
    inputs: Callable[[Tensor, int], Tensor] = lambda t, k: t[k:-1],
    labels: Callable[[Tensor, int], Tensor] = lambda t, k: t[k + 1 :],
) -> tuple[Int[Tensor, "positions"], Int[Tensor, "positions"]]:  # fmt: skip
    """At each position: the input token of the module of this depth, and its label (V3 eq. 21 and 24)."""
    return inputs(tokens, depth), labels(tokens, depth)


# 4.2 Importing a projection ------------------------------------------------------------------------------------------


def import_projection(
    eh_proj: Float[Tensor, "dim two_dims"],
    enorm: Float[Tensor, "dim"],
    hnorm: Float[Tensor, "dim"],
    *,
    swapped: bool = True,
    gains: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda enorm, hnorm: (enorm, hnorm),
    scale: Callable[[Tensor, Tensor], Tensor] = by_column,
) -> Float[Tensor, "dim two_dims"]:
    """V3 eq. 21's matrix in the paper's order, with the gains of the norms folded into it, from released weights."""
    enorm, hnorm = gains(enorm, hnorm)
    of_embedding, of_hidden = eh_proj.chunk(2, -1)
    parts = [scale(of_hidden, hnorm), scale(of_embedding, enorm)]
    return torch.cat(parts if swapped else parts[::-1], -1)


def import_examples(g: Generator) -> list[tuple]:
    def example(dim):
        return torch.randn(dim, 2 * dim, generator=g), *(0.5 + torch.rand(2, dim, generator=g))

    return [example(4), example(7), example(2)]


# 4.3 The loss -------------------------------------------------------------------------------------------------------


def mtp_loss(
    logits: Sequence[Float[Tensor, "positions vocab"]], tokens: Int[Tensor, "targets_plus_1"], mtp_weight: float, *,
    ahead: int = 1, divisor: Callable[[int, int], int] = lambda tokens, labels: tokens - 1, average: bool = True,
    weighted: bool = True,
) -> Float[Tensor, ""]:  # fmt: skip
    """V3 eq. 24 and 25. `logits[k - 1]` are those of depth k, with a row for each position that has a label."""
    total = torch.zeros(())
    for depth, rows in enumerate(logits, start=1):
        labels = tokens[depth + ahead :][: len(rows)]
        summed = F.cross_entropy(rows[: len(labels)], labels, reduction="sum")
        total = total + summed / divisor(len(tokens), len(rows))
    return (mtp_weight if weighted else 1.0) * total / (len(logits) if average else 1)


def loss_examples(g: Generator) -> list[tuple]:
    def example(targets, vocab, depths, weight):
        tokens = torch.randint(vocab, (targets + 1,), generator=g)
        logits = [torch.randn(targets - k, vocab, generator=g) for k in range(1, depths + 1)]
        return logits, tokens, weight

    return [example(6, 5, 2, 0.3), example(3, 7, 1, 0.1), example(9, 4, 3, 1.0)]


# 4.4 Verifying a draft ----------------------------------------------------------------------------------------------


def check_draft(
    p: Float[Tensor, "vocab"], q: Float[Tensor, "vocab"], draft: int, u: float, *,
    accepts: Callable[[Tensor, Tensor, float], Tensor] = by_ratio,
    rest: Callable[[Tensor, Tensor, int], Tensor] = lambda p, q, draft: (p - q).clamp(min=0), normalised: bool = True,
) -> tuple[bool, Float[Tensor, "vocab"]]:  # fmt: skip
    """Is `draft` accepted, and from which distribution is a token drawn after a rejection? (PITFALLS 20)"""
    left = rest(p, q, draft)
    return bool(accepts(p[draft], q[draft], u)), left / left.sum() if normalised else left


def draft_examples(g: Generator) -> list[tuple]:
    def example(vocab, u, draft):
        p, q = (2 * torch.randn(2, vocab, generator=g)).softmax(-1)
        order = (p / q).argsort()  # from drafts that q overrates to those that it underrates
        return p, q, int(order[draft]), u

    impossible = torch.tensor([0.0, 0.7, 0.3]), torch.tensor([0.4, 0.3, 0.3]), 0, 0.0  # u is not below 0
    return [
        example(4, 0.9, 0),
        example(6, 0.9, -1),
        example(5, 0.01, 0),
        example(3, 0.6, 1),
        example(8, 0.5, 3),
        impossible,
    ]


# 4.5 The loop -------------------------------------------------------------------------------------------------------


def speculate(
    best: Callable[[list[int]], list[int]], draft: Callable[[list[int]], list[int]], prompt: list[int],
    new_tokens: int, *,
    bonus: int = 1, cut: bool = True, verified: bool = True, wrong_kept: bool = False, passes_per_round: int = 1,
) -> tuple[list[int], int]:  # fmt: skip
    """Greedy: the tokens that follow `prompt`, and how many passes of the model (calls of `best`) they took.

    `best` gives the model's best next token at every position, `draft` some tokens that may come next.
    """
    text, passes = list(prompt), 0
    while len(text) - len(prompt) < new_tokens:
        drafts = draft(text)
        wanted = best(text + drafts)[len(text) - 1 :]
        kept = 0
        while kept < len(drafts) and (not verified or drafts[kept] == wanted[kept]):
            kept += 1
        passes += passes_per_round or kept + 1
        text += drafts[: kept + wrong_kept] + wanted[kept : kept + max(bonus, kept < len(drafts))]
    return text[len(prompt) :][: new_tokens if cut else None], passes


def loop_examples(g: Generator) -> list[tuple]:
    def example(vocab, depths, correct, prompt, new_tokens):
        """The next token follows from the last two; drafts are correct in about `correct` of 8 places."""
        table = torch.randint(vocab, (vocab, vocab), generator=g).tolist()
        good = (torch.randint(8, (vocab, vocab), generator=g) < correct).tolist()

        def best(tokens):
            best.calls += 1
            return [table[a][b] for a, b in zip([0, *tokens], tokens, strict=False)]

        def draft(tokens):
            text = [0, *tokens]
            for _ in range(depths):
                a, b = text[-2:]
                text.append(table[a][b] if good[a][b] else (table[a][b] + 1) % vocab)
            return text[-depths:]

        best.calls = 0
        return best, draft, prompt, new_tokens

    return [example(5, 1, 5, [1], 9), example(7, 2, 6, [3, 0], 12), example(4, 3, 8, [2], 10), example(6, 1, 0, [5], 4)]


def one_call_a_round(arguments: tuple, seen: Observation) -> str | None:
    """Compare the calls of `best` with the passes reported; the reference has already made as many as it reports."""
    best, passes = arguments[0], seen.result[1]
    calls = best.calls - passes
    return None if calls == passes else f"it reports {passes} passes and calls `best` {calls} times; a call is a pass"


EXERCISES = [
    Function(
        id="4.1",
        name="align",
        reference=align,
        examples=lambda g: [
            (torch.randint(100, (n,), generator=g), depth) for n, depth in ((8, 1), (6, 2), (12, 3), (4, 2), (5, 0))
        ],
        mistakes=variants(align, ALIGN_MISTAKES),
        hints=(
            "write the tokens of a short text in a row, and below each position i the tokens i + k and i + k + 1",
            "both results are slices: the labels begin at token k + 1, the inputs begin and end one token earlier",
        ),
        section="chapter 04, section 3.2: which position receives what",
        outputs=("the input tokens", "the labels"),
    ),
    Function(
        id="4.2",
        name="import_projection",
        reference=import_projection,
        examples=import_examples,
        mistakes=variants(import_projection, IMPORT_MISTAKES),
        hints=(
            "(x * gain) @ W.T is the same as x @ V.T for another matrix V: which rows or columns of W are scaled?",
            "column j of a half is multiplied by gain j of that half's norm; then the halves trade places, because the "
            "released matrix has those of the embedding first",
        ),
        section="chapter 04, section 3.3: joining hidden state and embedding; the box in section 6.3",
        points=2,
    ),
    Function(
        id="4.3",
        name="mtp_loss",
        reference=mtp_loss,
        examples=loss_examples,
        mistakes=variants(mtp_loss, LOSS_MISTAKES),
        hints=(
            "find the labels of depth k first (exercise 4.1); then: what is each depth divided by, and what their sum?",
            "F.cross_entropy(rows, tokens[k + 1 :], reduction='sum') / T for depth k, although it has T - k labels; "
            "then the mean over depths, times mtp_weight",
        ),
        section="chapter 04, section 4.1: the loss",
        points=2,
        gradients=("logits",),
    ),
    Function(
        id="4.4",
        name="check_draft",
        reference=check_draft,
        examples=draft_examples,
        mistakes=variants(check_draft, DRAFT_MISTAKES),
        hints=(
            "the two results do not depend on each other; for the second, ask how much of p the accepted drafts cover",
            "accept with probability min(1, p/q); what q has not covered is max(p - q, 0), divided by its sum",
        ),
        section="chapter 04, section 5.2: the rule and its proof",
        points=2,
        outputs=("the verdict", "the distribution after a rejection"),
    ),
    Function(
        id="4.5",
        name="speculate",
        reference=speculate,
        examples=loop_examples,
        mistakes=variants(speculate, LOOP_MISTAKES),
        hints=(
            "write one round on paper, with three drafts of which the second is incorrect: which tokens does it add?",
            "wanted = best(text + drafts)[len(text) - 1 :] has the model's token in place of each draft, and one more. "
            "Add the drafts that agree up to the first difference, then the model's token there",
        ),
        section="chapter 04, sections 5.1 and 5.3: a round",
        points=3,
        outputs=("the new tokens", "the number of passes"),
        cost=one_call_a_round,
    ),
    SpotTheBug(
        id="4.6",
        name="test_prediction",
        right=predictor(),
        bugs=(
            Bug(
                "a layer without a causal mask", predictor(masked=False), "change the last token: which rows may move?"
            ),
            Bug("no embedding of the next token", predictor(weight=0.0), "row i must depend on token i + 1"),
            Bug("the module receives its own label", predictor(lambda t: t.roll(-2)[:, :-1]), "row 0 has label 2"),
            Bug(
                "the module receives the token of its own position", predictor(lambda t: t[:, :-1]), "what moves row 0?"
            ),
        ),
        hints=(
            "change one token and compare the logits with those before: which rows must move, and which must not?",
            "for every j: change token j; the rows before j - 1 stay the same, row j - 1 and all after it change",
        ),
        section="chapter 04, sections 4.2 and 6.3: what each output depends on, two known bugs",
    ),
    SpotTheBug(
        id="4.7",
        name="test_verification",
        right=verify,
        bugs=(
            Bug(
                "accepted by confidence, without verification",
                verify_with(lambda p, q, u: q > 0.5),
                "let a draft have q = 1 and p = 0",
            ),
            Bug("a rejection drawn from p itself", verify_with(by_ratio), "count the first token of many rounds"),
            Bug(
                "drafts kept after a rejected one",
                verify_with(by_ratio, in_order=False),
                "two drafts, the first incorrect",
            ),
            Bug("the ratio inverted", verify_with(by_inverse_ratio), "count the first token where p and q differ"),
        ),
        hints=(
            "two kinds of input: probabilities of 0 and 1, where you know the result; and many rounds, where you know "
            "how often each token has to come first",
            "drafts [2, 1] with q one-hot, p one-hot at 3, 1, 0: count is 1 and the token is 3; then 20,000 drafts "
            "drawn from q, and torch.bincount of the first settled token against p",
        ),
        section="chapter 04, sections 5.2 and 5.4: the rule, and a test of the distribution",
    ),
    Experiment(
        id="4.8",
        name="shared_reads",
        what="distinct experts of two tokens per sequence over those of one",
        low=1.38,
        high=1.45,
        hints=(
            "a set of expert numbers for the first tokens of all sequences together, and one for both tokens of all",
            "first = torch.randperm(256)[:8]; kept = first[torch.rand(8) < 0.5]; fill the second token up to 8 from "
            "the experts that it does not have; the ratio is of the sizes of the unions over all 8 sequences",
        ),
        section="chapter 04, section 7.1: weights read per pass",
    ),
    OpenTask(
        id="4.9",
        name="lookup_drafts",
        rubric=(
            "the drafts come from the text so far, and each is verified: greedy output equals plain greedy output",
            "acceptance is measured when sampling and when decoding greedily, on prose and on code, with a spread",
            "it says how many rounds had no draft at all, and counts them",
            "the MTP module's rates on the same prompts stand beside it",
            "it says for which c and v the lookup pays where the module does not, by section 5.5's formula",
        ),
        hints=(
            "find the last earlier place where the same two or three tokens stand; the token after it is the draft",
            "a lookup has no distribution: q is 1 at its token, so a draft is accepted with probability p(draft)",
        ),
        section="chapter 04, sections 5.1 and 5.2: where drafts come from, the rule",
    ),
]
