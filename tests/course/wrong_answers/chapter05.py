"""Wrong answers to the exercises of chapter 05."""

import math

import torch
import torch.nn.functional as F

from minids.course.exercises.chapter05 import bits_per_byte, learning_rate, pack, predict, shrink


def shrink_by_place(ids, merges, keep):
    """Cuts the merge list off, and leaves unknown ids out."""
    return [i for i in ids if i < 256 + keep]


def shrink_to_a_set(ids, merges, keep):
    return sorted(shrink(ids, merges, keep))


def shrink_by_dividing(ids, merges, keep):
    out = []
    for i in ids:
        out += [i] if i < 256 + keep else [i - keep, i - keep]
    return out


def shrink_nested(ids, merges, keep):
    return [i if i < 256 + keep else list(merges[i - 256]) for i in ids]


def pack_by_end_token(documents, seq_len, depth):
    inputs, labels = pack(documents, seq_len, depth, mask="none")
    return inputs, labels.masked_fill(inputs == documents[0][-1], -100)


def pack_for_the_next_token(documents, seq_len, depth):
    """The chapter's rows, whatever the depth."""
    return pack(documents, seq_len, 0)


def pack_padded(documents, seq_len, depth):
    stream = torch.tensor([token for document in documents for token in document])
    rows = len(stream) // seq_len
    labels = F.pad(stream[depth + 1 :], (0, depth + 1), value=-100)
    return stream[: rows * seq_len].view(rows, seq_len), labels[: rows * seq_len].view(rows, seq_len)


def pack_each_document(documents, seq_len, depth):
    """Rows begin anew with each document."""
    return pack([max(documents, key=len)], seq_len, depth)


def bits_by_mean(logits, labels, token_bytes):
    nats = F.cross_entropy(logits.mT, labels, ignore_index=-100)
    return (nats / math.log(2) / token_bytes.float().mean()).item()


def bits_of_all_bytes(logits, labels, token_bytes):
    nats = F.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="sum")
    return (nats / math.log(2) / token_bytes[labels].sum()).item()


def rate_not_clamped(step, steps, warmup, decay, final):
    """The decay goes on backwards: above 1 in the constant phase."""
    if step < warmup:
        return (step + 1) / warmup
    u = (step - (steps - decay) + 1) / decay
    return final + (1 - final) * (1 - math.copysign(math.sqrt(abs(u)), u))


def rate_as_in_the_chapter(step, steps, warmup, decay, final):
    part = min(max((step - (steps - decay)) / decay, 0), 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * part))


def predict_with_floor_0(flops, losses, floors, target):
    return predict(flops, losses, torch.zeros(1), target)


def predict_by_a_line(flops, losses, floors, target):
    x, y = flops.log(), losses
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return (y.mean() + slope * (math.log(target) - x.mean())).item(), 0.0


def predict_two_runs(flops, losses, floors, target):
    return predict(flops[[0, -1]], losses[[0, -1]], floors, target)


def _batch(rows=5, scale=1.0, masked=0):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 6, 3, generator=g), scale * torch.randn(rows, 6, generator=g)
    counted = torch.ones(rows, 6)
    counted[:masked, 1:] = 0
    return torch.zeros(3), x, y, counted, torch.randint(4, (rows, 6), generator=g)


def _size_does_not_matter(small, **batch):
    def test(step):
        arguments = _batch(**batch)
        one, other = step(*arguments, len(arguments[1])), step(*arguments, small)
        assert torch.allclose(one[0], other[0], atol=1e-5) and torch.equal(one[1], other[1])

    return test


def only_the_gradient(step):
    arguments = _batch(scale=100.0, masked=2)
    assert torch.allclose(step(*arguments, 5)[0], step(*arguments, 2)[0], atol=1e-5)


def expects_no_clipping(step):
    weight, x, y, counted, experts = _batch(scale=100.0)
    error = counted * (x @ weight - y)
    gradient = 2 * (error[..., None] * x).sum((0, 1)) / counted.sum()
    assert torch.allclose(step(weight, x, y, counted, experts, 5)[0], gradient, atol=1e-4)


def expects_bit_equality_of_sizes(step):
    arguments = _batch(rows=64, scale=0.1, masked=9)
    for size in range(1, 64):
        assert torch.equal(step(*arguments, 64)[0], step(*arguments, size)[0])


