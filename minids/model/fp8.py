"""FP8 numbers: scaling by tile or block, and the matrix product as a Hopper tensor core computes it.

Notable choices:
- a scale is what a stored number is multiplied by to get its value back, as `weight_scale_inv` in released folders;
- rounding to 8 bits is torch's own cast to a float8 type;
- the tensor core is emulated on whole output tiles at once, and exactly: where it cuts a bit off, so does `gemm`, and
  nothing else is lost before the sums are promoted to float32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

AMAX_FLOOR = 1e-4  # a tile of zeros needs a scale too (FACTS.md section 5)


class Format(NamedTuple):
    """A number format: the type that holds it, and its largest finite value."""

    dtype: torch.dtype
    largest: float


FORMATS = {
    "e4m3": Format(torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
    "e5m2": Format(torch.float8_e5m2, torch.finfo(torch.float8_e5m2).max),
    # V3's 12 bits for what the output projection of attention reads. torch has no such type; float16 has the same
    # exponents and more fraction bits. The layout is not published; taken here as E5M2 with four more fraction bits.
    "e5m6": Format(torch.float16, (2 - 2**-6) * 2.0**15),
}

Tile = tuple[int | None, int | None]  # rows and columns that share a scale; None: all of them
Quantized = tuple[Float[Tensor, "... _ _"], Float32[Tensor, "... _ _"]]  # the numbers, and a scale per tile


@torch.no_grad()
def quantize(
    x: Float[Tensor, "... rows cols"], tile: Tile = (1, 128), *, format: str = "e4m3", power_of_two: bool = False
) -> Quantized:
    """Divide each tile of `x` by its scale and round: (q, scale) with x close to q * scale (V3 section 3.3.2).

    V3's tiles are (1, 128) for activations, (128, 1) for the same in the weight-gradient product, (128, 128) for
    weights; (None, None) is a scale per tensor, (1, None) one per row. Edge tiles may be smaller. The scale is
    max|x| / largest value of the format, with 1e-4 as the least max|x|, and with `power_of_two` rounded up to a power
    of two (ue8m0; FACTS.md section 5). All arithmetic is in float32.

    A NaN stays one and does not touch its tile's scale. No gradient passes. Raises `ValueError` for an infinity, which
    has no scale.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be one of {', '.join(FORMATS)}")
    tiles = _tiled(x.float(), tile)
    amax = tiles.abs().nan_to_num_(nan=0.0, posinf=math.inf).amax((-3, -1))
    if amax.isinf().any():
        raise ValueError("x holds an infinity (or overflows float32): it has no scale")
    dtype, largest = FORMATS[format]
    scale = amax.clamp_min(AMAX_FLOOR) / largest
    if power_of_two:
        scale = _round_up_to_power_of_two(scale)
    scaled = tiles / rearrange(scale, "... R C -> ... R 1 C 1")
    if format == "e5m6":
        scaled = _round_to_e5m6(scaled)
    return _untiled(scaled.to(dtype), *x.shape[-2:]), scale


def dequantize(
    q: Float[Tensor, "... rows cols"], scale: Float[Tensor, "... row_tiles col_tiles"], tile: Tile = (1, 128)
) -> Float32[Tensor, "... rows cols"]:
    """Multiply each tile by its scale, in float32. Raises `ValueError` where the scales do not fit `q` and `tile`."""
    tiles = _tiled(q.float(), tile)
    wanted = (*q.shape[:-2], tiles.shape[-4], tiles.shape[-2])
    if scale.shape != wanted:
        raise ValueError(f"scale has shape {tuple(scale.shape)}: tile={tile} of {tuple(q.shape)} needs {wanted}")
    return _untiled(tiles * rearrange(scale.float(), "... R C -> ... R 1 C 1"), *q.shape[-2:])


class Rounded(NamedTuple):
    """A matrix in FP8 with its scales and the tile that shares one: an operand of a layer's product."""

    q: Float[Tensor, "... rows cols"]
    scale: Float32[Tensor, "... row_tiles col_tiles"]
    tile: Tile

    @classmethod
    def of(cls, x: Float[Tensor, "... rows cols"], tile: Tile, **options) -> "Rounded":
        """`x` rounded as `quantize` does."""
        return cls(*quantize(x, tile, **options), tile)

    @property
    def mT(self) -> "Rounded":  # noqa: N802 - torch's name
        """The transpose, nothing rounded anew."""
        return Rounded(self.q.mT, self.scale.mT, self.tile[::-1])

    def values(self) -> Float32[Tensor, "... rows cols"]:
        """The numbers times their scales."""
        return dequantize(*self)


def _tiled(x: Shaped[Tensor, "... rows cols"], tile: Tile) -> Shaped[Tensor, "... R r C c"]:
    """`x` cut into tiles, with zeros to fill the last ones."""
    if any(size is not None and size < 1 for size in tile):
        raise ValueError(f"tile={tile}: each size must be at least 1, or None for all")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: tiles need rows and columns")
    rows, cols = (max(min(size or n, n), 1) for size, n in zip(tile, x.shape[-2:], strict=True))
    below, right = -x.shape[-2] % rows, -x.shape[-1] % cols
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    return rearrange(x, "... (R r) (C c) -> ... R r C c", r=rows, c=cols)


def _untiled(tiles: Shaped[Tensor, "... R r C c"], rows: int, cols: int) -> Shaped[Tensor, "... rows cols"]:
    return rearrange(tiles, "... R r C c -> ... (R r) (C c)")[..., :rows, :cols].contiguous()


