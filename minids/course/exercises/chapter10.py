"""Exercises of chapter 10: labels of a conversation, several teachers, preferences, two tests, an experiment."""

import zlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug

# 10.1 Labels of a conversation ---------------------------------------------------------------------------------------

Turn = tuple[str, list[int]]  # "user" or "assistant", and the tokens of the turn, its end token included


def conversation_labels(turns: list[Turn], seq_len: int) -> list[int]:
    """What each of `seq_len` positions has to predict: the assistant's tokens, -100 elsewhere."""
    return labels_with(turns, seq_len)


def labels_with(
    turns, seq_len, *, learns=lambda role, last: role == "assistant", shift=1, skip=0, drop=0, padding=-100
):
    """Compute `conversation_labels`; the options are mistakes."""
    labels: list[int] = []
    for number, (role, tokens) in enumerate(turns):
        learned = learns(role, number == len(turns) - 1)
        first, end = skip, len(tokens) - drop
        labels += [token if learned and first <= place < end else -100 for place, token in enumerate(tokens)]
    return (labels + [padding] * (seq_len + 1 - len(labels)))[shift : shift + seq_len]


def conversation_examples(g: Generator) -> list[tuple]:
    def example(lengths, seq_len, first="user"):
        roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
        turns = [
            (roles[i % 2], torch.randint(1, 50, (length,), generator=g).tolist()) for i, length in enumerate(lengths)
        ]
        return turns, seq_len

    return [
        ([("user", [5, 6]), ("assistant", [7, 8]), ("user", [9]), ("assistant", [4, 3, 2])], 9),
        example([3, 2, 4, 1, 2, 5], 20),
        example([1, 4], 4),
        example([2, 3, 3], 12, first="assistant"),  # the first token of a row has nothing before it
    ]


# 10.2 Several teachers ------------------------------------------------------------------------------------------------


