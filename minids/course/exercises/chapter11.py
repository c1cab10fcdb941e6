"""Exercises of chapter 11: index scores, a choice with a window, the sparse loss, CSA's entries, leaks, four bits."""

from functools import partial

import torch
from torch import Tensor

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises import chapter11_mistakes as known
from minids.course.exercises.mistakes import variants

# 11.1 ----------------------------------------------------------------------------------------------------------------


def index_scores(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """Index scores [queries, tokens] of the last queries of a sequence, -inf for later tokens (V3.2-Exp eq. 1)."""
    return known.index_scores(q, w, k)


def score_examples(generator: torch.Generator) -> list[tuple]:
    def one(queries, heads, dim, tokens):
        sizes = (queries, heads, dim), (queries, heads), (tokens, dim)
        return tuple(torch.randn(*size, generator=generator) for size in sizes)

    by_hand = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[1.0, -2]]), torch.tensor([[2.0, 1], [-1, 1], [3, -4]])
    return [by_hand, one(3, 2, 2, 3), one(3, 4, 2, 5), one(7, 1, 4, 7), one(4, 16, 8, 30)]


# 11.2 ----------------------------------------------------------------------------------------------------------------


def choose_with_window(scores: Tensor, k: int, window: int) -> Tensor:
    """Mask [tokens, tokens] of the last `window` tokens of each query and of the k best tokens before them."""
    return known.choose_with_window(scores, k, window)


def choice_examples(generator: torch.Generator) -> list[tuple]:
    by_hand = torch.tensor([[0.0, 9, 9, 9, 9], [1, 0, 9, 9, 9], [3, 2, 0, 9, 9], [0, 0, 1, 0, 9], [0, 2, 0, 0, 5.0]])
    ties = torch.randn(12, 12, generator=generator).relu().round()
    return [(by_hand, 1, 2), (by_hand, 2, 1), (ties, 3, 2), (torch.randn(20, 20, generator=generator), 4, 3)]


# 11.3 ----------------------------------------------------------------------------------------------------------------


def sparse_loss(scores: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
    """KL of the sparse stage (V3.2-Exp eq. 4), mean over queries, from the probabilities of dense attention."""
    return known.sparse_loss(scores, probabilities, chosen)


def loss_examples(generator: torch.Generator) -> list[tuple]:
    def one(heads, tokens, k):
        visible = torch.ones(tokens, tokens).tril().bool()
        logits = 2 * torch.randn(heads, tokens, tokens, generator=generator)
        scores = torch.randn(tokens, tokens, generator=generator)
        kept = torch.randn(tokens, tokens, generator=generator).masked_fill(~visible, -torch.inf)
        chosen = torch.zeros(tokens, tokens).bool().scatter(1, kept.topk(k).indices, True) & visible
        return scores, logits.masked_fill(~visible, -torch.inf).softmax(-1), chosen

    return [one(1, 3, 2), one(2, 4, 2), one(3, 8, 3), one(2, 6, 6)]


# 11.4 ----------------------------------------------------------------------------------------------------------------


def csa_entries(content: Tensor, logits: Tensor, bias: Tensor) -> Tensor:
    """Entries of CSA [tokens // m, width], before norm and rotation (FACTS.md section 10)."""
    return known.csa_entries(content, logits, bias)


def entry_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, m, width):
        content, logits = torch.randn(2, tokens, 2, width, generator=generator)
        return content, logits, torch.randn(m, 2, width, generator=generator)

    content = torch.tensor([[[4.0], [1]], [[8], [3]], [[0], [5]], [[2], [7]], [[6], [9]]])
    by_hand = content, torch.zeros(5, 2, 1), torch.tensor([[[3.0], [1]], [[1], [1]]]).log()
    return [by_hand, one(6, 2, 3), one(11, 4, 2), one(8, 4, 4)]


# 11.5 ----------------------------------------------------------------------------------------------------------------


def attend_compressed(x: Tensor, m: int, window: int) -> Tensor:
    """One head over the means of finished blocks of m tokens and over the last `window` tokens."""
    return known.attend_compressed(x, m, window)


def bug(name: str, hint: str, **changes: int | bool) -> Bug:
    return Bug(name, partial(attend_with, changes), hint)


def attend_with(changes: dict, x: Tensor, m: int, window: int) -> Tensor:
    return known.attend_compressed(x, m, window, **changes)


