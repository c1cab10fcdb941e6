"""Exercises of chapter 10: the loss on answers only, rejection sampling, distillation; tests for three old mistakes."""

import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from minids.course.checks import Bug, Function, SpotTheBug

# 10.1 The loss of supervised fine-tuning ----------------------------------------------------------------------------


def sft_loss(
    logits: Float[Tensor, "batch seq vocab"],
    tokens: Int[Tensor, "batch seq"],
    prompt_lengths: Int[Tensor, "batch"],
    lengths: Int[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Mean of -log p in nats over the answer tokens of the whole batch; row i is prompt, answer, then padding."""
    counted = in_answer(tokens, prompt_lengths, lengths)
    return F.cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted])


def in_answer(tokens: Tensor, first: Tensor, end: Tensor) -> Bool[Tensor, "batch seq_minus_1"]:
    """For each token but the first: does it stand from `first` on and before `end`?"""
    place = torch.arange(1, tokens.shape[1])
    return (place >= first[:, None]) & (place < end[:, None])


def sft_loss_with(
    logits, tokens, prompt_lengths, lengths, *, prompt=False, padding=False, skip=0, drop=0, shifted=True, mean=True
) -> Tensor:
    """Compute `sft_loss`; the options are mistakes."""
    first = torch.zeros_like(prompt_lengths) if prompt else prompt_lengths + skip
    end = torch.full_like(lengths, tokens.shape[1]) if padding else lengths - drop
    counted = in_answer(tokens, first, end)
    used = logits[:, :-1] if shifted else logits[:, 1:]
    return F.cross_entropy(used[counted], tokens[:, 1:][counted], reduction="mean" if mean else "sum")


def sft_loss_over_places(logits, tokens, prompt_lengths, lengths):
    return sft_loss_with(logits, tokens, prompt_lengths, lengths, mean=False) / tokens[:, 1:].numel()


def sft_loss_by_row(logits, tokens, prompt_lengths, lengths, **options):
    rows = (logits, tokens, prompt_lengths, lengths)
    return torch.stack([sft_loss_with(*(x[i : i + 1] for x in rows), **options) for i in range(len(tokens))]).mean()


def sft_examples(g: Generator) -> list[tuple]:
    def example(prompt_lengths, lengths, seq, vocab):
        rows = len(lengths)
        logits, tokens = torch.randn(rows, seq, vocab, generator=g), torch.randint(vocab, (rows, seq), generator=g)
        return logits, tokens, torch.tensor(prompt_lengths), torch.tensor(lengths)

    return [example([2, 4], [7, 6], 8, 5), example([1, 3, 2], [3, 9, 8], 9, 11), example([5, 1], [8, 7], 9, 3)]


# 10.2 Rejection sampling --------------------------------------------------------------------------------------------

Attempt = tuple[str, str, bool, bool]  # prompt and answer, whether that is correct, whether it can be read


def keep(attempts: list[Attempt], per_problem: int) -> list[int]:
    """Places of the attempts to learn from: correct, readable, new for their problem, at most so many of a problem."""
    return keep_by(attempts, per_problem)


def keep_by(
    attempts: list[Attempt],
    per_problem: int,
    fine: Callable[[bool, bool], bool] = lambda correct, readable: correct and readable,
    same: Callable[[str, str], object] = lambda prompt, answer: (prompt, answer),
    shares: Callable[[str], str] = lambda prompt: prompt,
    dropped_are_seen: bool = False,
    first_place: int = 0,
) -> list[int]:
    kept, seen, taken = [], set(), Counter[str]()
    for place, (prompt, answer, correct, readable) in enumerate(attempts, start=first_place):
        new = same(prompt, answer) not in seen
        keeps = fine(correct, readable) and new and taken[shares(prompt)] < per_problem
        if keeps:
            kept.append(place)
            taken[shares(prompt)] += 1
        if keeps or dropped_are_seen:
            seen.add(same(prompt, answer))
    return kept


def never_a_copy(prompt: str, answer: str) -> object:
    return object()


def keep_one_more(attempts, per_problem):
    return keep_by(attempts, per_problem + 1)


def keep_of_first_tries(attempts, per_problem):
    asked = [prompt for prompt, *_ in attempts]
    early = [place for place, prompt in enumerate(asked) if asked[:place].count(prompt) < per_problem]
    return [early[i] for i in keep([attempts[place] for place in early], per_problem)]


def keep_until_copies_fill(attempts, per_problem):
    early = keep_by(attempts, per_problem, same=never_a_copy)
    return [early[i] for i in keep([attempts[place] for place in early], per_problem)]


def keep_examples(g: Generator) -> list[tuple]:
    by_hand = [
        ("a1 b+1?", "b1+1=3", False, True),
        ("a1 b+1?", "b1+1=2", True, True),
        ("a1 b+1?", "b1+1=2", True, True),
        ("a2 b+0?", "b1+1=2", True, True),
        ("a1 b+1?", "2, that is", True, False),
        ("a1 b+1?", "so 2", True, True),
        ("a1 b+1?", "b=2", True, True),
    ]

    def example(count):
        draws = torch.randint(3, (count, 4), generator=g).tolist()
        return [(f"p{prompt}", f"s{answer}", good > 0, readable > 0) for prompt, answer, good, readable in draws]

    return [(by_hand, 2), (example(20), 1), (example(30), 2), ([], 1), (example(9), 5)]


# 10.3 Distillation --------------------------------------------------------------------------------------------------


def distil_loss(
    logits: Float[Tensor, "tokens vocab"], teacher_logits: Float[Tensor, "tokens vocab"], temperature: float
) -> Float[Tensor, ""]:
    """temperature^2 KL(teacher || student), both softened by the temperature; the mean over tokens, in nats."""
    return temperature**2 * kl(teacher_logits / temperature, logits / temperature)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Mean over tokens of KL(p || q), given by their logits."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")


def distil_with(
    logits, teacher_logits, temperature, *, power=2, softened=True, mean=True, inverse=False, over_vocabulary=False
) -> Tensor:
    """Compute `distil_loss`; the options are mistakes."""
    heat = 1 / temperature if inverse else temperature
    value = kl(teacher_logits / heat if softened else teacher_logits, logits / heat)
    scale = 1 if mean else len(logits)
    return temperature**power * value * scale / (logits.shape[-1] if over_vocabulary else 1)


def distil_reversed(logits, teacher_logits, temperature, **options):
    return distil_with(teacher_logits, logits, temperature, **options)


def distil_cross_entropy(logits, teacher_logits, temperature, power=2):
    return temperature**power * F.cross_entropy(logits / temperature, (teacher_logits / temperature).softmax(-1))


def distil_examples(g: Generator) -> list[tuple]:
    shapes = ((4, 6, 1.0), (1, 3, 2.0), (7, 11, 3.0))
    return [(*torch.randn(2, tokens, vocab, generator=g).unbind(), t) for tokens, vocab, t in shapes]


# 10.4 A test for labels ---------------------------------------------------------------------------------------------


def labels(prompt: list[int], answer: list[int], seq_len: int) -> list[int]:
    """What each of `seq_len` positions has to predict, -100 for nothing; padding is token 0."""
    return [-100] * (len(prompt) - 1) + answer + [-100] * (seq_len + 1 - len(prompt) - len(answer))


def labels_with_prompt(prompt: list[int], answer: list[int], seq_len: int) -> list[int]:
    return prompt[1:] + labels(prompt, answer, seq_len)[len(prompt) - 1 :]


def labels_with_padding(prompt: list[int], answer: list[int], seq_len: int) -> list[int]:
    return labels(prompt, answer + [0] * (seq_len + 1 - len(prompt) - len(answer)), seq_len)


def labels_unshifted(prompt: list[int], answer: list[int], seq_len: int) -> list[int]:
    return [-100, *labels(prompt, answer, seq_len)][:seq_len]


def labels_without_end(prompt: list[int], answer: list[int], seq_len: int) -> list[int]:
    return labels(prompt, answer[:-1], seq_len)


# 10.5 A test for a split --------------------------------------------------------------------------------------------

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


# 10.6 A test for a vote ---------------------------------------------------------------------------------------------


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


EXERCISES = [
    Function(
        "10.1", "sft_loss", sft_loss, sft_examples, gradients=("logits",),
        mistakes={
            "the prompt is learned too": partial(sft_loss_with, prompt=True),
            "padding is learned too": partial(sft_loss_with, padding=True),
            "the first token of the answer is left out": partial(sft_loss_with, skip=1),
            "the last token of the answer is left out": partial(sft_loss_with, drop=1),
            "position t scores token t, its own input": partial(sft_loss_with, shifted=False),
            "every answer weighs the same, however long it is": sft_loss_by_row,
            "the sum is not divided by the number of answer tokens": partial(sft_loss_with, mean=False),
            "the sum is divided by all positions, those that do not count too": sft_loss_over_places,
            "the prompt and the padding are learned too": partial(sft_loss_with, prompt=True, padding=True),
            "the prompt is learned too, and every answer weighs the same": partial(sft_loss_by_row, prompt=True),
            "padding is learned too, and nothing is shifted": partial(sft_loss_with, padding=True, shifted=False),
        },
        hints=(
            "which tokens of a row are predictions that count? Then one mean over all of them, not one for each row",
            "logits[:, :-1] predict tokens[:, 1:]; the token at place t counts if prompt_length <= t < length",
        ),
        section="chapter 10, section 2.1: the loss on the answer only",
        points=2,
    ),
    Function(
        "10.2", "keep", keep, keep_examples,
        mistakes={
            "correct answers are kept that nobody can read": partial(keep_by, fine=lambda correct, _: correct),
            "incorrect answers are kept": partial(keep_by, fine=lambda _, readable: readable),
            "copies are kept": partial(keep_by, same=never_a_copy),
            "the same words are a copy even under another problem": partial(keep_by, same=lambda _, answer: answer),
            "the limit holds for all problems together": partial(keep_by, shares=lambda prompt: ""),
            "one attempt too many of a problem is kept": keep_one_more,
            "attempts that are dropped count towards the limit of their problem": keep_of_first_tries,
            "copies count towards the limit of their problem": keep_until_copies_fill,
            "an attempt is a copy even of one that was dropped": partial(keep_by, dropped_are_seen=True),
            "places are counted from 1": partial(keep_by, first_place=1),
            "copies are kept, and answers that nobody can read":
                partial(keep_by, same=never_a_copy, fine=lambda correct, _: correct),
            "copies are kept, and the limit holds for all problems together":
                partial(keep_by, same=never_a_copy, shares=lambda prompt: ""),
        },
        hints=(
            "one pass in order is enough: what must be remembered of the attempts that were kept?",
            "remember the set of kept (prompt, answer) pairs and a counter of kept attempts for each prompt",
        ),
        section="chapter 10, section 2.2: rules that select answers",
        points=2,
    ),
    Function(
        "10.3", "distil_loss", distil_loss, distil_examples, gradients=("logits",),
        mistakes={
            "the divergence is taken from the student to the teacher": distil_reversed,
            "the factor of temperature squared is missing": partial(distil_with, power=0),
            "the factor is the temperature, not its square": partial(distil_with, power=1),
            "the logits are multiplied by the temperature": partial(distil_with, inverse=True),
            "only the student is softened": partial(distil_with, softened=False),
            "the mean runs over the vocabulary as well": partial(distil_with, over_vocabulary=True),
            "the sum over tokens is not divided by their number": partial(distil_with, mean=False),
            "the teacher's entropy is left in: a cross-entropy": distil_cross_entropy,
            "the mean runs over the vocabulary as well, and the factor of temperature squared is missing":
                partial(distil_with, over_vocabulary=True, power=0),
            "the divergence is taken from the student to the teacher, and the factor of temperature squared is missing":
                partial(distil_reversed, power=0),
            "the teacher's entropy is left in, and the factor of temperature squared is missing":
                partial(distil_cross_entropy, power=0),
        },
        hints=(
            "KL(p || q) is a sum over the vocabulary of p (log p - log q): which of the two is p here?",
            "log_softmax of both logits / T; teacher.exp() * (teacher - student), sum over -1, mean, times T^2",
        ),
        section="chapter 10, section 2.3: learning from probabilities",
    ),
    SpotTheBug(
        "10.4", "test_labels", labels,
        (
            Bug("the prompt is learned", labels_with_prompt, "which labels does a prompt of three tokens leave?"),
            Bug("padding is learned", labels_with_padding, "leave room after the answer"),
            Bug("labels are not shifted", labels_unshifted, "the last prompt token predicts the first of the answer"),
            Bug("the end is never learned", labels_without_end, "is the answer's last token a label?"),
        ),
        hints=(
            "write one short row by hand: prompt, answer, padding, and below each token the one that follows it",
            "take a prompt of three tokens, an answer of two and seq_len = 7, and compare the whole list of labels",
        ),
        section="chapter 10, section 2.1 (the loss on the answer only) and section 7.1 (loss on the prompt)",
    ),
    SpotTheBug(
        "10.5", "test_split", split,
        (
            Bug("a copy of a held-out problem is trained on", split_by_place, "give it the same prompt several times"),
            Bug("held-out problems stay in training", split_without_removal, "compare the two sides as sets"),
            Bug("a problem's side depends on the others", split_by_rank, "split the list, then a part of it alone"),
        ),
        hints=(
            "call split more than once, and with lists in which prompts repeat; then compare the answers",
            "repeat the whole list three times: the two sides share nothing; then split each prompt alone",
        ),
        section="chapter 10, section 7.2: a leak between training and held-out",
    ),
    SpotTheBug(
        "10.6", "test_vote", vote,
        (
            Bug("what cannot be read has a vote", vote_of_unreadable, "let most answers be None"),
            Bug("a space splits the votes", vote_with_spaces, "'18' and ' 18' are one answer"),
        ),
        hints=(
            "think of lists in which the most frequent entry should not win",
            "one list with three None and one answer; one in which '18' wins only if ' 18' and '18 ' count for it",
        ),
        section="chapter 10, section 2.4 (a vote) and section 7.3 (what cannot be read)",
    ),
]  # fmt: skip
