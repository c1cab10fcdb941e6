"""FP8 matrix products on a GPU's tensor cores: on Hopper with PyTorch's scaled matmul (cuBLAS), else with Triton.

Notable choices:
- cuBLAS supports V3's three products: tiles of 128 along k times blocks of 128 by 128, or times tiles of 128;
- it supports them on Hopper only; other GPUs with FP8 use the Triton kernel of `fp8.triton`;
- it needs sizes that are multiples of 16 and column-major scales; the edges are padded with zeros;
- experts are multiplied one after the other, because cuBLAS has no grouped product with such scales.
"""

from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int, Shaped
from torch import Tensor

from minids.fp8.formats import Rounded, Tile

RECIPES: dict[Tile, F.ScalingType] = {
    (128, 128): F.ScalingType.BlockWise128x128,
    (128, 1): F.ScalingType.BlockWise1x128,
}
HAS_TRITON = find_spec("triton") is not None  # a dependency of PyTorch's CUDA builds for Linux


def kernel(device: torch.device) -> Literal["scaled_mm", "Triton"] | None:
    """Choose the FP8 kernel of a device by compute capability: 9 scaled_mm, 8.9 and from 10 on Triton, else None."""
    if device.type != "cuda" or torch.version.hip:  # the device type of AMD GPUs is cuda too
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability[0] == 9:
        return "scaled_mm"
    return "Triton" if capability >= (8, 9) and HAS_TRITON else None


def multiply(a: Rounded, b: Rounded) -> Float32[Tensor, "m n"]:
    """Multiply a [m, k] by b [k, n] in E4M3, with promotion to FP32 along k (V3 section 3.3.2)."""
    (m, k), n = a.q.shape, b.q.shape[1]
    if 0 in (m, k, n):
        return torch.zeros(m, n, device=a.q.device)
    if kernel(a.q.device) == "Triton":
        from minids.fp8 import triton as fp8_triton  # Triton is not available on every platform

        return fp8_triton.multiply(a, b)
    a_scale = F.pad(a.scale, (0, 0, 0, -m % 16), value=1.0)
    if b.tile == (128, 128):
        b_scale = F.pad(b.scale, (0, 0, 0, -len(b.scale) % 4), value=1.0)
    else:
        b_scale = F.pad(b.scale, (0, -n % 16), value=1.0).mT
    out = F.scaled_mm(
        _filled(a.q, 16, 128).contiguous(),
        _in_columns(_filled(b.q, 128, 16)),
        _in_columns(a_scale),
        F.ScalingType.BlockWise1x128,
        _in_columns(b_scale),
        RECIPES[b.tile],
        output_dtype=torch.float32,
    )
    return out[:m, :n]


def multiply_grouped(a: Rounded, b: Rounded, tokens_per_expert: Int[Tensor, "experts"]) -> Float32[Tensor, "..."]:
    """Multiply per expert, as `F.grouped_mm`: a [rows, k] by b [experts, k, n]; or a [m, rows] by b [rows, n].

    In the second form rows are the contraction dimension, and each expert's rows must fill whole tiles.
    """
    rows = tokens_per_expert.tolist()
    if b.q.ndim == 3:
        parts = zip(a.q.split(rows), a.scale.split(rows), b.q, b.scale, strict=True)
    else:
        tiles = [count // 128 for count in rows]
        parts = zip(a.q.split(rows, 1), a.scale.split(tiles, 1), b.q.split(rows), b.scale.split(tiles), strict=True)
    products = [multiply(Rounded(*part[:2], a.tile), Rounded(*part[2:], b.tile)) for part in parts]
    return torch.cat(products) if b.q.ndim == 3 else torch.stack(products)


def _filled(q: Shaped[Tensor, "rows cols"], rows: int, cols: int) -> Shaped[Tensor, "_ _"]:
    """Pad with zeros to multiples of `rows` and `cols`; as bytes, since float8 does not support padding."""
    below, right = -q.shape[0] % rows, -q.shape[1] % cols
    return F.pad(q.view(torch.uint8), (0, right, 0, below)).view(q.dtype) if below or right else q


def _in_columns(x: Shaped[Tensor, "rows cols"]) -> Shaped[Tensor, "rows cols"]:
    """Convert to column-major memory layout."""
    return x.mT.contiguous().mT
