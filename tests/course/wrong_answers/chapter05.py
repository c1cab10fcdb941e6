"""Wrong answers to the exercises of chapter 05."""

import math

import torch
import torch.nn.functional as F

from minids.course.exercises.chapter05 import bits_per_byte, encode, learning_rate, pack, predict


def encode_by_longest_match(data, merges):
    words = {bytes([i]): i for i in range(256)}
    names = {i: word for word, i in words.items()}
    for new, (a, b) in enumerate(merges, start=256):
        names[new] = names[a] + names[b]
        words[names[new]] = new
    ids, i = [], 0
    while i < len(data):
        length = max(n for n in range(1, len(data) - i + 1) if data[i : i + n] in words)
        ids.append(words[data[i : i + length]])
        i += length
    return ids


def encode_without_the_last_id(data, merges):
    ids = list(data)
    for new, pair in enumerate(merges, start=256):
        out, i = [], 0
        while i < len(ids) - 1:
            found = (ids[i], ids[i + 1]) == pair
            out.append(new if found else ids[i])
            i += 1 + found
        ids = out
    return ids


def encode_once(data, merges):
    """One pass over the word, whatever fits."""
    known, out = {pair: i for i, pair in enumerate(merges, start=256)}, []
    for i in data:
        while out and (out[-1], i) in known:
            i = known[out.pop(), i]
        out.append(i)
    return out


def pack_by_last_token(documents, seq_len):
    inputs, labels = pack(documents, seq_len, mask="none")
    last = torch.tensor([document[-1] for document in documents])
    return inputs, labels.masked_fill(torch.isin(inputs, last), -100)


def pack_by_end_token(documents, seq_len):
    inputs, labels = pack(documents, seq_len, mask="none")
    return inputs, labels.masked_fill(inputs == documents[0][-1], -100)


def pack_padded(documents, seq_len):
    stream = torch.tensor([token for document in documents for token in document])
    owner = torch.tensor([i for i, document in enumerate(documents) for _ in document])
    rows = len(stream) // seq_len
    labels = stream[1:].masked_fill(owner[1:] != owner[:-1], -100)
    labels = F.pad(labels, (0, 1), value=-100)
    return stream[: rows * seq_len].view(rows, seq_len), labels[: rows * seq_len].view(rows, seq_len)


def pack_each_document(documents, seq_len):
    """Rows begin anew with each document."""
    return pack([max(documents, key=len)], seq_len)


def pack_one_row_less(documents, seq_len):
    inputs, labels = pack(documents, seq_len)
    return inputs[: len(inputs) - 1 or 1], labels[: len(inputs) - 1 or 1]


def bits_by_mean(logits, labels, token_bytes):
    nats = F.cross_entropy(logits.mT, labels, ignore_index=-100)
    return (nats / math.log(2) / token_bytes.float().mean()).item()


def bits_of_all_bytes(logits, labels, token_bytes):
    nats = F.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="sum")
    return (nats / math.log(2) / token_bytes[labels].sum()).item()


def rate_without_the_end(tokens):
    part = min(max((tokens - 10) / 4.3, 0), 1)
    return 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi * part))


def rate_not_clamped(tokens):
    if tokens >= 14.633:
        return 7.3e-6
    return 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi * (tokens - 10) / 4.3))


def rate_after_the_end(tokens):
    return learning_rate(tokens) if tokens != 14.633 else 2.2e-5


def predict_weighted(flops, losses, target, floor):
    """The median slope between neighbours."""
    x, y = flops.log(), (losses - floor).log()
    slope = ((y[1:] - y[:-1]) / (x[1:] - x[:-1])).median()
    return floor + (y[-1] + slope * (math.log(target) - x[-1])).exp().item()


def predict_mixed_logarithms(flops, losses, target, floor):
    return floor + math.exp(math.log10(predict(flops, losses, target, floor) - floor))


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
        ("longest match", encode_by_longest_match, r"expected \[.*\]"),
        ("the last id is lost", encode_without_the_last_id, "the result should have 2 parts, not 1"),
        ("one pass", encode_once, r"should have 4 parts, not 3: got \[257, 257, 258\]"),
        ("a tensor", lambda *a: torch.tensor(encode(*a)), "the result should be a list of 2"),
        ("bytes", lambda data, merges: data, r"the result should be a list of 2; got b'abcab'"),
        ("ids from 255", lambda *a: encode(*a, first_id=255), r"the result\[0\]: got|parts"),
        (
            "two mistakes: newest first, from the right",
            lambda *a: encode(*a, newest_first=True, from_the_right=True),
            "the newest merges come first and a merge goes from right to left",
        ),
    ],
    "5.2": [
        ("masked by the last tokens' values", pack_by_last_token, "has the value of some document's last token"),
        ("masked by an end token", pack_by_end_token, "the labels: .* values differ"),
        ("the last row padded", pack_padded, "should have shape"),
        ("one document only", pack_each_document, "the inputs should have shape"),
        ("a row less", pack_one_row_less, r"the inputs should have shape \(3, 4\), got \(2, 4\)"),
        ("lists", lambda *a: tuple(x.tolist() for x in pack(*a)), "the inputs should be a tensor"),
        ("int32", lambda *a: tuple(x.int() for x in pack(*a)), "should be of torch.int64, got torch.int32"),
        (
            "two mistakes: no shared token, labels kept",
            lambda *a: pack(*a, shared=0, mask="none"),
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
        ("without the end", rate_without_the_end, "the last 167 billion tokens are left out"),
        ("not clamped", rate_not_clamped, "on example 1 of 9, tokens = 2:\n    the result: got"),
        ("above 14.633 only", rate_after_the_end, "on example 8 of 9, tokens = 14.633"),
        ("a string", lambda tokens: f"{learning_rate(tokens)}", "the result should be a number, got '0.00022'"),
        (
            "two mistakes: begins at 0, straight",
            lambda tokens: learning_rate(tokens, begins=0.0, fall=lambda part: 2 * (1 - part)),
            "the cosine begins at the first token and it falls in a straight line",
        ),
        ("in units of 1e-4", lambda tokens: 1e4 * learning_rate(tokens), "the result: got 2.2, expected 0.00022"),
        ("forgotten half", lambda tokens: learning_rate(tokens, height=1.0), "the cosine is not multiplied by 1/2"),
    ],
    "5.5": [
        ("median slope", predict_weighted, "the result: got .*, expected"),
        ("logarithms of two bases", predict_mixed_logarithms, "the result: got .*, expected"),
        ("the logarithm", lambda *a: math.log(predict(*a)), "the result: got .*, expected"),
        ("a list", lambda *a: [predict(*a)], "the result should be a number"),
        (
            "two mistakes: floor not added, two points only",
            lambda *a: predict(*a, add_floor=False, ends_only=True),
            "the floor is not added again and the line goes through the first and the last run only",
        ),
        ("the last loss", lambda flops, losses, *a: losses[-1].item(), "the result: got .*, expected"),
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
}
