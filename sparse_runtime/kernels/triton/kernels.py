"""The sparse FFN's kernels in Triton; ``triton_ffn.py`` launches them.

Everything that depends on the data stays on the device: ids, sets and counts. Grids are as large as the
largest set could ask for and programs beyond the count return at once, so that one CUDA graph serves
every token. Where the work of many programs is put together, the last of them to arrive does it, by a
counter that it sets back to zero: that saves a launch, and as it goes through the parts in their own
order, the sum is the same every time.

Sums are in float32 between the inputs and the output, whatever the weights' dtype; with several tokens
the activations in between have the weights' dtype, as matrix units want. ``WIDEN`` is for Triton's
interpreter, which computes bfloat16 wrongly unless it is widened first.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Groups of eight neurons taken at a time by the program that makes the list.
_LIST_GROUPS = tl.constexpr(1024)
#: Partial sums, and factors of the correction, that are loaded at once.
_SPLITS_AT_ONCE = tl.constexpr(8)
_FACTORS_AT_ONCE = tl.constexpr(16)


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    if ACTIVATION == "relu":
        # Not maximum, which may drop a NaN.
        return tl.where(gate < 0, 0.0, gate)
    if ACTIVATION == "relu2":
        above = tl.where(gate < 0, 0.0, gate)
        return above * above
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(2 * inner)


@triton.jit
def _activation_of(
    gate, up, i, valid, gate_bias, up_bias,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATE_BIASED: tl.constexpr, UP_BIASED: tl.constexpr,
):  # fmt: skip
    """h of dot products with rows i, of any shape that i broadcasts to."""
    if GATE_BIASED:
        gate += tl.load(gate_bias + i, mask=valid, other=0)
    h = _activate(gate, ACTIVATION)
    if UP_BIASED:
        up += tl.load(up_bias + i, mask=valid, other=0)
    if GATED:
        h = h * up
    return h


@triton.jit
def _is_last(counter, parts):
    """Whether all other programs of this counter have arrived; the last one sets it back."""
    tl.debug_barrier()  # this program's stores come first, those of all its threads
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    last = arrived == parts - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _in_set(bitmap, i, valid):
    """Which of the neurons i are in a bitmap."""
    byte = tl.load(bitmap + i // 8, mask=valid, other=0)
    return ((byte.to(tl.int32) >> (i % 8)) & 1) != 0


@triton.jit
def _write_list(flags, rows, count, neurons, BITMAP: tl.constexpr):
    """Write the neurons of a set in rising order to ``rows`` [I], and how many there are.

    Few steps, as each waits for all threads: eight neurons are one element of the scan.
    """
    written = 0
    bit = tl.arange(0, 8)
    for first in range(0, neurons, 8 * _LIST_GROUPS):
        group = first // 8 + tl.arange(0, _LIST_GROUPS)
        i = group[:, None] * 8 + bit[None, :]
        valid = i < neurons
        if BITMAP:
            byte = tl.load(flags + group, mask=group * 8 < neurons, other=0).to(tl.int32)
            member = ((byte[:, None] >> bit[None, :]) & 1) * valid.to(tl.int32)
        else:
            flag = tl.load(flags + i, mask=valid, other=0, cache_modifier=".cg")
            member = (flag != 0).to(tl.int32)
        sizes = tl.sum(member, 1)
        before = tl.cumsum(sizes, 0) - sizes
        place = before[:, None] + tl.cumsum(member, 1) - member
        tl.store(rows + written + place, i, mask=member != 0)
        written += tl.sum(sizes, 0)
    tl.store(count, written)
    return written


@triton.jit
def list_kernel(sets, ids, rows, count, row_counts, neurons, set_bytes, COUNTED: tl.constexpr):
    """One token's list of neurons for a given cluster. Grid (1,)."""
    bitmap = sets + tl.load(ids) * set_bytes
    written = _write_list(bitmap, rows, count, neurons, True)
    if COUNTED:
        tl.atomic_add(row_counts, written.to(tl.int64))


