"""Exercises of chapter 06: codes of eight bits, new tiles, promoted sums, experts' gradients, stochastic rounding.

Rounding is by torch's own cast. A scale is what a stored value is multiplied by.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minids.course.checks import Bug, Experiment, Function, OpenTask, SpotTheBug
from minids.course.exercises import chapter06_mistakes as known
from minids.course.exercises.chapter06_mistakes import rounded, spread, truncate
from minids.course.exercises.mistakes import variants
from minids.course.observation import Observation
from minids.fp8.formats import dequantize, quantize

# 6.1 -----------------------------------------------------------------------------------------------------------------


def encode(values: list[float]) -> list[int]:
    """The E4M3 codes, 0 to 255, of finite values: nearest, ties to even, at most 448."""
    return torch.tensor(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).tolist()


def by_arithmetic_only(arguments: tuple, seen: Observation) -> str | None:
    if {"view", "frombuffer"} & set(seen.functions):
        return "PyTorch's float8 type made the codes; compute them from e and m"
    return None


def value_examples(generator: torch.Generator) -> list[tuple]:
    wide = torch.randn(60, generator=generator) * torch.logspace(-4, 2.5, 60)
    ties = [17.0, 19.0, -17.0, 1.0625, 1.1875, 0.0, 1.5 * 2.0**-9, 2.0**-10]
    return [
        ([1.0, 1.125, -2.0, 0.3],), (ties,), ([0.001, 0.006, -0.0009, -0.003, 2.0**-6],),
        ([448.0, 460.0, -5000.0, 447.0],), (wide.tolist(),),
    ]  # fmt: skip


# 6.2 -----------------------------------------------------------------------------------------------------------------


def retile(q: Float[Tensor, "tokens channels"], scale: Float[Tensor, "tokens tiles"], width: int, height: int):
    """Tiles of one token by `width` channels become tiles of `height` tokens by one channel, scales powers of two."""
    q, scale = quantize(dequantize(q, scale, (1, width)), (height, 1), power_of_two=True)
    return q.float(), scale


def without_package(arguments: tuple, seen: Observation) -> str | None:
    if "nan_to_num_" in seen.functions:  # which the package's function calls, and nobody else
        return "the package's `quantize` made it; find the scales and cast the tiles with PyTorch alone"
    return None


def retile_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens, channels, width, height):
        x = torch.randn(tokens, channels, generator=generator) * torch.logspace(-3, 3, tokens)[:, None]
        q, scale = quantize(x, (1, width))
        return q.float(), scale, width, height

    by_hand = torch.tensor([[448.0, 3.5], [-7.0, 0.0]]), torch.tensor([[0.5], [2.0]]), 2, 2
    small = torch.tensor([[1.0, 0.0, 5.0], [2.0, 0.0, 448.0]]), torch.tensor([[1e-6, 0.25]] * 2), 2, 1
    return [by_hand, small, one(4, 6, 3, 2), one(5, 7, 4, 2), one(130, 10, 4, 128), one(256, 130, 128, 128)]


# 6.3 -----------------------------------------------------------------------------------------------------------------


def promoted_sum(products: list[float], scales: list[float], bits: int) -> float:
    """An accumulator of `bits` bits, multiplied by the tile's scale and promoted once per tile of equal length."""
    return known.promoted(products, scales, bits)


def sum_examples(generator: torch.Generator) -> list[tuple]:
    def one(k, tiles, bits):
        products = torch.randint(-8, 24, (k,), generator=generator).double().tolist()
        return products, (0.5 + torch.rand(tiles, generator=generator).double()).tolist(), bits

    falling = [-1.0, -2.0, -5.0, -7.0, -9.0, -11.0], [1.0, 3.0], 3  # negative sums: cut towards zero, not down
    mixed = one(16, 2, 4), one(64, 4, 5), one(7, 1, 3), one(6, 6, 4), one(256, 2, 8)
    return [([1.0] * 24, [1.0, 2.0, 0.5], 3), falling, *mixed]


# 6.4 -----------------------------------------------------------------------------------------------------------------


def expert_gradients(
    x: Float[Tensor, "tokens in"], grad: Float[Tensor, "tokens out"], tokens_per_expert: list[int], height: int
) -> Float[Tensor, "experts out in"]:
    """The gradients of all experts' weights, from operands in E4M3 in tiles of at most `height` tokens."""
    return known.expert_gradients(x, grad, tokens_per_expert, height)


def gradient_examples(generator: torch.Generator) -> list[tuple]:
    def one(tokens_per_expert, inputs, outputs, height):
        tokens = sum(tokens_per_expert)
        size = torch.logspace(0, 3, tokens)[:, None]
        x, grad = (torch.randn(tokens, n, generator=generator) for n in (inputs, outputs))
        return x * size, grad * size.flip(0), tokens_per_expert, height

    return [
        one([2, 2], 3, 2, 2), one([3, 5], 6, 4, 4), one([5, 0, 3], 3, 5, 4), one([100, 130, 26], 12, 7, 128),
        one([130], 4, 9, 128),
    ]  # fmt: skip


# 6.5 -----------------------------------------------------------------------------------------------------------------


def round_trip(x: Float[Tensor, "rows cols"], width: int) -> Float[Tensor, "rows cols"]:
    """Quantise in tiles of one row and `width` columns, and dequantise."""
    return dequantize(*quantize(x, (1, width)), (1, width))


def round_trip_of_integers(x, width):
    scale = quantize(x, (1, width))[1]
    return known.to_integers(x / spread(scale, x, width)) * spread(scale, x, width)


