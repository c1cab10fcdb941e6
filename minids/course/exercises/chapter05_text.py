"""Exercises 5.1 and 5.2 of chapter 5: a smaller vocabulary, and documents packed into rows."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from minids.course.exercises.mistakes import Changes
from minids.training.loss import IGNORED

# 5.1 BPE ------------------------------------------------------------------------------------------------------------


def shrink(
    ids: Sequence[int], merges: Sequence[tuple[int, int]], keep: int, *,
    first_kept: int = 256, deep: bool = True, swapped: bool = False, to_bytes: bool = False,
) -> list[int]:  # fmt: skip
    """The same text in the vocabulary of the oldest `keep` merges; merge number i makes id 256 + i of a pair."""
    limit = 256 if to_bytes else first_kept + keep

    def split(i: int, again: bool = True) -> list[int]:
        if i < limit or not again:
            return [i]
        pair = merges[i - 256]
        return [part for half in (pair[::-1] if swapped else pair) for part in split(half, deep)]

    return [part for i in ids for part in split(i)]


SHRINK_MISTAKES: Changes = {
    "a token is split once, although its parts may be too new as well": {"deep": False},
    "one merge too many is kept": {"first_kept": 257, "to_bytes": False},
    "the last kept merge is undone too": {"first_kept": 255, "to_bytes": False},
    "the second half of a pair comes first": {"swapped": True},
    "all merges are undone, also those that are kept": {"to_bytes": True, "deep": True},
}


def shrink_examples(g: Generator) -> list[tuple]:
    a, b, c = b"abc"
    merges = [(a, b), (256, c), (257, 256), (c, 258)]  # ab, abc, abcab, cabcab
    return [
        ([257, 257], merges[:2], 1),
        ([259, 257, 256, a, 258], merges, 2),
        ([259, 258, c], merges, 1),
        ([258, 259, 257], merges, 0),
        ([256, b, 258], merges, 4),
        ([], merges, 2),
    ]


# 5.2 Packing --------------------------------------------------------------------------------------------------------


def pack(
    documents: Sequence[Sequence[int]], seq_len: int, depth: int, *,
    shared: int = 0, mask: str = "document", shift: int = 1, ignored: int = IGNORED,
) -> tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]:  # fmt: skip
    """Inputs and labels, `depth` + 1 places later, of all full rows; labels of another document are IGNORED."""
    stream = torch.tensor([token for document in documents for token in document])
    owner = torch.tensor([i for i, document in enumerate(documents) for _ in document])
    ahead = depth + shift
    reach = seq_len + depth + 1
    rows, owners = (
        stream.unfold(0, reach, seq_len + shared * (depth + 1)),
        owner.unfold(0, reach, seq_len + shared * (depth + 1)),
    )
    inputs, labels = rows[:, :seq_len], rows[:, ahead : ahead + seq_len]
    other = owners[:, depth + 1 : depth + 1 + seq_len]
    crosses = {
        "document": other != owners[:, :seq_len],
        "none": torch.zeros_like(other, dtype=torch.bool),
        "the last step": other != owners[:, depth : depth + seq_len],
        "value": torch.isin(inputs, torch.tensor([document[-1] for document in documents])),
    }[mask]
    return inputs, labels.masked_fill(crosses, ignored)


PACK_MISTAKES: Changes = {
    "neighbouring rows share no token, so that some tokens are no label": {"shared": 1},
    "labels of other documents are kept": {"mask": "none", "ignored": IGNORED},
    "the labels are one place too early, so that those of depth 0 are the inputs": {"shift": 0},
    "a label is compared with the token before it, not with its input": {"mask": "the last step"},
    "a label is masked wherever its input has the value of some document's last token": {"mask": "value"},
    "masked labels are 0, not -100": {"ignored": 0},
}


def pack_examples(g: Generator) -> list[tuple]:
    def example(lengths, seq_len, depth, vocab=100):
        return [torch.randint(1, vocab, (n,), generator=g).tolist() for n in lengths], seq_len, depth

    repeated = [[1, 2, 1, 3, 2], [2, 1, 1], [3, 1, 3, 2]], 4, 1  # ids at a document's end also stand inside
    return [
        example((5, 3, 5), 4, 0), repeated, example((9, 2, 2, 7), 3, 1), example((1, 1, 11), 5, 2, 3),
        example((20,), 6, 1),
    ]  # fmt: skip