WRONG = {
    "5.1": [
        ("new ids left out", shrink_by_place, "should have .* parts, not"),
        ("sorted", shrink_to_a_set, "the result"),
        ("id minus keep", shrink_by_dividing, "the result"),
        ("pairs in lists", shrink_nested, "the result"),
        ("a tensor", lambda *a: torch.tensor(shrink(*a)), "the result should be a list of"),
        ("nothing done", lambda ids, merges, keep: list(ids), "the result"),
        (
            "two mistakes: one merge too many, halves swapped",
            lambda *a: shrink(*a, first_kept=257, swapped=True),
            "one merge too many is kept and the second half of a pair comes first",
        ),
    ],
    "5.2": [
        ("masked by an end token", pack_by_end_token, "the labels: .* values differ"),
        ("depth ignored", pack_for_the_next_token, "the (labels|inputs)"),
        ("the last row padded", pack_padded, "should have shape|values differ"),
        ("one document only", pack_each_document, "the inputs should have shape"),
        ("lists", lambda *a: tuple(x.tolist() for x in pack(*a)), "the inputs should be a tensor"),
        ("int32", lambda *a: tuple(x.int() for x in pack(*a)), "should be of torch.int64, got torch.int32"),
        (
            "two mistakes: no shared token, labels kept",
            lambda *a: pack(*a, shared=1, mask="none"),
            "so that some tokens are no label and labels of other documents are kept",
        ),
    ],
    "5.3": [
        ("mean of the bytes", bits_by_mean, "the result: got .*, expected"),
        ("-100 as an index", bits_of_all_bytes, "your code raised IndexError"),
        ("a tuple", lambda *a: (bits_per_byte(*a), 1), "the result should be a number, got"),
        (
            "per row tensor",
            lambda logits, *a: bits_per_byte(logits, *a) * torch.ones(len(logits)),
            "should be a number",
        ),
        (
            "two mistakes: nats, per token",
            lambda lo, la, tb: F.cross_entropy(lo.mT, la, ignore_index=-100).item(),
            "nats are taken for bits and it is divided by tokens and not by bytes",
        ),
        ("bits by log2 of e missing", lambda *a: bits_per_byte(*a) * math.log(2) ** 2, "the result: got .*, expected"),
    ],
    "5.4": [
        ("not clamped", rate_not_clamped, "on example .* of 12"),
        ("the chapter's cosine", rate_as_in_the_chapter, "on example .* of 12"),
        ("no warm-up", lambda step, *a: learning_rate(max(step, a[1]), *a), "the result: got"),
        ("a string", lambda *a: f"{learning_rate(*a)}", "the result should be a number, got '"),
        ("forgotten +1", lambda *a: learning_rate(*a, last=0), "in the last step u is not 1"),
        (
            "two mistakes: first step lost, straight",
            lambda *a: learning_rate(*a, first=0, fall=lambda u: u),
            "the first step is lost and it falls in a straight line",
        ),
    ],
    "5.5": [
        ("floor 0", predict_with_floor_0, "the prediction: got .*, expected"),
        ("a straight line in log compute", predict_by_a_line, "the prediction: got .*, expected"),
        ("two runs", predict_two_runs, "the prediction: got .*, expected|the floor"),
        ("the prediction alone", lambda *a: predict(*a)[0], "the result should"),
        ("in the other order", lambda *a: predict(*a)[::-1], "the prediction: got .*, expected"),
        (
            "two mistakes: floor not added, the first floor",
            lambda *a: predict(*a, add_floor=False, choose="first"),
            "the floor is not added again and the floor is the first of the list",
        ),
    ],
    "5.6": [
        ("equal sizes only", _size_does_not_matter(1), "it misses a bug; hint: mask some labels"),
        (
            "short gradients",
            _size_does_not_matter(2, scale=0.1, masked=2),
            "it misses a bug; hint: make the gradient long",
        ),
        ("only the gradient", only_the_gradient, "it misses a bug; hint: look at the biases too"),
        ("4 rows by 2", _size_does_not_matter(2, rows=4, masked=1, scale=9), "it misses a bug; hint: take 5 rows"),
        ("too strict: unclipped", expects_no_clipping, "it rejects the correct implementation"),
        ("too strict: bits", expects_bit_equality_of_sizes, "it rejects the correct implementation"),
    ],
    "5.7": [
        ("rows counted", lambda seed: 64 / 4, "median 16"),
        ("upside down", lambda seed: 0.25, "median 0.25"),
        ("no noise", lambda seed: 0.0, "median 0"),
        ("a tensor", lambda seed: torch.tensor(4.0), "should return a float"),
    ],
}
