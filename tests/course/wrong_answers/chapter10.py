"""Wrong answers to the exercises of chapter 10."""

import math

import torch
import torch.nn.functional as F

from minids.course.exercises import chapter10 as given


def sft_loss_without_gradient(logits, tokens, prompt_lengths, lengths):
    return given.sft_loss(logits.detach(), tokens, prompt_lengths, lengths)


def sft_loss_of_everything(logits, tokens, prompt_lengths, lengths):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def sft_loss_of_rows(logits, tokens, prompt_lengths, lengths):
    rows = (logits, tokens, prompt_lengths, lengths)
    return torch.stack([given.sft_loss(*(x[i : i + 1] for x in rows)) for i in range(len(tokens))])


def sft_loss_in_bits(*arguments):
    return given.sft_loss(*arguments) / math.log(2)


def sft_loss_of_probabilities(logits, tokens, prompt_lengths, lengths):
    return given.sft_loss(logits.softmax(-1), tokens, prompt_lengths, lengths)


def sft_loss_with_lengths_of_answers(logits, tokens, prompt_lengths, lengths):
    """`lengths` is taken for that of the answer alone."""
    return given.sft_loss(logits, tokens, prompt_lengths, (prompt_lengths + lengths).clamp(max=tokens.shape[1]))


def sft_loss_with_two_mistakes(*arguments):
    return given.sft_loss_with(*arguments, shifted=False, drop=1)


def kept_attempts(attempts, per_problem):
    return [attempts[place] for place in given.keep(attempts, per_problem)]


def kept_or_not(attempts, per_problem):
    kept = given.keep(attempts, per_problem)
    return [place in kept for place in range(len(attempts))]


def keep_by_removing(attempts, per_problem):
    kept = given.keep(attempts, per_problem)
    attempts[:] = [attempts[place] for place in kept]
    return kept


def keep_by_problem(attempts, per_problem):
    return sorted(given.keep(attempts, per_problem), key=lambda place: attempts[place][0])


def keep_with_two_mistakes(attempts, per_problem):
    return given.keep_by(attempts, per_problem + 1, same=lambda _, answer: answer)


def distil_without_gradient(logits, teacher_logits, temperature):
    return given.distil_loss(logits.detach(), teacher_logits, temperature)


def distil_to_the_teacher(logits, teacher_logits, temperature):
    """The value is correct, but it is the teacher that learns."""
    loss = given.distil_loss(logits, teacher_logits, temperature)
    return loss.detach() + logits.sum() * 0


def distil_by_the_default_of_kl_div(logits, teacher_logits, temperature):
    student, teacher = ((each / temperature).log_softmax(-1) for each in (logits, teacher_logits))
    return (teacher.exp() * (teacher - student)).mean()


def distil_of_each_token(logits, teacher_logits, temperature):
    student, teacher = ((each / temperature).log_softmax(-1) for each in (logits, teacher_logits))
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def distil_by_distance(logits, teacher_logits, temperature):
    return ((logits - teacher_logits) / temperature).square().sum(-1).mean()


def distil_with_two_mistakes(logits, teacher_logits, temperature):
    return given.distil_with(logits, teacher_logits, temperature, power=1, mean=False)


def long_prompt(labels):
    assert labels([5, 6, 7], [8, 9], 4) == [-100, -100, 8, 9]


def one_token_of_prompt(labels):
    assert labels([5], [8, 9], 4)[2:] == [-100, -100]


def only_length(labels):
    assert len(labels([5, 6, 7], [8, 9], 7)) == 7


def wants_padding_to_be_learned(labels):
    assert labels([5], [8, 9], 4) == [8, 9, 0, 0]


def wants_unshifted_labels(labels):
    assert labels([5, 6], [8, 9], 4) == [-100, -100, 8, 9]


PROMPTS = [f"a{i} b+{j}?" for i in range(20) for j in range(1, 6)]


def without_copies(split):
    train, held_out = split(PROMPTS)
    assert not set(train) & set(held_out)


def only_together(split):
    train, held_out = split(PROMPTS * 3)
    assert not set(train) & set(held_out) and set(train) | set(held_out) == set(PROMPTS)


def only_two_lists(split):
    train, held_out = split(PROMPTS)
    assert train and held_out


def wants_a_quarter_exactly(split):
    _, held_out = split(PROMPTS)
    assert len(held_out) == len(PROMPTS) // 4


