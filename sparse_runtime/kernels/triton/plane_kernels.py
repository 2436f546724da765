"""The kernels over neurons in planes in Triton; ``plane_ffn.py`` launches them.

Order and place of sums are as in ``kernels.py``. H is a constant for the compiler, as the alignment
of records follows from it: unknown, they would be loaded byte by byte. Sums are in float32; tf32 loses
nothing of tokens of 16 bits, nor of a scale times a code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_runtime.kernels.triton.kernels import (
    _activation_of,
    _finish,
    _in_set,
    _is_last,
    _write_list,
)
from sparse_runtime.kernels.triton.plane_codes import (
    _codes,
    _lanes,
    _plane_codes,
    _quad_scales,
    _scales,
    _wide,
)

#: So many tokens have products of bare codes; of more, weights are unpacked once for all of them.
FEW = tl.constexpr(8)


@triton.jit
def _group_dots(
    sums, x, base, rest, scales, wanted, n, unit,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, CODES: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """Add the products of one unit of rows with few tokens: sums are [ROWS, columns].

    Columns are a token's four groups, then the next token's: of a token's values those of other groups
    are zero there, so that matrix units, which always take several columns, multiply bare codes, and a
    scale is applied once for its whole group.
    """
    GROUPS: tl.constexpr = (H + 63) // 64
    h, _, _, _, inside = _lanes(unit, GROUPS, U)
    column = tl.arange(0, sums.shape[1])
    token, group = column // 4, unit * 4 + column % 4
    own = (tl.arange(0, 64) // 4 % 4)[:, None] == (column % 4)[None, :]
    own = own & (token < n)[None, :] & inside[:, None]
    codes = _codes(base, rest, wanted, unit, GROUPS, BASE, RESIDUAL, U, CODES)
    products = tl.zeros(sums.shape, tl.float32)
    for c in tl.static_range(4):
        # Without a bound where there need be none, the compiler sees that values lie side by side.
        mask = own if H % 64 == 0 else own & (h + 16 * c < H)[:, None]
        values = tl.load(x + token[None, :] * H + (h + 16 * c)[:, None], mask=mask, other=0)
        products = tl.dot(codes[c], values.to(CODES), products, input_precision="ieee")
    return sums + products * _scales(scales, wanted, group, group < GROUPS)


@triton.jit
def _unit_dots(
    sums, x, base, rest, scales, wanted, n, unit,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Add the products of one unit of rows with several tokens."""
    GROUPS: tl.constexpr = (H + 63) // 64
    h, _, _, _, inside = _lanes(unit, GROUPS, U)
    t = tl.arange(0, TOKENS)
    tokens = x + t[:, None] * H
    scale = _wide(_quad_scales(scales, wanted, unit, GROUPS))
    codes = _codes(base, rest, wanted, unit, GROUPS, BASE, RESIDUAL, U, tl.float32)
    for c in tl.static_range(4):
        mask = (t < n)[:, None] & (inside & (h + 16 * c < H))[None, :]
        values = tl.load(tokens + (h + 16 * c)[None, :], mask=mask, other=0).to(tl.float32)
        sums = tl.dot(values, tl.trans(codes[c] * scale), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _sums(
    x, base, rest, scales, wanted, n,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, TOKENS: tl.constexpr,
    CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products [TOKENS, ROWS] of rows with tokens, by base codes, residual codes or both.

    Args are pointers [ROWS] to planes and scales; what is not wanted comes out as anything.
    """
    WHOLE: tl.constexpr = (H + 63) // 64 // 4
    U: tl.constexpr = (H + 63) // 64 % 4
    if TOKENS <= FEW:
        COLUMNS: tl.constexpr = 4 * TOKENS if TOKENS > 1 else 8
        parts = tl.zeros([wanted.shape[0], COLUMNS], tl.float32)
        for unit in range(WHOLE):
            parts = _group_dots(
                parts, x, base, rest, scales, wanted, n, unit, H, BASE, RESIDUAL, CODES, 4
            )
        if U > 0:
            parts = _group_dots(
                parts, x, base, rest, scales, wanted, n, WHOLE, H, BASE, RESIDUAL, CODES, U
            )
        if TOKENS == 1:
            sums = tl.sum(parts, 1)[None, :]
        else:
            sums = tl.trans(tl.sum(tl.reshape(parts, [wanted.shape[0], TOKENS, 4]), 2))
    else:
        sums = tl.zeros([TOKENS, wanted.shape[0]], tl.float32)
        for unit in range(WHOLE):
            sums = _unit_dots(
                sums, x, base, rest, scales, wanted, n, unit, H, BASE, RESIDUAL, TOKENS,
                PRECISION, 4,
            )  # fmt: skip
        if U > 0:
            sums = _unit_dots(
                sums, x, base, rest, scales, wanted, n, WHOLE, H, BASE, RESIDUAL, TOKENS,
                PRECISION, U,
            )  # fmt: skip
    return sums * (1 / (1 << RESIDUAL))


@triton.jit
def _gate_up(
    x, look, refine, first, wanted, n,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, READ_BASE: tl.constexpr,
    READ_RESIDUAL: tl.constexpr, TOKENS: tl.constexpr, CODES: tl.constexpr,
    PRECISION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Gate's and up's products, each [TOKENS, BLOCK_I]: their rows are read as one matrix in turns.

    Without a gate both are those of the one matrix.
    """
    GROUPS: tl.constexpr = (H + 63) // 64
    BLOCK_I: tl.constexpr = wanted.shape[0]
    if GATED:
        r = tl.arange(0, 2 * BLOCK_I)
        i, which = (first + r // 2).to(tl.int64), r % 2
        both = tl.broadcast_to(wanted.to(tl.int32)[:, None], [BLOCK_I, 2])
        record = look + i * ((16 * BASE + 4) * GROUPS)
        sums = _sums(
            x, record + which * (8 * BASE * GROUPS),
            refine + i * (24 * RESIDUAL * GROUPS) + which * (8 * RESIDUAL * GROUPS),
            record + 16 * BASE * GROUPS + which * (2 * GROUPS),
            tl.reshape(both, [2 * BLOCK_I]) != 0, n,
            H, BASE if READ_BASE else 0, RESIDUAL if READ_RESIDUAL else 0, TOKENS, CODES, PRECISION,
        )  # fmt: skip
        products = tl.split(tl.reshape(sums, [TOKENS, BLOCK_I, 2]))
    else:
        i = (first + tl.arange(0, BLOCK_I)).to(tl.int64)
        record = look + i * ((8 * BASE + 2) * GROUPS)
        sums = _sums(
            x, record, refine + i * (16 * RESIDUAL * GROUPS), record + 8 * BASE * GROUPS, wanted, n,
            H, BASE if READ_BASE else 0, RESIDUAL if READ_RESIDUAL else 0, TOKENS, CODES, PRECISION,
        )  # fmt: skip
        products = sums, sums
    return products


@triton.jit
def _ramp(evidence, width, RAMP: tl.constexpr):
    """As in the reference; not above one: NaN is one."""
    if RAMP:
        share = (evidence - 1) / width
        share = tl.maximum(tl.where(share < 1, share, 1.0), 0.0)
    else:
        share = tl.full(evidence.shape, 1.0, tl.float32)
    return share


@triton.jit
def plane_gate_up_kernel(
    x, ids, sets, factors, cluster_weights, look, refine, gate_bias, up_bias, activations, finer_parts,
    rows, count, row_counts, counter, n, neurons, set_bytes, tau, width,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, GATE_BIASED: tl.constexpr, UP_BIASED: tl.constexpr,
    CLUSTERED: tl.constexpr, STAGED: tl.constexpr, WEIGHTED: tl.constexpr, RAMP: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_I: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Look at candidates, refine those that matter most. Grid (I / BLOCK_I,).

    Writes what each neuron's base values of down are multiplied by for each token [n, I], zero where it
    is skipped, and what the residual's values are [n, I]; lists one token's neurons that are not zero.
    """
    first = tl.program_id(0) * BLOCK_I
    i, t = first + tl.arange(0, BLOCK_I), tl.arange(0, TOKENS)
    exists = (t < n)[:, None] & (i < neurons)[None, :]
    mine = exists
    if CLUSTERED:
        bitmaps = sets + tl.load(ids + t, mask=t < n, other=0)[:, None] * set_bytes
        mine = _in_set(bitmaps, i[None, :], exists) & exists
    h = tl.zeros([TOKENS, BLOCK_I], tl.float32)
    finer = tl.zeros([TOKENS, BLOCK_I], tl.float32)
    looked = tl.max(mine.to(tl.int32), 0)
    if tl.max(looked, 0) > 0:
        gate, up = _gate_up(
            x, look, refine, first, looked != 0, n,
            H, BASE, RESIDUAL, True, not STAGED, TOKENS, CODES, PRECISION, GATED,
        )  # fmt: skip
        h = _activation_of(
            gate, up, i[None, :], (i < neurons)[None, :], gate_bias, up_bias,
            ACTIVATION, GATED, GATE_BIASED, UP_BIASED,
        )  # fmt: skip
        counted, refined = mine, mine
        if STAGED:
            factor = tl.load(factors + i, mask=i < neurons, other=0)[None, :]
            if WEIGHTED:
                own = tl.load(ids + t, mask=t < n, other=0)
                factor = factor * tl.load(cluster_weights + own)[:, None]
            evidence = tl.abs(h) * factor
            # Not "above": NaN is refined, not skipped.
            counted = mine & ((evidence <= 1) == 0)
            refined = counted & ((evidence <= tau) == 0)
            finer = tl.where(refined, _ramp(evidence / tau, width, RAMP), 0.0)
            needed = tl.max(refined.to(tl.int32), 0)
            if RESIDUAL > 0:  # noqa: SIM102 (as below)
                if tl.max(needed, 0) > 0:
                    more_gate, more_up = _gate_up(
                        x, look, refine, first, needed != 0, n,
                        H, BASE, RESIDUAL, False, True, TOKENS, CODES, PRECISION, GATED,
                    )  # fmt: skip
                    full = _activation_of(
                        gate + more_gate, up + more_up, i[None, :], (i < neurons)[None, :], gate_bias,
                        up_bias, ACTIVATION, GATED, GATE_BIASED, UP_BIASED,
                    )  # fmt: skip
                    h = tl.where(finer > 0, h + finer * (full - h), h)
            h *= _ramp(evidence, width, RAMP)
        else:
            finer = tl.full([TOKENS, BLOCK_I], 1.0, tl.float32)
        h = tl.where(counted, h, 0.0)
        finer = tl.where(refined, finer * h, 0.0)
        if CLUSTERED:
            tl.atomic_add(row_counts, tl.sum(tl.sum(counted.to(tl.int64), 1), 0))
            tl.atomic_add(row_counts + 1, tl.sum(tl.sum(mine.to(tl.int64), 1), 0))
            tl.atomic_add(row_counts + 2, tl.sum(tl.sum(refined.to(tl.int64), 1), 0))
    place = t[:, None] * neurons + i[None, :]
    tl.store(activations + place, h, mask=exists)
    if RESIDUAL > 0:
        tl.store(finer_parts + place, finer, mask=exists)
    # Not one condition: the counter is for calls that make a list.
    if CLUSTERED and TOKENS == 1:  # noqa: SIM102
        if _is_last(counter, tl.num_programs(0)):
            _write_list(activations, rows, count, neurons, False)


@triton.jit
def _add_outputs(
    s0, s1, s2, s3, h, plane, scale, wanted, unit,
    GROUPS: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Add what neurons' activations [TOKENS, ROWS] make of a plane of down's rows.

    Sums are [TOKENS, lanes], or [ROWS, lanes] for one token: rows are added up at the end.
    """
    c0, c1, c2, c3 = _plane_codes(plane, wanted, unit, GROUPS, BITS, U, tl.float32)
    if h.shape[0] == 1:
        weight = _wide(scale * tl.trans(h))
        s0, s1, s2, s3 = s0 + c0 * weight, s1 + c1 * weight, s2 + c2 * weight, s3 + c3 * weight
    else:
        weight = _wide(scale)
        s0 = tl.dot(h, c0 * weight, s0, input_precision=PRECISION)
        s1 = tl.dot(h, c1 * weight, s1, input_precision=PRECISION)
        s2 = tl.dot(h, c2 * weight, s2, input_precision=PRECISION)
        s3 = tl.dot(h, c3 * weight, s3, input_precision=PRECISION)
    return s0, s1, s2, s3


@triton.jit
def _down_unit(
    activations, finer_parts, count_records, refine, rows, begin, end, partial, n, neurons, unit,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    LISTED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Outputs of one unit from a part of the neurons."""
    GROUPS: tl.constexpr = (H + 63) // 64
    RESIDUAL_PLANE: tl.constexpr = 8 * RESIDUAL * GROUPS
    MATRICES: tl.constexpr = 2 if GATED else 1
    t = tl.arange(0, TOKENS)
    s0 = tl.zeros([BLOCK_R if TOKENS == 1 else TOKENS, 64], tl.float32)
    s1, s2, s3 = s0, s0, s0
    for start in tl.range(begin, end, BLOCK_R, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_R)
        row = tl.load(rows + j, mask=j < end, other=0) if LISTED else j
        place = t[:, None] * neurons + row[None, :]
        mask = (t < n)[:, None] & (j < end)[None, :]
        h = tl.load(activations + place, mask=mask, other=0)
        needed = tl.max((h != 0).to(tl.int32), 0) > 0
        record = count_records + row.to(tl.int64) * ((8 * BASE + 2) * GROUPS)
        scale = _quad_scales(record + 8 * BASE * GROUPS, needed, unit, GROUPS)
        s0, s1, s2, s3 = _add_outputs(
            s0, s1, s2, s3, h, record, scale, needed, unit, GROUPS, BASE, PRECISION, U
        )
        if RESIDUAL > 0:
            h = tl.load(finer_parts + place, mask=mask, other=0) * (1 / (1 << RESIDUAL))
            needed = tl.max((h != 0).to(tl.int32), 0) > 0
            plane = refine + (row.to(tl.int64) * (MATRICES + 1) + MATRICES) * RESIDUAL_PLANE
            s0, s1, s2, s3 = _add_outputs(
                s0, s1, s2, s3, h, plane, scale, needed, unit, GROUPS, RESIDUAL, PRECISION, U
            )
    if TOKENS == 1:
        s0, s1 = tl.sum(s0, 0)[None, :], tl.sum(s1, 0)[None, :]
        s2, s3 = tl.sum(s2, 0)[None, :], tl.sum(s3, 0)[None, :]
    h, _, _, _, inside = _lanes(unit, GROUPS, U)
    inside = (t < n)[:, None] & inside[None, :]
    h = h[None, :]
    place = partial + t[:, None] * H + h
    tl.store(place, s0, mask=inside & (h < H))
    tl.store(place + 16, s1, mask=inside & (h + 16 < H))
    tl.store(place + 32, s2, mask=inside & (h + 32 < H))
    tl.store(place + 48, s3, mask=inside & (h + 48 < H))


@triton.jit
def plane_down_kernel(
    activations, finer_parts, count_records, refine, rows, count, partial, y, ids, cluster_bias,
    projected, correction_up, counters, n, neurons, total,
    H: tl.constexpr, BASE: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    LISTED: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr, CORRECTION: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs. Grid (units, SPLITS): each split takes a part of one token's list, or of all neurons."""
    unit, split = tl.program_id(0), tl.program_id(1)
    WHOLE: tl.constexpr = (H + 63) // 64 // 4
    U: tl.constexpr = (H + 63) // 64 % 4
    num_rows = tl.load(count) if LISTED else neurons
    blocks = (num_rows + BLOCK_R - 1) // BLOCK_R
    share = (blocks + SPLITS - 1) // SPLITS * BLOCK_R
    begin, end = split * share, tl.minimum((split + 1) * share, num_rows)
    if unit < WHOLE:
        _down_unit(
            activations, finer_parts, count_records, refine, rows, begin, end,
            partial + split * n * H, n, neurons, unit,
            H, BASE, RESIDUAL, GATED, LISTED, TOKENS, BLOCK_R, STAGES, PRECISION, 4,
        )  # fmt: skip
    elif U > 0:
        _down_unit(
            activations, finer_parts, count_records, refine, rows, begin, end,
            partial + split * n * H, n, neurons, unit,
            H, BASE, RESIDUAL, GATED, LISTED, TOKENS, BLOCK_R, STAGES, PRECISION, U,
        )  # fmt: skip
    if _is_last(counters + unit, SPLITS):
        h = unit * 256 + tl.arange(0, 256)
        for token in range(n):
            _finish(
                y, token, total, partial + token * H, n * H, ids, cluster_bias, projected,
                correction_up, h, h < H, H, SPLITS, BIASED, CORRECTION,
            )  # fmt: skip
