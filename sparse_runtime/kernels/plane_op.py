"""Linear layers and FFNs over weights in planes: few tokens by kernels, many by a library's products.

Kernels read what a token needs of the planes. From some number of tokens on, unpacking blocks of rows
to floats, once for all tokens, and multiplying those is faster.

``backend`` is one of ``BACKENDS``: ``auto`` takes the kernels of the device, or PyTorch with a warning
where they cannot run; another one that cannot run is an error.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.errors import BackendUnavailableError
from sparse_runtime.kernels.backends import resolve_backend
from sparse_runtime.kernels.bitmaps import unpack_bits
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    ExpertChoice,
    RouterWeights,
    Stages,
)
from sparse_runtime.kernels.plane_reference import plane_experts_reference, plane_ffn_reference
from sparse_runtime.kernels.planes import NeuronPlanes, PlaneFormat, Rounded, linear_parts
from sparse_runtime.kernels.reference import (
    activations,
    add_compensation,
    routed_ids,
    token_factors,
)

#: Up to so many tokens kernels compute rows from planes. Matrix units of a GPU take 16 at a time, so
#: that fewer cost as much; from where on unpacking is faster there has not been measured.
MAX_KERNEL_TOKENS = {"cpu": 8, "triton": 16}
# Rows that are unpacked at a time: on a CPU they stay in the cache until they are multiplied, on a GPU
# they are enough for all its processors.
_BLOCK_ROWS = {"cpu": 512, "triton": 4096, "reference": 512}


def plane_linear(
    x: Tensor,
    records: Tensor,
    form: PlaneFormat,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """A linear layer over rows in planes.

    Args:
        x: inputs [n, K], bfloat16, float16 or float32.
        records: of the layer's rows [N, R] uint8 (``kernels/planes.py``).
        form: their format.
        bias: [N] of x's dtype, or None.
        backend: see above.

    Returns:
        [n, N] of x's dtype.

    Raises:
        BackendUnavailableError: the backend cannot run, and is not ``auto``.
    """
    backend = _kernels(backend, x)
    ops = torch.ops.sparse_runtime
    if _are_few(x, backend):
        operation = ops.cpu_plane_linear if backend == "cpu" else ops.triton_plane_linear
        result: Tensor = operation.default(_by_rows(x), records, form.base, form.residual, bias)
        return result
    parts = []
    for block in records.split(_BLOCK_ROWS[backend]):
        base, residual, scales = linear_parts(block, form, x.shape[1])
        parts.append(F.linear(x, _values(base, residual, scales, form, x, backend)))
    output = torch.cat(parts, dim=1)
    return output if bias is None else output + bias


def dense_plane_ffn(
    x: Tensor,
    planes: NeuronPlanes,
    *,
    backend: str = "auto",
    choice: ExpertChoice | None = None,
) -> Tensor:
    """All neurons with all their bits: y [n, H] of hidden states x [n, H], of x's dtype.

    Of a mixture of experts those of each token's experts. Biases of gate and up are added, that of down
    is the caller's.

    Raises:
        BackendUnavailableError: the backend cannot run, and is not ``auto``.
    """
    backend = _kernels(backend, x)
    if _are_few(x, backend) and (choice is None or backend == "cpu"):
        if backend == "cpu":
            operation = torch.ops.sparse_runtime.cpu_plane_ffn.default
            return _staged(operation, x, planes, choice=choice)
        result: Tensor = torch.ops.sparse_runtime.triton_dense_plane_ffn.default(
            *_flattened(x, planes), planes.gate_bias, planes.up_bias
        )
        return result
    if choice is None:
        return _by_blocks(x, planes, backend).to(x.dtype)
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for rows, tokens, counts in choice.parts(len(planes.look)):
        found = _by_blocks(x[tokens], planes.some(rows), backend)
        output.index_add_(0, tokens, found * counts.unsqueeze(-1))
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
    choice: ExpertChoice | None = None,
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
        backend: ``cpu``, ``triton`` or ``reference``, one that can run.
        cluster_ids: [n] int64, instead of the router's.
        choice: of a mixture of experts, as of :func:`sparse_runtime.kernels.routed_ffn`; not by
            ``triton``.

    Returns:
        y [n, H] of x's dtype.
    """
    if backend != "reference":
        ops = torch.ops.sparse_runtime
        operation = ops.cpu_plane_ffn if backend == "cpu" else ops.triton_plane_ffn
        objects = (tables, stages, router, compensation, counters)
        extra: dict[str, Any] = {"cluster_ids": cluster_ids, "choice": choice}
        return _staged(operation.default, x, planes, *objects, **extra)
    ids = routed_ids(x, router) if cluster_ids is None else cluster_ids
    counters.clusters.scatter_add_(0, ids, torch.ones_like(ids))
    candidates = unpack_bits(tables.active_sets[ids], planes.look.shape[0])
    factors = None
    if stages is not None:
        factors = token_factors(stages.factors, tables.cluster_weights, ids)
    arguments = (x, planes, candidates, stages, counters.rows, factors)
    if choice is None:
        output = plane_ffn_reference(*arguments)
    else:
        output = plane_experts_reference(*arguments, choice)
    return add_compensation(output, x, ids, compensation)


