"""Exercises 1.2 and 1.3 of chapter 1: rotation of a part of the channels, and the two layouts of RoPE's pairs.

Beyond its arguments, the keywords of a reference change one step of it, for the known mistakes.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from minids.course.checks import Function
from minids.course.exercises.mistakes import variants


def rotate(
    x: Float[Tensor, "seq heads dim"], positions: Int[Tensor, "seq"], theta: float, rotary_dim: int, *,
    exponent: float = 2, halves: bool = False, interleaved: bool = True, direction: int = 1,
    place: Callable[[Tensor], Tensor] = lambda positions: positions, last: bool = False,
    part: Callable[[int, int], int] = lambda rotary_dim, dim: rotary_dim,
    width: Callable[[int, int], int] | None = None,
) -> Float[Tensor, "seq heads dim"]:  # fmt: skip
    dim = x.shape[-1]
    rotated = part(rotary_dim, dim)
    parts = x.split((dim - rotated, rotated) if last else (rotated, dim - rotated), -1)
    turning, kept = parts[::-1] if last else parts
    if halves:
        turning = rearrange(turning, "t h (pair i) -> t h (i pair)", pair=2)
    pairs = torch.view_as_complex(turning.unflatten(-1, (-1, 2)).contiguous())
    denominator = width(rotary_dim, dim) if width else rotated
    frequency = theta ** (-exponent * torch.arange(pairs.shape[-1]) / denominator)
    angle = direction * place(positions)[:, None, None] * frequency
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    if halves or not interleaved:
        turned = rearrange(turned, "t h (i pair) -> t h (pair i)", pair=2)
    return torch.cat((kept, turned) if last else (turned, kept), -1)


def _rotate_examples(generator: torch.Generator) -> list[tuple]:
    def example(positions: list[int], heads: int, dim: int, rotary_dim: int, theta: float = 10000.0) -> tuple:
        return torch.randn(len(positions), heads, dim, generator=generator), torch.tensor(positions), theta, rotary_dim

    return [
        example([0, 1, 2], 1, 4, 2),
        example([0, 1, 2, 3, 4], 2, 12, 8),
        example([7], 3, 8, 6, 100.0),
        example([5, 2, 90], 1, 6, 4),
    ]


ROTATE = Function(
    id="1.2",
    name="rotate",
    reference=rotate,
    examples=_rotate_examples,
    mistakes=variants(
        rotate,
        {
            "all channels are rotated": {"part": lambda rotary_dim, dim: dim, "width": None, "last": False},
            "the last rotary_dim channels are rotated instead of the first": {"last": True},
            "the frequencies are those of the whole head, theta^(-2i/dim)": {"width": lambda rotary_dim, dim: dim},
            "channel i is paired with i + rotary_dim/2 instead of its neighbour": {"halves": True},
            "the pairs are rotated correctly, but then concatenated (torch.cat), not interleaved": {
                "interleaved": False,
                "halves": False,
            },
            "row t is placed at position t, whatever `positions` says": {"place": lambda p: torch.arange(len(p))},
            "the pairs are rotated clockwise": {"direction": -1},
            "pair i has frequency theta^(-i/rotary_dim), without the 2 in the exponent": {"exponent": 1},
        },
    ),
    hints=(
        "write down the angles as a table of rows by pairs first; then rotate a pair (a, b) by one angle; the channels "
        "from rotary_dim on are copied",
        "turning, kept = x[..., :rotary_dim], x[..., rotary_dim:]; a, b = turning[..., 0::2], turning[..., 1::2]; the "
        "angles need a dimension of 1 for the heads; torch.stack(..., -1) and flatten(-2) put the pairs back in place",
    ),
    section="chapter 01, section 2: RoPE",
    points=2,
)


def to_neighbours(
    weight: Float[Tensor, "out dim"], heads: int, *,
    by_head: bool = True, order: str = "(h pair i) d -> (h i pair) d", odd_first: bool = False,
) -> Float[Tensor, "out dim"]:  # fmt: skip
    reordered = rearrange(weight, order, h=heads if by_head else 1, pair=2)
    return reordered.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) if odd_first else reordered


def _weight_examples(generator: torch.Generator) -> list[tuple]:
    return [
        (torch.arange(12.0)[:, None] * torch.ones(1, 2), 2),
        (torch.randn(24, 6, generator=generator), 3),
        (torch.randn(16, 4, generator=generator), 1),
    ]


TO_NEIGHBOURS = Function(
    id="1.3",
    name="to_neighbours",
    reference=to_neighbours,
    examples=_weight_examples,
    mistakes=variants(
        to_neighbours,
        {
            "the halves are those of the whole matrix and not of each head": {"by_head": False},
            "the reordering goes the other way, from neighbours to halves": {
                "order": "(h i pair) d -> (h pair i) d",
                "odd_first": False,
            },
            "the second half comes first in each pair": {"odd_first": True},
        },
    )
    | {
        "the columns are reordered instead of the rows": lambda w, heads: torch.stack(w.chunk(2, 1), -1).flatten(1),
    },
    hints=(
        "separate the heads before anything else; then the order of rows is the same in each of them",
        "within a head of d rows: 0, d/2, 1, d/2 + 1, ...; print it for torch.arange(12.)[:, None] and 2 heads",
    ),
    section="chapter 01, section 4: pairs of neighbours, or pairs of halves",
)