@triton.jit
def route_kernel(
    x, router_down, correction_down, router_up, router_bias, projected, ids, cluster_counts,
    sets, rows, count, row_counts, counters, H, neurons, K, set_bytes,
    RANK: tl.constexpr, CORRECTION: tl.constexpr, LISTED: tl.constexpr, COUNTED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_RANK: tl.constexpr,
):  # fmt: skip
    """Project tokens, pick clusters, list a single token's neurons. Grid (parts, n).

    The rows projected are those of the router's first matrix [RANK, H] (of its only one [K, H] if RANK
    is 0), then those of the correction [CORRECTION, H].
    """
    part, token = tl.program_id(0), tl.program_id(1)
    first_rows = K if RANK == 0 else RANK
    total = first_rows + CORRECTION
    r = part * BLOCK_R + tl.arange(0, BLOCK_R)
    routing = r < first_rows
    correcting = (r >= first_rows) & (r < total)
    sums = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < H
        values = tl.load(x + token * H + h, mask=inside, other=0).to(tl.float32)
        offsets = r[:, None] * H + h[None, :]
        mask = routing[:, None] & inside[None, :]
        weights = tl.load(router_down + offsets, mask=mask, other=0).to(tl.float32)
        if CORRECTION > 0:
            offsets = (r - first_rows)[:, None] * H + h[None, :]
            mask = correcting[:, None] & inside[None, :]
            weights += tl.load(correction_down + offsets, mask=mask, other=0).to(tl.float32)
        sums += tl.sum(weights * values[None, :], 1)
    tl.store(projected + token * total + r, sums, mask=r < total)
    if _is_last(counters + token, tl.num_programs(0)):
        best, best_id = float("-inf"), 0
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            exists = k < K
            bias = tl.load(router_bias + k, mask=exists, other=0).to(tl.float32)
            if RANK == 0:
                logits = bias + tl.load(
                    projected + token * total + k, mask=exists, other=0, cache_modifier=".cg"
                )
            else:
                j = tl.arange(0, PADDED_RANK)
                low = tl.load(
                    projected + token * total + j, mask=j < RANK, other=0, cache_modifier=".cg"
                )
                mask = exists[:, None] & (j < RANK)[None, :]
                up = tl.load(router_up + k[:, None] * RANK + j[None, :], mask=mask, other=0)
                logits = bias + tl.sum(up.to(tl.float32) * low[None, :], 1)
            logits = tl.where(exists, logits, float("-inf"))
            largest = tl.max(logits, 0)
            if largest > best:
                best = largest
                best_id = start + tl.argmax(logits, 0)
        tl.store(ids + token, best_id.to(tl.int64))
        tl.atomic_add(cluster_counts + best_id, tl.full((), 1, tl.int64))
        if LISTED:
            written = _write_list(sets + best_id * set_bytes, rows, count, neurons, True)
            if COUNTED:
                tl.atomic_add(row_counts, written.to(tl.int64))


