"""Exercises of chapter 10: the loss on answers only, rejection sampling, distillation; tests for three old mistakes."""

import zlib
from collections import Counter
from collections.abc import Callable

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


def sft_loss_with_prompt(logits, tokens, prompt_lengths, lengths):
    return sft_loss(logits, tokens, torch.zeros_like(prompt_lengths), lengths)


def sft_loss_with_padding(logits, tokens, prompt_lengths, lengths):
    return sft_loss(logits, tokens, prompt_lengths, torch.full_like(lengths, tokens.shape[1]))


def sft_loss_from_second(logits, tokens, prompt_lengths, lengths):
    return sft_loss(logits, tokens, prompt_lengths + 1, lengths)


def sft_loss_unshifted(logits, tokens, prompt_lengths, lengths):
    counted = in_answer(tokens, prompt_lengths, lengths)
    return F.cross_entropy(logits[:, 1:][counted], tokens[:, 1:][counted])


def sft_loss_by_row(logits, tokens, prompt_lengths, lengths):
    rows = (logits, tokens, prompt_lengths, lengths)
    return torch.stack([sft_loss(*(x[i : i + 1] for x in rows)) for i in range(len(tokens))]).mean()


def sft_examples(g: Generator) -> list[tuple]:
    def example(prompt_lengths, lengths, seq, vocab):
        rows = len(lengths)
        logits, tokens = torch.randn(rows, seq, vocab, generator=g), torch.randint(vocab, (rows, seq), generator=g)
        return logits, tokens, torch.tensor(prompt_lengths), torch.tensor(lengths)

    return [example([2, 4], [7, 6], 8, 5), example([1, 3, 2], [3, 9, 8], 9, 11), example([5, 1], [8, 7], 9, 3)]


# 10.2 Rejection sampling --------------------------------------------------------------------------------------------

Attempt = tuple[str, str, bool, bool]  # what was asked and answered, whether that is right, whether it can be read


def keep(attempts: list[Attempt], per_problem: int) -> list[int]:
    """Places of the attempts to learn from: right, readable, new for their problem, at most so many of a problem."""
    return keep_by(attempts, per_problem)


def keep_by(
    attempts: list[Attempt],
    per_problem: int,
    fine: Callable[[bool, bool], bool] = lambda right, readable: right and readable,
    same: Callable[[str, str], object] = lambda prompt, answer: (prompt, answer),
    shares: Callable[[str], str] = lambda prompt: prompt,
) -> list[int]:
    kept, seen, taken = [], set(), Counter()
    for place, (prompt, answer, right, readable) in enumerate(attempts):
        new = same(prompt, answer) not in seen
        if fine(right, readable) and new and taken[shares(prompt)] < per_problem:
            kept.append(place)
            seen.add(same(prompt, answer))
            taken[shares(prompt)] += 1
    return kept


def keep_copies(attempts, per_problem):
    return keep_by(attempts, per_problem, same=lambda prompt, answer: object())


def keep_unreadable(attempts, per_problem):
    return keep_by(attempts, per_problem, fine=lambda right, readable: right)


def keep_new_to_all(attempts, per_problem):
    return keep_by(attempts, per_problem, same=lambda prompt, answer: answer)


def keep_of_all(attempts, per_problem):
    return keep_by(attempts, per_problem, shares=lambda prompt: "")


def keep_of_first_tries(attempts, per_problem):
    asked = [prompt for prompt, *_ in attempts]
    early = [place for place, prompt in enumerate(asked) if asked[:place].count(prompt) < per_problem]
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
        return [(f"p{prompt}", f"s{answer}", right > 0, readable > 0) for prompt, answer, right, readable in draws]

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


def distil_reversed(logits, teacher_logits, temperature):
    return distil_loss(teacher_logits, logits, temperature)


def distil_unscaled(logits, teacher_logits, temperature):
    return distil_loss(logits, teacher_logits, temperature) / temperature**2


def distil_hard_teacher(logits, teacher_logits, temperature):
    return temperature**2 * kl(teacher_logits, logits / temperature)


