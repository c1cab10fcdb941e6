"""Wrong answers to the exercises of chapter 10."""

import math

import torch

from minids.course.exercises import chapter10 as given


def labels_of_the_assistant_as_read(turns, seq_len):
    """The tokens that a position reads, where they are the assistant's, without the row's last token."""
    return given.labels_with(turns, seq_len, shift=0, drop=1)


def labels_with_none(turns, seq_len):
    return [None if label == -100 else label for label in given.conversation_labels(turns, seq_len)]


def labels_too_long(turns, seq_len):
    return [*given.conversation_labels(turns, seq_len), -100]


def labels_that_eat_the_turns(turns, seq_len):
    labels = given.conversation_labels(turns, seq_len)
    turns.clear()
    return labels


def labels_of_one_pair(turns, seq_len):
    """Everything after the first turn is learned."""
    flat = [-100] * len(turns[0][1]) + [token for _, tokens in turns[1:] for token in tokens]
    return (flat[1:] + [-100] * seq_len)[:seq_len]


def teachers_without_gradient(logits, teacher_logits, weights, mask):
    return given.multi_teacher_loss(logits.detach(), teacher_logits, weights, mask) + 0 * logits.sum()


def teachers_of_each_token(logits, teacher_logits, weights, mask):
    q, p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return ((q.exp() * (q - p)).sum(-1) * weights[:, None, None]).sum(0)[mask]


def teachers_normalised(logits, teacher_logits, weights, mask):
    return given.multi_teacher_loss(logits, teacher_logits, weights / weights.sum(), mask)


def teachers_in_bits(*arguments):
    return given.multi_teacher_loss(*arguments) / math.log(2)


def teachers_by_distance(logits, teacher_logits, weights, mask):
    return ((logits - teacher_logits) ** 2).mean()


def teachers_unmasked(logits, teacher_logits, weights, mask):
    return given.teachers_with(logits, teacher_logits, weights, mask, forward=True, masked=False)


def preference_by_majority(rewards_a, rewards_b, votes):
    """Kept where more judges are for one answer than for the other, however strongly."""
    return given.preference_with(rewards_a, rewards_b, votes.sign() * 2)


def preference_without_gradient(rewards_a, rewards_b, votes):
    return given.preference_loss(rewards_a.detach(), rewards_b, votes)


def preference_of_each_pair(rewards_a, rewards_b, votes):
    kept = votes.mean(1).abs() > 1
    return -torch.nn.functional.logsigmoid(votes.mean(1).sign() * (rewards_a - rewards_b))[kept]


def preference_by_margin(rewards_a, rewards_b, votes):
    """The mean vote scales the difference."""
    vote = votes.mean(1)
    return -torch.nn.functional.logsigmoid(vote * (rewards_a - rewards_b))[vote.abs() > 1].mean()


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


def no_difference(seed):
    return 0.0


def sign_reversed(seed):
    return -0.25


def forward_only(seed):
    """A student's probability of all tokens from 15 on, from which nothing is subtracted."""
    return 0.5


def a_tensor_of_two(seed):
    return torch.ones(2)


WRONG = {
    "10.1": [
        ("as read", labels_of_the_assistant_as_read, r"the result\[\d\]: got -?\d+, expected -?\d+"),
        ("none", labels_with_none, r"the result\[0\]"),
        ("too long", labels_too_long, r"should have 9 parts, not 10"),
        ("eats the turns", labels_that_eat_the_turns, r"your code changed the argument `turns`"),
        ("one pair", labels_of_one_pair, r"the result\[\d\]: got -?\d+, expected -?\d+"),
    ],
    "10.2": [
        ("no gradient", teachers_without_gradient, r"the gradient of the result with respect to `logits`"),
        ("each token", teachers_of_each_token, r"the result should have shape \(\), got \("),
        ("normalised weights", teachers_normalised, r"the result: got \S+, expected"),
        ("bits", teachers_in_bits, r"the result: got \S+, expected"),
        ("a distance", teachers_by_distance, r"the result: got \S+, expected"),
        (
            "two at once",
            teachers_unmasked,
            r"from the teachers to the student, and tokens outside of the mask count too",
        ),
    ],
    "10.3": [
        ("majority", preference_by_majority, r"the result: got \S+, expected"),
        ("no gradient", preference_without_gradient, r"the gradient of the result with respect to `rewards_a`"),
        ("each pair", preference_of_each_pair, r"the result should have shape \(\), got \("),
        ("a margin", preference_by_margin, r"the result: got \S+, expected"),
        ("a float", lambda *a: given.preference_loss(*a).item(), r"the result should be a tensor, got \d"),
    ],
    "10.4": [
        ("no copies", without_copies, r"✗ it misses a bug; hint: give it the same prompt several times"),
        ("only together", only_together, r"✗ it misses a bug; hint: split the list, then a part of it alone"),
        ("two lists", only_two_lists, r"it accepts everything so far"),
        ("a quarter", wants_a_quarter_exactly, r"it rejects the correct implementation\n.*AssertionError"),
        ("each once", wants_each_prompt_once, r"it rejects the correct implementation\n.*AssertionError"),
    ],
    "10.5": [
        ("readable", only_readable, r"✗ it misses a bug; hint: let most answers be None[\s\S]*it accepts everything"),
        ("no spaces", no_spaces, r"✗ it misses a bug; hint: '18' and ' 18' are one answer"),
        ("no unreadable", no_unreadable, r"✗ it misses a bug; hint: let most answers be None"),
        ("the last of equals", wants_the_last_of_equals, r"it rejects the correct implementation"),
        ("an empty text", wants_an_empty_text, r"it rejects the correct implementation"),
    ],
    "10.6": [
        ("no difference", no_difference, r"expected: a median between 0\.15 and 0\.4"),
        ("the sign", sign_reversed, r"median -0\.25"),
        ("one student", forward_only, r"median 0\.5"),
        ("a tensor", a_tensor_of_two, r"the function should return a float"),
    ],
}