def multi_teacher_loss(
    logits: Float[Tensor, "batch seq vocab"],
    teacher_logits: Float[Tensor, "teachers batch seq vocab"],
    weights: Float[Tensor, "teachers"],
    mask: Bool[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """sum_i w_i KL(student || teacher i), the mean over the tokens of the mask, in nats."""
    return teachers_with(logits, teacher_logits, weights, mask)


def teachers_with(
    logits, teacher_logits, weights, mask, *, forward=False, masked=True, by_row=False, mixed=False, weighted=True
) -> Tensor:
    """Compute `multi_teacher_loss`; the options are mistakes."""
    q, p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    w = weights if weighted else torch.ones_like(weights)
    if mixed:  # one teacher: the weighted mean of the distributions
        p, w = ((p.exp() * w[:, None, None, None]).sum(0) / w.sum()).log()[None], w.sum()[None]
    kl = ((p.exp() * (p - q)) if forward else (q.exp() * (q - p))).sum(-1)
    per_token = (kl * w[:, None, None]).sum(0)
    counted = mask if masked else torch.ones_like(mask)
    if by_row:
        return ((per_token * counted).sum(1) / counted.sum(1)).mean()
    return per_token[counted].mean()


def teachers_by_vocabulary(logits, teacher_logits, weights, mask):
    return multi_teacher_loss(logits, teacher_logits, weights, mask) / logits.shape[-1]


def teachers_sampled(logits, teacher_logits, weights, mask):
    """The value of the loss, with the gradient of an estimate from sampled tokens."""
    q, p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    kl = (q.exp().detach() * (q - p)).sum(-1)
    return (kl * weights[:, None, None]).sum(0)[mask].mean()


def teachers_examples(g: Generator) -> list[tuple]:
    examples = []
    for teachers, batch, seq, vocab in ((2, 2, 4, 5), (3, 1, 6, 7), (2, 3, 5, 3)):
        logits, *others = torch.randn(1 + teachers, batch, seq, vocab, generator=g)
        mask = torch.rand(batch, seq, generator=g) < 0.6
        mask[:, 0], mask[0, 1:3] = True, True  # rows of different lengths, none of them empty
        examples.append((logits, torch.stack(others), torch.rand(teachers, generator=g) + 0.2, mask))
    return examples


# 10.3 Preferences that judges agree on --------------------------------------------------------------------------------


def preference_loss(
    rewards_a: Float[Tensor, "pairs"], rewards_b: Float[Tensor, "pairs"], votes: Float[Tensor, "pairs judges"]
) -> Float[Tensor, ""]:
    """Bradley-Terry loss over the pairs whose mean vote is beyond 1 (for a) or below -1 (for b), in nats."""
    return preference_with(rewards_a, rewards_b, votes)


def preference_with(
    rewards_a, rewards_b, votes, *, all_pairs=False, summed=False, signed=True, over_all=False, closed=False
) -> Tensor:
    """Compute `preference_loss`; the options are mistakes."""
    gap = votes.sum(1) if summed else votes.mean(1)
    kept = torch.ones_like(gap, dtype=torch.bool) if all_pairs else gap.abs() >= 1 if closed else gap.abs() > 1
    sign = torch.where(gap > 0, 1.0, -1.0) if signed else torch.ones_like(gap)
    terms = -F.logsigmoid(sign * (rewards_a - rewards_b))[kept]
    return terms.sum() / len(gap) if over_all else terms.mean()


def preference_reversed(rewards_a, rewards_b, votes, **options):
    return preference_with(rewards_b, rewards_a, votes, **options)


def preference_by_probability(rewards_a, rewards_b, votes):
    gap = votes.mean(1)
    kept = gap.abs() > 1
    return -torch.sigmoid(gap.sign() * (rewards_a - rewards_b))[kept].mean()


def preference_examples(g: Generator) -> list[tuple]:
    examples = []
    for pairs, judges in ((4, 4), (8, 4), (6, 3)):
        votes = torch.randint(-3, 4, (pairs, judges), generator=g).float()
        votes[0], votes[1], votes[2] = 2.0, -2.0, 1.0  # for a, for b, and exactly at the limit
        votes[3] = torch.tensor([1.0, -1.0, 1.0, 1.0])[:judges]  # small, but its sum is beyond 1 with four judges
        rewards = torch.randn(2, pairs, generator=g)
        examples.append((rewards[0], rewards[1], votes))
    return examples


# 10.4 A test for a split ----------------------------------------------------------------------------------------------

Split = tuple[list[str], list[str]]


def split(prompts: list[str]) -> Split:
    """Training and held-out prompts: a quarter of all possible prompts is held out, by a hash of the text."""
    held_out = [prompt for prompt in prompts if zlib.crc32(prompt.encode()) % 4 == 0]
    return [prompt for prompt in prompts if prompt not in held_out], held_out


def split_by_place(prompts: list[str]) -> Split:
    held = [i for i in range(len(prompts)) if zlib.crc32(str(i).encode()) % 4 == 0]
    return [prompt for i, prompt in enumerate(prompts) if i not in held], [prompts[i] for i in held]


def split_without_removal(prompts: list[str]) -> Split:
    return list(prompts), split(prompts)[1]


def split_by_rank(prompts: list[str]) -> Split:
    ranked = sorted(set(prompts))
    held_out = ranked[: max(1, len(ranked) // 4)]
    return [p for p in prompts if p not in held_out], [p for p in prompts if p in held_out]


# 10.5 A test for a vote -----------------------------------------------------------------------------------------------


def vote(answers: list[str | None]) -> str | None:
    """The commonest readable answer without spaces around it; of equals the first; None where nothing can be read."""
    readable = [answer.strip() for answer in answers if answer is not None]
    return max(readable, key=readable.count, default=None)


def vote_of_unreadable(answers: list[str | None]) -> str | None:
    found = [answer and answer.strip() for answer in answers]
    return max(found, key=found.count, default=None)


def vote_with_spaces(answers: list[str | None]) -> str | None:
    readable = [answer for answer in answers if answer is not None]
    return max(readable, key=readable.count, default="").strip() or None


MASS_LOW, MASS_HIGH = 0.15, 0.4

loss_options: dict[str, Callable[..., Tensor]] = {
    "the divergence is taken from the teachers to the student": partial(teachers_with, forward=True),
    "tokens outside of the mask count too": partial(teachers_with, masked=False),
    "every row counts the same, however many tokens it has": partial(teachers_with, by_row=True),
    "the teachers' distributions are averaged first": partial(teachers_with, mixed=True),
    "every teacher has the weight 1": partial(teachers_with, weighted=False),
    "the mean runs over the vocabulary as well": teachers_by_vocabulary,
    "the student's probabilities are constants, as in an estimate from sampled tokens": teachers_sampled,
    "the divergence is taken from the teachers to the student, and tokens outside of the mask count too":
        partial(teachers_with, forward=True, masked=False),
    "every teacher has the weight 1, and every row counts the same":
        partial(teachers_with, weighted=False, by_row=True),
}  # fmt: skip

EXERCISES = [
    Function(
        "10.1", "conversation_labels", conversation_labels, conversation_examples,
        mistakes={
            "the user's tokens are learned too": partial(labels_with, learns=lambda role, last: True),
            "only the last turn is learned": partial(labels_with, learns=lambda role, last: last),
            "labels are not shifted: a position predicts its own input": partial(labels_with, shift=0),
            "the first token of each answer is left out": partial(labels_with, skip=1),
            "the end token of each answer is left out": partial(labels_with, drop=1),
            "padding is learned too": partial(labels_with, padding=0),
            "the user's tokens are learned too, and padding":
                partial(labels_with, learns=lambda role, last: True, padding=0),
        },
        hints=(
            "mark each token first: learned or not; then shift the whole list by one place, and only then pad",
            "flat = [token if role == 'assistant' else -100 ...] over all turns; labels = flat[1:], padded with -100",
        ),
        section="chapter 10, section 2.1: SFT, the loss on the answer only",
        points=2,
    ),
    Function(
        "10.2", "multi_teacher_loss", multi_teacher_loss, teachers_examples, gradients=("logits",),
        mistakes=loss_options,
        hints=(
            "which distribution is the sum weighted by: the one that wrote the answers, or the one that judges them?",
            "q, p = both log_softmax; (q.exp() * (q - p)).sum(-1) is [teachers, batch, seq]; weigh, add, select, mean",
        ),
        section="chapter 10, section 2.3 (the target) and section 2.4 (whose prefixes)",
        points=2,
    ),
    Function(
        "10.3", "preference_loss", preference_loss, preference_examples, gradients=("rewards_a", "rewards_b"),
        mistakes={
            "all pairs are kept": partial(preference_with, all_pairs=True),
            "the votes of a pair are added instead of averaged": partial(preference_with, summed=True),
            "answer a is always taken for the preferred one": partial(preference_with, signed=False),
            "the sum over the kept pairs is divided by the number of all": partial(preference_with, over_all=True),
            "a mean vote of exactly 1 is kept": partial(preference_with, closed=True),
            "the loss prefers the answer that the judges did not": preference_reversed,
            "the logarithm is missing": preference_by_probability,
            "all pairs are kept, and answer a is always taken for the preferred one":
                partial(preference_with, all_pairs=True, signed=False),
        },
        hints=(
            "three steps: the mean vote of each pair, which pairs are kept, and which answer of a pair is preferred",
            "-logsigmoid(sign * (rewards_a - rewards_b)), where sign is that of the mean vote; mean over the kept",
        ),
        section="chapter 10, section 6: when the reward is learned",
        points=2,
    ),
    SpotTheBug(
        "10.4", "test_split", split,
        (
            Bug("a copy of a held-out problem is trained on", split_by_place, "give it the same prompt several times"),
            Bug("held-out problems stay in training", split_without_removal, "compare the two sides as sets"),
            Bug("a problem's side depends on the others", split_by_rank, "split the list, then a part of it alone"),
        ),
        hints=(
            "call split more than once, and with lists in which prompts repeat; then compare the answers",
            "repeat the whole list three times: the two sides share nothing; then split each prompt alone",
        ),
        section="chapter 10, section 9.2: a leak between training and held-out problems",
    ),
    SpotTheBug(
        "10.5", "test_vote", vote,
        (
            Bug("what cannot be read has a vote", vote_of_unreadable, "let most answers be None"),
            Bug("a space splits the votes", vote_with_spaces, "'18' and ' 18' are one answer"),
        ),
        hints=(
            "think of lists in which the most frequent entry should not win",
            "one list with three None and one answer; one in which '18' wins only if ' 18' and '18 ' count for it",
        ),
        section="chapter 10, section 7.2: one long chain, or many votes",
    ),
    Experiment(
        "10.6", "mass_between", "probability between the modes, forward KL minus reverse KL", MASS_LOW, MASS_HIGH,
        seeds=tuple(range(7)),
        hints=(
            "two students with the same start: one minimises KL(p || q), the other KL(q || p); measure both at the end",
            "a student is logits -(x - centre)**2 / (2 * width.exp()**2) with centre and width as parameters; "
            "400 steps of Adam at 0.1; then q[15:24].sum()",
        ),
        section="chapter 10, section 2.3: the target: a token, or a distribution",
    ),
    OpenTask(
        "10.7", "a_harder_reward",
        (
            "the reward model is changed in one respect: a bound, features per token, other pairs, a penalty",
            "its agreement with the annotators is measured on unseen pairs, before and after",
            "RL runs with both, from the same model, at least two seeds, and rules measure the true score",
            "it says which answers the policy found in each run, with examples",
            "it says what the change costs where the reward was not exploited",
        ),
        hints=(
            "start from benchmarks/reward_model.py: which answers got the highest learned reward, and why?",
            "divide the counts by the length, or add the pairs that the policy of an earlier run wrote and fit again",
        ),
        section="chapter 10, section 6.2: RL on the learned reward",
    ),
]  # fmt: skip