def distil_over_vocabulary(logits, teacher_logits, temperature):
    return distil_loss(logits, teacher_logits, temperature) / logits.shape[-1]


def distil_cross_entropy(logits, teacher_logits, temperature):
    return temperature**2 * F.cross_entropy(logits / temperature, (teacher_logits / temperature).softmax(-1))


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
    return [prompt for i, prompt in enumerate(prompts) if i % 4], prompts[::4]


def split_without_removal(prompts: list[str]) -> Split:
    return list(prompts), split(prompts)[1]


def split_by_rank(prompts: list[str]) -> Split:
    ranked = sorted(set(prompts))
    held_out = ranked[: max(1, len(ranked) // 4)]
    return [p for p in prompts if p not in held_out], [p for p in prompts if p in held_out]


# 10.6 A test for a vote ---------------------------------------------------------------------------------------------


def vote(answers: list[str | None]) -> str | None:
    """The commonest readable answer without blanks around it; of equals the first; None where nothing can be read."""
    readable = [answer.strip() for answer in answers if answer is not None]
    return max(readable, key=readable.count, default=None)


def vote_of_unreadable(answers: list[str | None]) -> str | None:
    found = [answer and answer.strip() for answer in answers]
    return max(found, key=found.count, default=None)


def vote_with_blanks(answers: list[str | None]) -> str | None:
    readable = [answer for answer in answers if answer is not None]
    return max(readable, key=readable.count, default="").strip() or None


EXERCISES = [
    Function(
        "10.1", "sft_loss", sft_loss, sft_examples,
        mistakes={
            "the prompt is learned too": sft_loss_with_prompt,
            "padding is learned too": sft_loss_with_padding,
            "the first token of the answer is left out": sft_loss_from_second,
            "position t is asked for token t, which it has just read": sft_loss_unshifted,
            "every answer weighs the same, however long it is": sft_loss_by_row,
        },
        hint="logits[:, :-1] predict tokens[:, 1:]; count those whose place lies in the answer, then one mean over all",
        points=2,
    ),
    Function(
        "10.2", "keep", keep, keep_examples,
        mistakes={
            "right answers are kept that nobody can read": keep_unreadable,
            "copies are kept": keep_copies,
            "the same words are a copy even under another problem": keep_new_to_all,
            "the problems share their places": keep_of_all,
            "attempts that are dropped use up places": keep_of_first_tries,
        },
        hint="go through the attempts in order; remember the pairs you kept, and how many of each problem",
        points=2,
    ),
    Function(
        "10.3", "distil_loss", distil_loss, distil_examples,
        mistakes={
            "the divergence is taken from the student to the teacher": distil_reversed,
            "the factor of temperature squared is missing": distil_unscaled,
            "only the student is softened": distil_hard_teacher,
            "the mean runs over the vocabulary as well": distil_over_vocabulary,
            "the teacher's entropy is left in: a cross-entropy": distil_cross_entropy,
        },
        hint="log_softmax of both, divided by the temperature first; sum over the vocabulary, mean over tokens",
    ),
    SpotTheBug(
        "10.4", "test_labels", labels,
        (
            Bug("the prompt is learned", labels_with_prompt, "which labels does a prompt of three tokens leave?"),
            Bug("padding is learned", labels_with_padding, "leave room after the answer"),
            Bug("labels are not shifted", labels_unshifted, "the last prompt token predicts the first of the answer"),
            Bug("the end is never learned", labels_without_end, "is the answer's last token a label?"),
        ),
    ),
    SpotTheBug(
        "10.5", "test_split", split,
        (
            Bug("a copy of a held-out problem is trained on", split_by_place, "give it the same prompt several times"),
            Bug("held-out problems stay in training", split_without_removal, "compare the two sides as sets"),
            Bug("a problem's side depends on the others", split_by_rank, "split the list, then a part of it alone"),
        ),
    ),
    SpotTheBug(
        "10.6", "test_vote", vote,
        (
            Bug("what cannot be read has a vote", vote_of_unreadable, "let most answers be None"),
            Bug("a blank splits the votes", vote_with_blanks, "'18' and ' 18' are one answer"),
        ),
    ),
]  # fmt: skip