def _staged(
    operation: Any,
    x: Tensor,
    planes: NeuronPlanes,
    tables: ClusterTables | None = None,
    stages: Stages | None = None,
    router: RouterWeights | None = None,
    compensation: Compensation | None = None,
    counters: Counters | None = None,
    *,
    cluster_ids: Tensor | None = None,
    choice: ExpertChoice | None = None,
) -> Tensor:
    result: Tensor = operation(
        *_flattened(x, planes),
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
        *(() if counters is None or counters.programs is None else (counters.programs,)),
        tables.cluster_weights if tables and stages else None,
        planes.gate_bias,
        planes.up_bias,
        *(() if choice is None else (choice.index, choice.weights, choice.experts)),
    )
    return result


def _flattened(x: Tensor, planes: NeuronPlanes) -> tuple[Any, ...]:
    form = planes.format
    streams = (planes.look, planes.count, planes.refine)
    return (_by_rows(x), *streams, form.base, form.residual, planes.activation)


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _are_few(x: Tensor, backend: str) -> bool:
    return backend != "reference" and x.shape[0] <= MAX_KERNEL_TOKENS[backend]


def _kernels(name: str, x: Tensor) -> str:
    """``cpu``, ``triton`` or ``reference``: whose kernels run for inputs."""
    return name if name == "reference" else _kernels_on(name, x.device, x.dtype)


@torch.compiler.assume_constant_result
def _kernels_on(name: str, device: torch.device, dtype: torch.dtype) -> str:
    return _resolved(name, device, dtype)  # which torch.compile cannot trace


@functools.cache
def _resolved(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name != "auto":
        return resolve_backend(name, device, dtype, strict=True)
    # Weights in planes have no other way to be fast: the slowest kernels are better than none.
    name = "cpu" if device.type == "cpu" else "triton"
    try:
        return resolve_backend(name, device, dtype, strict=True)
    except BackendUnavailableError as error:
        if device.type != "meta":
            warnings.warn(f"weights in planes are unpacked in each call: {error}", stacklevel=2)
        return "reference"


def _blocks(x: Tensor, planes: NeuronPlanes, backend: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations [n, rows] and down's values [rows, H] of some rows at a time, of x's dtype."""
    size = _BLOCK_ROWS[backend]
    for first in range(0, planes.look.shape[0], size):
        rows = slice(first, first + size)
        gate, up, down = (
            None if part is None else _values(*part, planes.format, x, backend)
            for part in planes.parts(rows)
        )
        assert gate is not None
        assert down is not None
        biases = (None if b is None else b[rows] for b in (planes.gate_bias, planes.up_bias))
        yield activations(x, gate, up, planes.activation, *biases), down


def _by_blocks(x: Tensor, planes: NeuronPlanes, backend: str) -> Tensor:
    """All neurons with all their bits, unpacked a block at a time: [n, H] float32."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for h, down in _blocks(x, planes, backend):
        output += h @ down
    return output


def _values(
    base: Tensor, residual: Tensor, scales: Tensor, form: PlaneFormat, x: Tensor, backend: str
) -> Tensor:
    """Values [rows, K] of x's dtype, for inputs [n, K]."""
    if backend == "reference":
        return Rounded.unpack(base, residual, scales, form, x.shape[1]).values().to(x.dtype)
    ops = torch.ops.sparse_runtime
    operation = ops.cpu_plane_values if backend == "cpu" else ops.triton_plane_values
    result: Tensor = operation.default(
        base, residual, scales, form.base, form.residual, x.shape[1], x.new_empty(0)
    )
    return result