EXERCISES = [
    Function(
        "11.1", "index_scores", index_scores, score_examples,
        variants(known.index_scores, known.SCORE_MISTAKES),
        hints=(
            "three steps: all products of a query's heads with a key, ReLU, the weighted sum over heads; then the mask",
            "torch.einsum('thd,sd->ths', q, k).relu(), then 'th,ths->ts'; query i is at position len(k) - len(q) + i",
        ),
        section="chapter 11, sections 2.1 and 3.2: the index score",
    ),
    Function(
        "11.2", "choose_with_window", choose_with_window, choice_examples,
        variants(known.choose_with_window, known.CHOICE_MISTAKES),
        hints=(
            "treat the two parts one after the other: the window of query t begins at t - window + 1",
            "for each t: sorted(range(start), key=lambda s: -row[s])[:k]; Python's sort keeps the order of equal keys",
        ),
        section="chapter 11, sections 2.2 and 6.2: the choice, and the window",
        points=2,
    ),
    Function(
        "11.3", "sparse_loss", sparse_loss, loss_examples,
        variants(known.sparse_loss, known.LOSS_MISTAKES),
        hints=(
            "first the target: keep the chosen tokens, add the heads, divide by the sum; then a log-softmax over the "
            "same tokens",
            "log_softmax of scores.masked_fill(~chosen, -inf) is -inf where nothing is chosen; set it to 0 there, as "
            "0 * -inf is NaN; torch.xlogy(p, p) is 0 for p = 0",
        ),
        section="chapter 11, section 2.3: a loss of its own",
        points=2, gradients=("scores",),
    ),
    Function(
        "11.4", "csa_entries", csa_entries, entry_examples,
        variants(known.csa_entries, known.ENTRY_MISTAKES),
        hints=(
            "collect the 2m contents and the 2m logits of an entry first, then take one softmax over them, per channel",
            "own block: content[i*m:(i+1)*m, 0]; block before: content[(i-1)*m:i*m, 1], only if i > 0; the bias of a "
            "series belongs to its logits, by the place in the block",
        ),
        section="chapter 11, sections 6.3 and 6.4: HCA and CSA by hand",
        points=2,
    ),
    SpotTheBug(
        "11.5", "test_attend_compressed", attend_compressed,
        (
            bug("a query sees the entry of an unfinished block", "change one token: what may change?", own_block=True),
            bug("a finished block is seen one token too late", "when does the first block appear?", late=1),
            bug("the window is one token too long", "with window 1 and a long block: what is the output?", longer=1),
            bug("the window leaves out the query's own token", "change the last token only", without_query=True),
            bug("an entry is the sum of its tokens, not their mean", "what should equal tokens give?", summed=True),
        ),
        hints=(
            "three kinds of input are enough: one changed token, tokens that are all equal, and a window of one",
            "with m = 4 and window 1, outputs 0 to 2 are the tokens themselves; output 3 also sees the mean of tokens "
            "0 to 3; changing token 7 must leave outputs 0 to 6 as they are",
        ),
        section="chapter 11, sections 6.3 and 6.5: entries, and which of them a query may see",
    ),
    Experiment(
        "11.6", "kept_share", "share of the exact choice that an indexer in four bits keeps", 0.6, 0.82,
        hints=(
            "the products q . k do not change if both are multiplied by the same orthogonal matrix; their largest "
            "values do",
            "rotation = hadamard(128); scores from round_to_fp4(q @ rotation) and round_to_fp4(k @ rotation); then the "
            "share of their top 64 that are among the exact top 64, with torch.isin",
        ),
        section="chapter 11, section 3.1: the package's indexer",
    ),
    OpenTask(
        "11.7", "candidate_share",
        (
            "the candidates are whole blocks, picked by their maximum; the share is 1 if both layers have equal scores "
            "and there are at least k blocks, and the answer says why",
            "it shows how the share falls as the layers' scores become less alike, for several numbers of blocks",
            "it compares the maximum of a block with its mean, and counts the products that the later layers save",
        ),
        hints=(
            "in how many different blocks can the k best tokens of the first layer be?",
            "first.unflatten(-1, (-1, block)).amax(-1).topk(blocks), a mask of blocks, repeat_interleave(block, 1)",
        ),
        section="chapter 11, sections 2.2 and 6.7: the choice, and V4.1",
    ),
]  # fmt: skip
