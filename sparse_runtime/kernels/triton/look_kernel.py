# mypy: ignore-errors
# (Triton's language is not Python's: parameters are tensors, pointers or constants of the compiler.)
"""The kernel that tells which neurons of float weights tokens compute; ``ffn.py`` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_runtime.kernels.triton.kernels import _activation_of, _in_set, _is_last, _write_list
from sparse_runtime.kernels.triton.plane_kernels import _gate_up


@triton.jit
def look_kernel(
    x, ids, sets, maybe_sets, look, factors, cluster_weights, gate_bias, up_bias, member, rows, count,
    row_counts, counter, neurons, set_bytes,
    H: tl.constexpr, BASE: tl.constexpr, VERIFY: tl.constexpr, WEIGHTED: tl.constexpr,
    LISTED: tl.constexpr, COUNTED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    GATE_BIASED: tl.constexpr, UP_BIASED: tl.constexpr,
    BLOCK_I: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Tell the neurons that each token computes, by their look records. Grid (I / BLOCK_I, n).

    Every token is looked with by itself, so that what is found does not depend on the others.
    """
    block, token = tl.program_id(0), tl.program_id(1)
    cluster = tl.load(ids + token)
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    valid = i < neurons
    computed = _in_set(sets + cluster * set_bytes, i, valid) & valid
    if VERIFY:
        looked = _in_set(maybe_sets + cluster * set_bytes, i, valid) & valid & (computed == 0)
        if tl.max(looked.to(tl.int32), 0) > 0:
            gate, up = _gate_up(
                x + token * H, look, look, block * BLOCK_I, looked, 1,
                H, BASE, 0, True, False, 1, CODES, "ieee", GATED,
            )  # fmt: skip
            h = tl.reshape(
                _activation_of(
                    gate, up, i[None, :], valid[None, :], gate_bias, up_bias,
                    ACTIVATION, GATED, GATE_BIASED, UP_BIASED,
                ),
                [BLOCK_I],
            )  # fmt: skip
            factor = tl.load(factors + i, mask=valid, other=0)
            if WEIGHTED:
                factor *= tl.load(cluster_weights + cluster)
            # Not "above one": NaN is computed, not skipped.
            computed = computed | (looked & ((tl.abs(h) * factor <= 1) == 0))
            if COUNTED:
                tl.atomic_add(row_counts + 1, tl.sum(looked.to(tl.int64), 0))
    tl.store(member + token * neurons + i, computed.to(tl.uint8), mask=valid)
    if COUNTED:
        tl.atomic_add(row_counts, tl.sum(computed.to(tl.int64), 0))
    # Not one condition: the counter is for calls that make a list.
    if LISTED:  # noqa: SIM102
        if _is_last(counter, tl.num_programs(0)):
            _write_list(member, rows, count, neurons, False)
