"""Codes and scales of rows in planes, as the Triton kernels read them.

The layout is that of ``kernels/planes.py``. A unit's bytes are taken as 64 *lanes*: lane
16·q + 4·g + b holds elements 4·q + b, and 16, 32, 48 further, of group g, one of each code vector. In a
whole unit lanes are bytes in their order, so that a thread loads 16 at a time; the last unit of a row,
if it has fewer groups, goes through the same code with other addresses and idle lanes. Four lanes side
by side, a *quad*, share a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _signed(code, BITS: tl.constexpr, CODES: tl.constexpr):
    """Stored codes as numbers: an addition, where a conversion would run at a quarter of its rate.

    They become the last digits of a number whose last digit is one: 2**23, 2**10 or 2**7.
    """
    if CODES == tl.float32:  # noqa: SIM300 (CODES is an argument)
        ones = (code | 0x4B000000).to(tl.float32, bitcast=True)
        signed = ones - (8388608.0 + (1 << (BITS - 1)))
    elif CODES == tl.float16:  # noqa: SIM300
        ones = (code | 0x6400).to(tl.float16, bitcast=True)
        signed = ones - tl.full([1, 1], 1024.0 + (1 << (BITS - 1)), tl.float16)
    else:
        ones = (code | 0x4300).to(tl.bfloat16, bitcast=True)
        signed = ones - tl.full([1, 1], 128.0 + (1 << (BITS - 1)), tl.bfloat16)
    return signed


@triton.jit
def _lanes(unit, GROUPS: tl.constexpr, U: tl.constexpr):
    """Of the lanes of a unit with U groups: first element, place, whether they exist.

    The place is that of a byte in a chunk of 16·U; then follow the one in a chunk of 8·U, and the shift
    of the half byte there.
    """
    lane = tl.arange(0, 64)
    q, g, b = lane // 16, lane // 4 % 4, lane % 4
    if U == 4:
        place, half = lane, lane % 32
        inside = tl.full([64], 1, tl.int1)
    else:
        place, half = (q * U + g) * 4 + b, (q % 2 * U + g) * 4 + b
        inside = g < U
    return unit * 256 + g * 64 + q * 4 + b, place, half, q // 2 * 4, inside


@triton.jit
def _plane_codes(
    plane, wanted, unit,
    GROUPS: tl.constexpr, BITS: tl.constexpr, U: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Codes of one unit of rows' planes as CODES: four times [ROWS, lanes]."""
    INTEGER: tl.constexpr = tl.int32 if CODES == tl.float32 else tl.int16  # noqa: SIM300
    _, place, half, shift, inside = _lanes(unit, GROUPS, U)
    mask = wanted[:, None] & inside[None, :]
    start = unit * (32 * BITS)
    low = tl.load(plane[:, None] + (start + place)[None, :], mask=mask, other=0).to(INTEGER)
    if BITS == 2:
        v0, v1, v2, v3 = low & 3, (low >> 2) & 3, (low >> 4) & 3, low >> 6
    elif BITS == 3:
        rest = plane[:, None] + (start + 16 * U + half)[None, :]
        high = tl.load(rest, mask=mask, other=0).to(INTEGER) >> shift[None, :].to(INTEGER)
        v0, v1, v2, v3 = low & 7, (low >> 3) & 7, high & 7, (low >> 6) | ((high >> 1) & 4)
    else:
        rest = plane[:, None] + (start + 16 * U + place)[None, :]
        high = tl.load(rest, mask=mask, other=0).to(INTEGER)
        v0, v1, v2, v3 = low & 15, low >> 4, high & 15, high >> 4
    v0, v1 = _signed(v0, BITS, CODES), _signed(v1, BITS, CODES)
    v2, v3 = _signed(v2, BITS, CODES), _signed(v3, BITS, CODES)
    return v0, v1, v2, v3


@triton.jit
def _codes(
    base, rest, wanted, unit,
    GROUPS: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, U: tl.constexpr,
    CODES: tl.constexpr,
):  # fmt: skip
    """Codes by base, by residual (in steps of it), or by both; no bits: that one is not read.

    All of them are whole numbers up to 128, which are exact in any dtype.
    """
    if RESIDUAL == 0:
        codes = _plane_codes(base, wanted, unit, GROUPS, BASE, U, CODES)
    elif BASE == 0:
        codes = _plane_codes(rest, wanted, unit, GROUPS, RESIDUAL, U, CODES)
    else:
        steps = tl.full([1, 1], 1 << RESIDUAL, CODES)
        b0, b1, b2, b3 = _plane_codes(base, wanted, unit, GROUPS, BASE, U, CODES)
        r0, r1, r2, r3 = _plane_codes(rest, wanted, unit, GROUPS, RESIDUAL, U, CODES)
        codes = b0 * steps + r0, b1 * steps + r1, b2 * steps + r2, b3 * steps + r3
    return codes


@triton.jit
def _scales(scales, wanted, group, exists):
    """Scales of rows' groups [ROWS, groups]; pointers are to bytes."""
    places = scales.to(tl.pointer_type(tl.uint16))[:, None] + group[None, :]
    bits = tl.load(places, mask=wanted[:, None] & exists[None, :], other=0).to(tl.uint32) << 16
    return bits.to(tl.float32, bitcast=True)  # of bfloat16


@triton.jit
def _quad_scales(scales, wanted, unit, GROUPS: tl.constexpr):
    """Scales of a unit's quads [ROWS, 16]."""
    group = unit * 4 + tl.arange(0, 16) % 4
    return _scales(scales, wanted, group, group < GROUPS)


@triton.jit
def _wide(quads):
    """Every column four times: [ROWS, quads] -> [ROWS, lanes]."""
    rows: tl.constexpr = quads.shape[0]
    columns: tl.constexpr = quads.shape[1]
    fours = tl.broadcast_to(quads[:, :, None], [rows, columns, 4])
    return tl.reshape(fours, [rows, columns * 4])
