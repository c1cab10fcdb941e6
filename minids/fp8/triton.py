"""FP8 matrix product with V3's promotion to FP32, as one Triton kernel (FACTS.md section 5).

Notable choices:
- a program computes one tile of the output: for every 128 elements along k, a product on the tensor core, which is
  multiplied by both scales and added in FP32; 128 is both N_C and the tile width of a scale;
- the kernel supports any strides and masks the edges: operands are not copied, transposed or padded.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32

from minids.fp8.formats import Rounded

ROWS, COLS = 128, 64  # of the output, per program


@triton.jit
@no_type_check  # a wrapper for type checks would hide the source from Triton
def _promoted(
    a, a_scale, b, b_scale, out, m, n, k,
    a_row, a_col, a_scale_row, a_scale_col, b_row, b_col, b_scale_row, b_scale_col,
    columns_per_scale: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    col = tl.program_id(1).to(tl.int64) * cols + tl.arange(0, cols)
    along = tl.arange(0, 128)
    a += row[:, None] * a_row + along[None, :] * a_col
    b += along[:, None] * b_row + col[None, :] * b_col
    a_scale += row * a_scale_row
    b_scale += col // columns_per_scale * b_scale_col
    total = tl.zeros((rows, cols), tl.float32)
    for start in range(0, k, 128):
        inside = along < k - start
        a_tile = tl.load(a, (row < m)[:, None] & inside[None, :], other=0.0)
        b_tile = tl.load(b, inside[:, None] & (col < n)[None, :], other=0.0)
        accumulator = tl.dot(a_tile, b_tile)
        a_factor = tl.load(a_scale, row < m, other=0.0)
        b_factor = tl.load(b_scale, col < n, other=0.0)
        total += accumulator * a_factor[:, None] * b_factor[None, :]
        a += 128 * a_col
        b += 128 * b_row
        a_scale += a_scale_col
        b_scale += b_scale_row
    tl.store(out + row[:, None] * n + col[None, :], total, (row < m)[:, None] & (col < n)[None, :])


def multiply(a: Rounded, b: Rounded) -> Float32[torch.Tensor, "m n"]:
    """Multiply a [m, k] by b [k, n], all sizes above 0: tiles (1, 128) by blocks (128, 128) or tiles (128, 1)."""
    (m, k), n = a.q.shape, b.q.shape[1]
    out = torch.empty(m, n, dtype=torch.float32, device=a.q.device)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _promoted[triton.cdiv(m, ROWS), triton.cdiv(n, COLS)](
            a.q, a.scale, b.q, b.scale, out, m, n, k,
            *a.q.stride(), *a.scale.stride(), *b.q.stride(), *b.scale.stride(),
            columns_per_scale=b.tile[1], rows=ROWS, cols=COLS,
        )  # fmt: skip
    return out
