"""Linear layers and FFNs over weights in planes: few tokens by kernels, many by a library's products.

Kernels read what a token needs of the planes. From some number of tokens on, unpacking blocks of rows
to floats, once for all tokens, and multiplying those is faster.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.kernels.bitmaps import unpack_bits
from sparse_runtime.kernels.cpu.library import load_cpu_library
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    RouterWeights,
    Stages,
)
from sparse_runtime.kernels.plane_reference import plane_ffn_reference
from sparse_runtime.kernels.planes import NeuronPlanes, PlaneFormat, Rounded, linear_parts
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, add_compensation, routed_ids

#: Up to so many tokens the CPU kernels compute rows from planes.
MAX_KERNEL_TOKENS = 8
# Rows that are unpacked at a time: they stay in the cache until they are multiplied.
_BLOCK_ROWS = 512


def plane_linear(
    x: Tensor, records: Tensor, form: PlaneFormat, bias: Tensor | None = None
) -> Tensor:
    """A linear layer over rows in planes.

    Args:
        x: inputs [n, K], bfloat16, float16 or float32.
        records: of the layer's rows [N, R] uint8 (``kernels/planes.py``).
        form: their format.
        bias: [N] of x's dtype, or None.

    Returns:
        [n, N] of x's dtype.
    """
    if x.shape[0] <= MAX_KERNEL_TOKENS and _has_kernels(x):
        result: Tensor = torch.ops.sparse_runtime.cpu_plane_linear.default(
            x if x.stride(-1) == 1 else x.contiguous(), records, form.base, form.residual, bias
        )
        return result
    parts = []
    for block in records.split(_BLOCK_ROWS):
        base, residual, scales = linear_parts(block, form, x.shape[1])
        parts.append(F.linear(x, _values(base, residual, scales, form, x)))
    output = torch.cat(parts, dim=1)
    return output if bias is None else output + bias


def dense_plane_ffn(x: Tensor, planes: NeuronPlanes) -> Tensor:
    """All neurons with all their bits: y [n, H] of hidden states x [n, H], of x's dtype."""
    if x.shape[0] <= MAX_KERNEL_TOKENS and _has_kernels(x):
        return _cpu_plane_ffn(x, planes)
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for gate, up, down in _blocks(x, planes):
        h = ACTIVATION_FUNCTIONS[planes.activation](F.linear(x, gate)) * F.linear(x, up)
        output += h @ down
    return output.to(x.dtype)


def routed_plane_ffn(
    x: Tensor,
    planes: NeuronPlanes,
    tables: ClusterTables,
    stages: Stages | None,
    router: RouterWeights,
    compensation: Compensation,
    counters: Counters,
    *,
    backend: str,
    cluster_ids: Tensor | None = None,
) -> Tensor:
    """Route tokens, read their clusters' neurons as far as they matter, and add the compensation.

    Args:
        x: hidden states [n, H].
        planes: the neurons.
        tables: ``active_sets`` are the candidates of each cluster.
        stages: thresholds; None to refine every candidate.
        router: of x's dtype.
        compensation: of x's dtype.
        counters: every call adds to them; ``rows`` are neurons counted, looked at and refined
            [3] int64.
        backend: ``cpu`` or ``reference``.
        cluster_ids: [n] int64, instead of the router's.

    Returns:
        y [n, H] of x's dtype.
    """
    if backend == "cpu":
        return _cpu_plane_ffn(
            x, planes, tables, stages, router, compensation, counters, cluster_ids=cluster_ids
        )
    ids = routed_ids(x, router) if cluster_ids is None else cluster_ids
    counters.clusters.scatter_add_(0, ids, torch.ones_like(ids))
    candidates = unpack_bits(tables.active_sets[ids], planes.look.shape[0])
    output = plane_ffn_reference(x, planes, candidates, stages, counters.rows)
    return add_compensation(output, x, ids, compensation)


def _cpu_plane_ffn(
    x: Tensor,
    planes: NeuronPlanes,
    tables: ClusterTables | None = None,
    stages: Stages | None = None,
    router: RouterWeights | None = None,
    compensation: Compensation | None = None,
    counters: Counters | None = None,
    *,
    cluster_ids: Tensor | None = None,
) -> Tensor:
    result: Tensor = torch.ops.sparse_runtime.cpu_plane_ffn.default(
        x if x.stride(-1) == 1 else x.contiguous(),
        planes.look,
        planes.count,
        planes.refine,
        planes.format.base,
        planes.format.residual,
        planes.activation,
        tables.active_sets if tables else None,
        cluster_ids,
        router.down if router else None,
        router.up if router else None,
        router.bias if router else None,
        stages.factors if stages else None,
        stages.tau if stages else 1.0,
        stages.width if stages else 0.0,
        compensation.cluster_bias if compensation else None,
        # Never None: torch 2.10 cannot mutate an argument that is left out.
        counters.clusters if counters else x.new_zeros(0, dtype=torch.int64),
        counters.rows if counters else x.new_zeros(3, dtype=torch.int64),
        compensation.correction_down if compensation else None,
        compensation.correction_up if compensation else None,
    )
    return result


def _has_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and _is_loaded()


@torch.compiler.assume_constant_result
def _is_loaded() -> bool:
    return load_cpu_library()  # which torch.compile cannot trace


def _blocks(x: Tensor, planes: NeuronPlanes) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gate, up and down of some rows at a time, of x's dtype."""
    for first in range(0, planes.look.shape[0], _BLOCK_ROWS):
        gate, up, down = planes.parts(slice(first, first + _BLOCK_ROWS))
        yield (
            _values(*gate, planes.format, x),
            _values(*up, planes.format, x),
            _values(*down, planes.format, x),
        )


def _values(base: Tensor, residual: Tensor, scales: Tensor, form: PlaneFormat, x: Tensor) -> Tensor:
    """Values [rows, K] of x's dtype, for inputs [n, K]."""
    if _has_kernels(x):
        result: Tensor = torch.ops.sparse_runtime.cpu_plane_values.default(
            base, residual, scales, form.base, form.residual, x.shape[1], x.new_empty(0)
        )
        return result
    return Rounded.unpack(base, residual, scales, form, x.shape[1]).values().to(x.dtype)