def _round_up_to_power_of_two(x: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """2^ceil(log2 x) of positive normal numbers, without the rounding error of a logarithm.

    A carry out of the fraction bits raises the exponent by one, unless all of them are zero.
    """
    fraction = (1 << 23) - 1
    return ((x.view(torch.int32) + fraction) & ~fraction).view(torch.float32)


def _round_to_e5m6(x: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """The nearest number with 6 fraction bits and an exponent of at least -14; ties to even."""
    exponent = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent.clamp_min(-14) - 6)
    return (x / step).round() * step


# The tensor core ---------------------------------------------------------------------------------------------------

GROUP = 32  # products that a tensor core aligns and adds in one go
SMALLEST_PRODUCT = 2.0**-18  # of two E4M3 numbers, of which every product is a multiple
BUFFER = 2**18  # products in flight: few enough to stay in a core's cache


def gemm(
    a: Quantized, b: Quantized, promote_every: int | None = 128, accumulator_bits: int = 14
) -> Float32[Tensor, "m n"]:
    """a [m, k] times b [k, n], both (q, scale) in E4M3, as a Hopper tensor core multiplies (V3 sections 3.3.2, 3.5.2).

    The products of 32 neighbours along k are aligned to the largest of them: bits below 2^-f of its leading bit are
    cut off, f = accumulator_bits - 1. Their sum goes to a register that keeps `accumulator_bits` significant bits, the
    leading one included, and cuts off the rest (14: "FP22", FACTS.md section 5). Every `promote_every` = N_C products
    the register is multiplied by both scales, added to the result in float32 and cleared; with None only at the end.
    The published descriptions leave open that cutting off is toward zero and that the alignment is to the leading bit
    of the product itself; both are assumed here.

    The sizes of the tiles, 1, 128 or all, are read off the shapes of the scales; along k a tile must not end between
    two promotions. With g = promote_every / 32 the result lies within (32 + g) * 2^-f * (|a| @ |b|) of the exact
    product of the dequantised operands, plus float32's rounding of the promotions: 0.44 % at most as V3 does it.

    Raises `ValueError` where the operands or their scales do not fit, or k exceeds 2^17.
    """
    (a, a_scale), (b, b_scale) = a, b
    (m, k), n = a.shape, b.shape[-1]
    if b.shape != (k, n):
        raise ValueError(f"a has shape {tuple(a.shape)}, b has {tuple(b.shape)}: must be [m, k] and [k, n]")
    for name, operand in (("a", a), ("b", b)):
        if operand.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} is {operand.dtype}: must be torch.float8_e4m3fn")
    if promote_every is not None and (promote_every < 1 or promote_every % GROUP):
        raise ValueError(f"promote_every={promote_every}: must be a positive multiple of {GROUP}, or None")
    if not 2 <= accumulator_bits <= 24:
        raise ValueError(f"accumulator_bits={accumulator_bits}: must be between 2 and 24")
    if k > 2**17:
        raise ValueError(f"k={k}: sums are exact up to {2**17}")

    interval = promote_every or max(k, 1)
    a_scale = _scale_of_each(a_scale, "a_scale", (m, k), (1, interval))
    b_scale = _scale_of_each(b_scale, "b_scale", (k, n), (interval, 1))
    # float64 holds every sum of products exactly: multiples of 2^-18 below 2^35.
    a, b = a.T.double().contiguous(), b.double().contiguous()
    result = torch.zeros(m, n, device=a.device)
    height = max(BUFFER // (GROUP * max(n, 1)), 1)
    for top in range(0, m, height):
        rows = slice(top, top + height)
        for i, start in enumerate(range(0, k, interval)):
            register = _accumulate(a[start : start + interval, rows], b[start : start + interval], accumulator_bits)
            result[rows] += register.float() * a_scale[rows, i, None] * b_scale[i]
    return result


def _accumulate(a: Float[Tensor, "k m"], b: Float[Tensor, "k n"], bits: int) -> Float[Tensor, "m n"]:
    """The register after all k products, groups of 32 at a time."""
    register = a.new_zeros(a.shape[1], b.shape[1])
    for a_group, b_group in zip(a.split(GROUP), b.split(GROUP), strict=True):
        products = a_group[:, :, None] * b_group[:, None, :]
        leading_bit = _truncate(products.abs().amax(0).clamp_min_(SMALLEST_PRODUCT), 1)
        unit = leading_bit * 2.0 ** (1 - bits)
        total = products.div_(unit).trunc_().sum(0).mul_(unit)
        register = _truncate(register.add_(total), bits)
    return register


def _truncate(x: Float[Tensor, "..."], bits: int) -> Float[Tensor, "..."]:
    """The `bits` leading significant bits of each float64; the others, the low ones of its 53, are cleared."""
    return (x.view(torch.int64) & (-1 << (53 - bits))).view(torch.float64)


def _scale_of_each(
    scale: Float[Tensor, "row_tiles col_tiles"], name: str, sizes: tuple[int, int], intervals: tuple[int, int]
) -> Float[Tensor, "rows cols"]:
    """The scale at the beginning of every interval of rows and columns, whatever tiles the scales belong to."""
    for dim, (size, interval) in enumerate(zip(sizes, intervals, strict=True)):
        count = scale.shape[dim]
        width = {size: 1, math.ceil(size / 128): 128, 1: size}.get(count)
        if width is None or width < size and width % interval:
            raise ValueError(
                f"{name} has {count} scales along {size} elements: a tile must span 1, 128 or all of them, "
                f"and a multiple of the {interval} between promotions"
            )
        scale = scale.index_select(dim, torch.arange(0, size, interval, device=scale.device) // max(width, 1))
    return scale
