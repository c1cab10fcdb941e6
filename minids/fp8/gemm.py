"""FP8 matrix product with the accumulation of a Hopper tensor core, emulated on a CPU.

Notable choice: the emulation truncates exactly the bits that the tensor core truncates; all other arithmetic is exact
until partial sums are promoted to FP32.
"""

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from minids.fp8.formats import Quantized

GROUP = 32  # products that a tensor core aligns and adds at once
SMALLEST_PRODUCT = 2.0**-18  # smallest product of two E4M3 values; every product is a multiple of it
BUFFER = 2**18  # products computed at a time: they must fit the cache of a CPU core


def gemm(
    a: Quantized, b: Quantized, promote_every: int | None = 128, accumulator_bits: int = 14
) -> Float32[Tensor, "m n"]:
    """Multiply a [m, k] by b [k, n], both (q, scale) in E4M3, as a Hopper tensor core does (V3 sections 3.3.2, 3.5.2).

    The products of 32 neighbours along k are aligned to the largest of them: bits below 2^-f of its leading bit are
    truncated, f = accumulator_bits - 1. Their sum is added to an accumulator that keeps `accumulator_bits` significant
    bits, with the leading one, and truncates the rest (14: "FP22", FACTS.md section 5). Every `promote_every` = N_C
    products the accumulator is promoted: multiplied by both scales, added to the FP32 result, and cleared; with None
    only at the end. The published descriptions do not specify the direction of truncation, nor the bit to which
    products are aligned; assumed here: toward zero, and the leading bit of the product itself.

    Tile sizes (1, 128 or the whole dimension) follow from the shapes of the scales; along k a tile must not end between
    two promotions. With g = promote_every / 32 the error is at most (32 + g) * 2^-f * (|a| @ |b|) of the exact product
    of the dequantised operands, plus FP32's rounding errors of the promotions: 0.44 % at most with V3's settings.

    Raises `ValueError` if the operands or their scales do not match, or k exceeds 2^17.
    """
    (a_q, a_scale), (b_q, b_scale) = a, b
    (m, k), n = a_q.shape, b_q.shape[-1]
    if b_q.shape != (k, n):
        raise ValueError(f"a has shape {tuple(a_q.shape)}, b has {tuple(b_q.shape)}: must be [m, k] and [k, n]")
    for name, operand in (("a", a_q), ("b", b_q)):
        if operand.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} is {operand.dtype}: must be torch.float8_e4m3fn")
    if promote_every is not None and (promote_every < 1 or promote_every % GROUP):
        raise ValueError(f"promote_every={promote_every}: must be a positive multiple of {GROUP}, or None")
    if not 2 <= accumulator_bits <= 24:
        raise ValueError(f"accumulator_bits={accumulator_bits}: must be between 2 and 24")
    if k > 2**17:
        raise ValueError(f"k={k}: must be at most {2**17}, for exact sums")

    interval = promote_every or max(k, 1)
    a_scale = _scale_of_each(a_scale, "a_scale", (m, k), (1, interval))
    b_scale = _scale_of_each(b_scale, "b_scale", (k, n), (interval, 1))
    # float64 represents every sum of products exactly: multiples of 2^-18 below 2^35.
    a_exact, b_exact = a_q.T.double().contiguous(), b_q.double().contiguous()
    result = torch.zeros(m, n, device=a_q.device)
    height = max(BUFFER // (GROUP * max(n, 1)), 1)
    for top in range(0, m, height):
        rows = slice(top, top + height)
        for i, start in enumerate(range(0, k, interval)):
            part = slice(start, start + interval)
            accumulator = _accumulate(a_exact[part, rows], b_exact[part], accumulator_bits)
            result[rows] += accumulator.float() * a_scale[rows, i, None] * b_scale[i]
    return result


def _accumulate(a: Float[Tensor, "k m"], b: Float[Tensor, "k n"], bits: int) -> Float[Tensor, "m n"]:
    """Compute the accumulator after all k products, in groups of 32."""
    accumulator = a.new_zeros(a.shape[1], b.shape[1])
    for a_group, b_group in zip(a.split(GROUP), b.split(GROUP), strict=True):
        products = a_group[:, :, None] * b_group[:, None, :]
        leading_bit = _truncate(products.abs().amax(0).clamp_min_(SMALLEST_PRODUCT), 1)
        unit = leading_bit * 2.0 ** (1 - bits)
        total = products.div_(unit).trunc_().sum(0).mul_(unit)
        accumulator = _truncate(accumulator.add_(total), bits)
    return accumulator


def _truncate(x: Float[Tensor, "..."], bits: int) -> Float[Tensor, "..."]:
    """Keep the `bits` leading significant bits of each float64 and clear the others of its 53."""
    return (x.view(torch.int64) & (-1 << (53 - bits))).view(torch.float64)


def _scale_of_each(
    scale: Float[Tensor, "row_tiles col_tiles"], name: str, sizes: tuple[int, int], intervals: tuple[int, int]
) -> Float[Tensor, "rows cols"]:
    """Select the scale at the start of every interval of rows and columns, for any of the tile sizes."""
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
