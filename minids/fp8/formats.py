"""FP8 formats: values are stored in 8 bits, with one scale per tile or block.

Notable choices:
- a scale is the factor that a stored value is multiplied by to dequantise it, as `weight_scale_inv` in releases;
- rounding to 8 bits is torch's cast to a float8 type.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

AMAX_FLOOR = 1e-4  # lower bound of a tile's amax, for tiles of zeros (FACTS.md section 5)


class Format(NamedTuple):
    """A number format: the dtype that stores it, and its largest finite value."""

    dtype: torch.dtype
    largest: float


FORMATS = {
    "e4m3": Format(torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
    "e5m2": Format(torch.float8_e5m2, torch.finfo(torch.float8_e5m2).max),
    # V3's 12-bit format for the input of attention's output projection. torch has no such dtype; float16 has the same
    # exponents and more fraction bits. The layout is not published; assumed here: E5M2 with four more fraction bits.
    "e5m6": Format(torch.float16, (2 - 2**-6) * 2.0**15),
}

Tile = tuple[int | None, int | None]  # rows and columns that share a scale; None: all
Quantized = tuple[Float[Tensor, "... _ _"], Float32[Tensor, "... _ _"]]  # values, and a scale per tile


@torch.no_grad()
def quantize(
    x: Float[Tensor, "... rows cols"], tile: Tile = (1, 128), *, format: str = "e4m3", power_of_two: bool = False
) -> Quantized:
    """Divide each tile of `x` by its scale and round: (q, scale) with x close to q * scale (V3 section 3.3.2).

    V3's tiles are (1, 128) for activations, (128, 1) for activations in the weight-gradient product, (128, 128) for
    weights; (None, None) is one scale per tensor, (1, None) one per row. Tiles at the edges may be smaller.
    The scale is max|x| / largest value of the format, with max|x| at least 1e-4; with `power_of_two` it is rounded up
    to a power of two (ue8m0; FACTS.md section 5). All arithmetic is in float32.

    NaNs stay NaN and do not affect the scale of their tile. There is no gradient. Raises `ValueError` for an unknown
    format, an impossible tile, and infinities.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be one of {', '.join(FORMATS)}")
    tiles = _tiled(x.float(), tile)
    amax = tiles.abs().nan_to_num_(nan=0.0, posinf=math.inf).amax((-3, -1))
    if amax.isinf().any():
        raise ValueError("x holds an infinity (or overflows float32): every value must be finite or NaN")
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
    """Multiply each tile by its scale, in float32. Raises `ValueError` if the scales do not match `q` and `tile`."""
    tiles = _tiled(q.float(), tile)
    wanted = (*q.shape[:-2], tiles.shape[-4], tiles.shape[-2])
    if scale.shape != wanted:
        raise ValueError(f"scale has shape {tuple(scale.shape)}: tile={tile} of {tuple(q.shape)} needs {wanted}")
    return _untiled(tiles * rearrange(scale.float(), "... R C -> ... R 1 C 1"), *q.shape[-2:])


class Rounded(NamedTuple):
    """A quantised matrix: FP8 values, scales, and the tile size; an operand of a layer's matrix product."""

    q: Float[Tensor, "... rows cols"]
    scale: Float32[Tensor, "... row_tiles col_tiles"]
    tile: Tile

    @classmethod
    def of(
        cls, x: Float[Tensor, "... rows cols"], tile: Tile, *, format: str = "e4m3", power_of_two: bool = False
    ) -> "Rounded":
        """Quantise `x` with `quantize`."""
        return cls(*quantize(x, tile, format=format, power_of_two=power_of_two), tile)

    @property
    def mT(self) -> "Rounded":  # noqa: N802 - torch's name
        """Transpose without rounding again."""
        return Rounded(self.q.mT, self.scale.mT, self.tile[::-1])

    def values(self) -> Float32[Tensor, "... rows cols"]:
        """Dequantise."""
        return dequantize(*self)


def _tiled(x: Shaped[Tensor, "... rows cols"], tile: Tile) -> Shaped[Tensor, "... R r C c"]:
    """Split `x` into tiles; the last ones are padded with zeros."""
    if any(size is not None and size < 1 for size in tile):
        raise ValueError(f"tile={tile}: each size must be at least 1, or None for the whole dimension")
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
    """Compute 2^ceil(log2 x) of positive normal numbers, without the rounding error of a logarithm.

    The addition carries into the exponent unless all fraction bits are zero.
    """
    fraction = (1 << 23) - 1
    return ((x.view(torch.int32) + fraction) & ~fraction).view(torch.float32)


def _round_to_e5m6(x: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """Round to the nearest value with 6 fraction bits and an exponent of at least -14; ties to even."""
    exponent = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent.clamp_min(-14) - 6)
    return (x / step).round() * step