@triton.jit
def gate_up_one_kernel(
    x, w_gate, w_up, gate_bias, up_bias, rows, count, activations, H,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATE_BIASED: tl.constexpr, UP_BIASED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Activations of one token's listed neurons. Grid (I / BLOCK_R,)."""
    num_rows = tl.load(count)
    first = tl.program_id(0) * BLOCK_R
    if first < num_rows:
        j = first + tl.arange(0, BLOCK_R)
        listed = j < num_rows
        i = tl.load(rows + j, mask=listed, other=0)
        offsets = i.to(tl.int64)[:, None] * H
        gate = tl.zeros([BLOCK_R], tl.float32)
        up = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            mask = listed[:, None] & (h < H)[None, :]
            values = tl.load(x + h, mask=h < H, other=0).to(tl.float32)[None, :]
            gate += tl.sum(
                tl.load(w_gate + offsets + h, mask=mask, other=0).to(tl.float32) * values, 1
            )
            if GATED:
                row = tl.load(w_up + offsets + h, mask=mask, other=0)
                up += tl.sum(row.to(tl.float32) * values, 1)
        result = _activation_of(
            gate, up, i, listed, gate_bias, up_bias, ACTIVATION, GATED, GATE_BIASED, UP_BIASED
        )
        tl.store(activations + j, result, mask=listed)


@triton.jit
def _finish(
    y, token, total, partial, stride, ids, cluster_bias, projected, correction_up, h, inside, H,
    SPLITS: tl.constexpr, BIASED: tl.constexpr, CORRECTION: tl.constexpr,
):  # fmt: skip
    """Add up the splits of some outputs, the bias of the token's cluster and the correction."""
    sums = tl.zeros([h.shape[0]], tl.float32)
    for first in range(0, SPLITS, _SPLITS_AT_ONCE):
        split = first + tl.arange(0, _SPLITS_AT_ONCE)
        places = partial + split[:, None] * stride + h[None, :]
        mask = (split < SPLITS)[:, None] & inside[None, :]
        sums += tl.sum(tl.load(places, mask=mask, other=0, cache_modifier=".cg"), 0)
    if BIASED:
        bias = cluster_bias + tl.load(ids + token) * H
        sums += tl.load(bias + h, mask=inside, other=0).to(tl.float32)
    for first in range(0, CORRECTION, _FACTORS_AT_ONCE):
        c = first + tl.arange(0, _FACTORS_AT_ONCE)
        low = tl.load(
            projected + (token + 1) * total - CORRECTION + c, mask=c < CORRECTION, other=0
        )
        mask = (c < CORRECTION)[:, None] & inside[None, :]
        up = tl.load(correction_up + c[:, None] * H + h[None, :], mask=mask, other=0)
        sums += tl.sum(low[:, None] * up.to(tl.float32), 0)
    tl.store(y + token * H + h, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def down_one_kernel(
    activations, w_down_t, rows, count, partial, y, ids, cluster_bias, projected, correction_up,
    counters, H, total,
    SPLITS: tl.constexpr, BIASED: tl.constexpr, CORRECTION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output of one token. Grid (H / BLOCK_H, SPLITS): each split takes a part of the list."""
    block, split = tl.program_id(0), tl.program_id(1)
    num_rows = tl.load(count)
    blocks = (num_rows + BLOCK_R - 1) // BLOCK_R
    share = (blocks + SPLITS - 1) // SPLITS * BLOCK_R
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < H
    # Rows are added up at the end: within the loop that would have all threads wait.
    sums = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    end = tl.minimum((split + 1) * share, num_rows)
    for start in tl.range(split * share, end, BLOCK_R, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_R)
        listed = j < end
        offsets = tl.load(rows + j, mask=listed, other=0).to(tl.int64) * H
        values = tl.load(activations + j, mask=listed, other=0)
        mask = listed[:, None] & inside[None, :]
        weights = tl.load(w_down_t + offsets[:, None] + h[None, :], mask=mask, other=0)
        sums += values[:, None] * weights.to(tl.float32)
    tl.store(partial + split * H + h, tl.sum(sums, 0), mask=inside)
    if _is_last(counters + block, SPLITS):
        _finish(
            y, 0, total, partial, H, ids, cluster_bias, projected, correction_up, h, inside, H,
            SPLITS, BIASED, CORRECTION,
        )  # fmt: skip


@triton.jit
def _dot(a, b, sums, WIDEN: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def gate_up_many_kernel(
    x, w_gate, w_up, gate_bias, up_bias, member, activations, n, H, neurons,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATE_BIASED: tl.constexpr, UP_BIASED: tl.constexpr,
    TOKENS: tl.constexpr, WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Activations of several tokens, zero where a token skips the neuron. Grid (I / BLOCK_R,).

    A row that any token needs is read once, for all of them.
    """
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, TOKENS)
    mask = (t < n)[:, None] & (i < neurons)[None, :]
    mine = tl.load(member + t[:, None] * neurons + i[None, :], mask=mask, other=0)
    needed = tl.max(mine.to(tl.int32), 0) > 0
    offsets = i.to(tl.int64)[None, :] * H
    gate = tl.zeros([TOKENS, BLOCK_R], tl.float32)
    up = tl.zeros([TOKENS, BLOCK_R], tl.float32)
    if tl.max(needed.to(tl.int32), 0) > 0:
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            values = tl.load(
                x + t[:, None] * H + h[None, :], mask=(t < n)[:, None] & (h < H)[None, :], other=0
            )
            wanted = (h < H)[:, None] & needed[None, :]
            weights = tl.load(w_gate + offsets + h[:, None], mask=wanted, other=0)
            gate = _dot(values, weights, gate, WIDEN)
            if GATED:
                weights = tl.load(w_up + offsets + h[:, None], mask=wanted, other=0)
                up = _dot(values, weights, up, WIDEN)
    h = _activation_of(
        gate, up, i[None, :], (i < neurons)[None, :], gate_bias, up_bias,
        ACTIVATION, GATED, GATE_BIASED, UP_BIASED,
    )  # fmt: skip
    result = tl.where(mine != 0, h, 0.0)
    place = activations + t[:, None] * neurons + i[None, :]
    tl.store(place, result.to(activations.dtype.element_ty), mask=mask)


@triton.jit
def down_many_kernel(
    activations, w_down_t, member, partial, y, ids, cluster_bias, projected, correction_up, counters,
    n, H, neurons, total,
    SPLITS: tl.constexpr, BIASED: tl.constexpr, CORRECTION: tl.constexpr, TOKENS: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Outputs of several tokens. Grid (H / BLOCK_H, SPLITS): each split takes a part of the neurons."""
    block, split = tl.program_id(0), tl.program_id(1)
    blocks = (neurons + BLOCK_R - 1) // BLOCK_R
    share = (blocks + SPLITS - 1) // SPLITS * BLOCK_R
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    t = tl.arange(0, TOKENS)
    sums = tl.zeros([TOKENS, BLOCK_H], tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, neurons), BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        mask = (t < n)[:, None] & (i < neurons)[None, :]
        mine = tl.load(member + t[:, None] * neurons + i[None, :], mask=mask, other=0)
        needed = tl.max(mine.to(tl.int32), 0) > 0
        values = tl.load(activations + t[:, None] * neurons + i[None, :], mask=mask, other=0)
        weights = tl.load(
            w_down_t + i.to(tl.int64)[:, None] * H + h[None, :],
            mask=needed[:, None] & (h < H)[None, :],
            other=0,
        )
        sums = _dot(values, weights, sums, WIDEN)
    place = partial + (split * n + t)[:, None] * H + h[None, :]
    tl.store(place, sums, mask=(t < n)[:, None] & (h < H)[None, :])
    if _is_last(counters + block, SPLITS):
        for token in range(n):
            _finish(
                y, token, total, partial + token * H, n * H, ids, cluster_bias, projected,
                correction_up, h, h < H, H, SPLITS, BIASED, CORRECTION,
            )  # fmt: skip