def round_trip_inverted(x, width):
    q, scale = quantize(x, (1, width))
    return q.float() / spread(scale, x, width)


def round_trip_per_tensor(x, width):
    return rounded(x, (None, None))


def round_trip_along_rows(x, width):
    return rounded(x, (width, 1))


def round_trip_without_floor(x, width):
    scale = torch.stack([part.abs().amax(1) for part in x.split(width, 1)], 1) / 448
    return known.to_e4m3(x / spread(scale, x, width)) * spread(scale, x, width)


EXERCISES = [
    Function(
        "6.1", "encode", encode, value_examples, variants(known.encode, known.ENCODE_MISTAKES), cost=by_arithmetic_only,
        hints=(
            "the codes 0 to 126 are in the order of their values: which two neighbours does a value lie between?",
            "make the list of all 127 values, find the last one that is not above |value|, compare with the middle to "
            "the next; at a tie take the even code; add 128 for the sign",
        ),
        section="chapter 06, sections 2.1 and 2.2: the values of E4M3, and rounding",
    ),
    Function(
        "6.2", "retile", retile, retile_examples, variants(known.retile, known.RETILE_MISTAKES), cost=without_package,
        hints=(
            "first the values, then the tiles: q means nothing without its old scales",
            "x = q * scale.repeat_interleave(width, 1)[:, :channels]; for part in x.split(height): the floor of amax, "
            "/ 448, 2 ** ceil(log2), the division, the cast",
        ),
        section="chapter 06, sections 2.5 and 2.6: tiles, and which way they run",
        points=2, outputs=("q", "the scales"),
    ),
    Function(
        "6.3", "promoted_sum", promoted_sum, sum_examples,
        variants(known.promoted, {
            "the accumulator rounds to nearest instead of cutting off": {"cut": known.round_to},
            "the accumulator keeps all bits": {"cut": known.keep_all_bits, "cut_product": False},
            "the accumulator is not cleared after a promotion": {"clear": False},
            "the products are cut off before the addition, the sum is not": {"cut_product": True, "cut": truncate},
        }) | {
            "only the last sum of each tile is cut off, not every addition": known.promoted_cut_once_per_tile,
            "the products are multiplied by the scales first, and the accumulator is never promoted":
                known.promoted_never,
        },
        hints=(
            "there are two sums, one within a tile and one over tiles; which of them is cut off, and when?",
            "loop over tiles and, inside, over a tile's products: accumulator = truncate(accumulator + product, bits)",
        ),
        section="chapter 06, section 2.7: accumulation precision",
        points=2,
    ),
    Function(
        "6.4", "expert_gradients", expert_gradients, gradient_examples,
        variants(known.expert_gradients, known.GRADIENT_MISTAKES),
        hints=(
            "which dimension is the contraction, and which tokens may share a scale in it?",
            "split x and grad by expert first, then round each part in tiles of (height, 1), then part_of_grad.T @ "
            "part_of_x; an expert without tokens has a gradient of zeros",
        ),
        section="chapter 06, sections 2.6 and 3.2: tiles run along the contraction dimension, the ten lines",
        points=2,
    ),
    SpotTheBug(
        "6.5", "test_round_trip", round_trip,
        (
            Bug("x / scale is rounded to integers", round_trip_of_integers, "try small values beside a large one"),
            Bug("the scale is inverted", round_trip_inverted, "should the result not be close to x?"),
            Bug("one scale for the whole tensor", round_trip_per_tensor, "add an outlier: what of the other tiles?"),
            Bug("tiles run along the other axis", round_trip_along_rows, "which values may an outlier change?"),
            Bug("a tile of zeros has no scale", round_trip_without_floor, "what can go wrong with zeros?"),
        ),
        hints=(
            "compare the result with x in three situations: ordinary values, one very large value, only zeros",
            "E4M3 errs by at most 1/16 of a value: demand that of all values outside the tile of one huge outlier, "
            "and zeros for zeros",
        ),
        section="chapter 06, sections 2.2 to 2.6 and section 7",
    ),
    Experiment(
        "6.6", "mean_weight", "mean of the weights after 1,000 updates", 1.95, 2.05,
        hints=(
            "a value that lies 30 % of the way from one grid value to the next becomes the upper one in 30 % of cases",
            "the step between 2^k and 2^(k+1) is 2^k / 8: step = 2 ** floor(log2(x)) / 8, below = floor(x / step) * "
            "step; go up where a uniform random value is smaller than (x - below) / step",
        ),
        section="chapter 06, section 3.3: what stays in higher precision",
    ),
    OpenTask(
        "6.7", "log_format",
        (
            "the format has 8 bits in all: a sign, 127 levels on a uniform grid of log |x| and a code for zero",
            "each 1×128 tile has its own grid between its smallest and largest log |x|, with a limit on that range",
            "its error is compared with E4M3's and E5M2's on Gaussian values, and on tiles with outliers of 10 to 10^6",
            "it says where the format wins, where it loses, and what multiplying two such values would take",
        ),
        hints=(
            "neighbouring levels differ by a constant factor: what is that factor for a tile whose values span 10^3?",
            "quantise i = round((log |x| - low) / step) with step = (high - low) / 126, and limit low to "
            "high - 32 log 2, so that one tiny value does not stretch the grid",
        ),
        section="chapter 06, sections 2.1 and 4.3: formats, and the values of a real model",
    ),
]  # fmt: skip
