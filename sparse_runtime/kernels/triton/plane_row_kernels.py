"""The kernels over rows in planes in Triton: a linear layer, and the rows' values; ``plane_ffn.py``
launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_runtime.kernels.triton.plane_codes import _codes, _lanes, _quad_scales, _wide
from sparse_runtime.kernels.triton.plane_kernels import _sums


@triton.jit
def plane_linear_kernel(
    x, records, bias, y, n, num_rows,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, BIASED: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_R: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a linear layer. Grid (rows / BLOCK_R,)."""
    GROUPS: tl.constexpr = (H + 63) // 64
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, TOKENS)
    record = records + r.to(tl.int64) * ((8 * (BASE + RESIDUAL) + 2) * GROUPS)
    sums = _sums(
        x, record, record + 8 * BASE * GROUPS, record + 8 * (BASE + RESIDUAL) * GROUPS,
        r < num_rows, n, H, BASE, RESIDUAL, TOKENS, CODES, PRECISION,
    )  # fmt: skip
    if BIASED:
        sums += tl.load(bias + r, mask=r < num_rows, other=0).to(tl.float32)[None, :]
    place = y + t[:, None] * num_rows + r[None, :]
    mask = (t < n)[:, None] & (r < num_rows)[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _store_values(
    y, base, rest, scales, r, wanted, unit,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Write the values of one unit of rows r."""
    GROUPS: tl.constexpr = (H + 63) // 64
    codes = _codes(base, rest, wanted, unit, GROUPS, BASE, RESIDUAL, U, tl.float32)
    scale = _wide(_quad_scales(scales, wanted, unit, GROUPS)) * (1 / (1 << RESIDUAL))
    h, _, _, _, inside = _lanes(unit, GROUPS, U)
    for c in tl.static_range(4):
        mask = wanted[:, None] & (inside & (h + 16 * c < H))[None, :]
        place = y + r[:, None] * H + (h + 16 * c)[None, :]
        tl.store(place, (codes[c] * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit
def plane_values_kernel(
    base, rest, scales, y, num_rows, base_stride, rest_stride, scales_stride,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Values of rows [num_rows, H]; strides in bytes. Grid (rows / BLOCK_R, units)."""
    unit = tl.program_id(1)
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    WHOLE: tl.constexpr = (H + 63) // 64 // 4
    U: tl.constexpr = (H + 63) // 64 % 4
    base, rest, scales = base + r * base_stride, rest + r * rest_stride, scales + r * scales_stride
    if unit < WHOLE:
        _store_values(y, base, rest, scales, r, r < num_rows, unit, H, BASE, RESIDUAL, 4)
    elif U > 0:
        _store_values(y, base, rest, scales, r, r < num_rows, unit, H, BASE, RESIDUAL, U)