def wants_each_prompt_once(split):
    train, held_out = split(PROMPTS * 3)
    assert len(train) + len(held_out) == len(PROMPTS)


def only_readable(vote):
    assert vote(["7", "18", "18"]) == "18"


def no_spaces(vote):
    assert vote([None, None, None, "7"]) == "7" and vote([None]) is None


def no_unreadable(vote):
    assert vote(["7", "7", "18", " 18", "18 "]) == "18"


def wants_the_last_of_equals(vote):
    assert vote(["7", "18"]) == "18"


def wants_an_empty_text(vote):
    assert vote([None, None]) == ""


WRONG = {
    "10.1": [
        ("no gradient", sft_loss_without_gradient, r"the gradient of the result with respect to `logits`: "),
        ("everything", sft_loss_of_everything, r"comes out when the prompt and the padding are learned too"),
        ("rows", sft_loss_of_rows, r"the result should have shape \(\), got \(2,\)"),
        ("bits", sft_loss_in_bits, r"the result: got \S+, expected"),
        ("probabilities", sft_loss_of_probabilities, r"the result: got \S+, expected"),
        ("lengths of answers", sft_loss_with_lengths_of_answers, r"the result: got \S+, expected"),
        ("two mistakes", sft_loss_with_two_mistakes, r"the result: got \S+, expected"),
        ("a float", lambda *a: given.sft_loss(*a).item(), r"the result should be a tensor, got \d"),
    ],
    "10.2": [
        ("the attempts", kept_attempts, r"the result\[0\]: got \('a1 b\+1\?', 'b1\+1=2', True, True\), expected 1"),
        ("booleans", kept_or_not, r"should have 3 parts, not 7: got \[False, .*expected \[1, 3, 5\]"),
        ("in place", keep_by_removing, r"your code changed the argument `attempts`; return a new value instead"),
        ("by problem", keep_by_problem, r"the result\[\d\]: got \d+, expected \d+\n +got +\["),
        ("two mistakes", keep_with_two_mistakes, r"the result\[1\]: got 5, expected 3\n"),
        ("a set", lambda a, n: set(given.keep(a, n)), r"the result should be a list of 3; got \{1, 3, 5\}"),
    ],
    "10.3": [
        ("no gradient", distil_without_gradient, r"the gradient of the result with respect to `logits`"),
        ("the teacher learns", distil_to_the_teacher, r"the gradient of the result with respect to `logits`"),
        ("kl_div's default", distil_by_the_default_of_kl_div, r"over the vocabulary as well, and the factor of temp"),
        ("each token", distil_of_each_token, r"the result should have shape \(\), got \(4,\)"),
        ("a distance", distil_by_distance, r"the result: got \S+, expected"),
        ("two mistakes", distil_with_two_mistakes, r"the result: got \S+, expected"),
        ("a float", lambda *a: given.distil_loss(*a).item(), r"the result should be a tensor, got \d"),
    ],
    "10.4": [
        ("no padding", long_prompt, r"✗ it misses a bug; hint: leave room after the answer"),
        ("one token of prompt", one_token_of_prompt, r"✗ it misses a bug; hint: which labels does a prompt of three"),
        ("the length", only_length, r"it accepts everything so far"),
        ("padding", wants_padding_to_be_learned, r"it rejects the correct implementation\n.*AssertionError"),
        ("no shift", wants_unshifted_labels, r"it rejects the correct implementation\n.*AssertionError"),
    ],
    "10.5": [
        ("no copies", without_copies, r"✗ it misses a bug; hint: give it the same prompt several times"),
        ("only together", only_together, r"✗ it misses a bug; hint: split the list, then a part of it alone"),
        ("two lists", only_two_lists, r"it accepts everything so far"),
        ("a quarter", wants_a_quarter_exactly, r"it rejects the correct implementation\n.*AssertionError"),
        ("each once", wants_each_prompt_once, r"it rejects the correct implementation\n.*AssertionError"),
    ],
    "10.6": [
        ("readable", only_readable, r"✗ it misses a bug; hint: let most answers be None[\s\S]*it accepts everything"),
        ("no spaces", no_spaces, r"✗ it misses a bug; hint: '18' and ' 18' are one answer"),
        ("no unreadable", no_unreadable, r"✗ it misses a bug; hint: let most answers be None"),
        ("the last of equals", wants_the_last_of_equals, r"it rejects the correct implementation"),
        ("an empty text", wants_an_empty_text, r"it rejects the correct implementation"),
    ],
}
