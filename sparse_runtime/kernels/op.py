"""The one operation of this project, a gated FFN over the neurons of a cluster, in three backends.

``sparse_ffn`` takes cluster ids, ``routed_ffn`` finds them first and adds the compensation. Both take
objects (``kernels/operands.py``) and flatten them here for torch.library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_runtime.cost import LOOK_BITS, look_size, packed_size
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    ExpertChoice,
    FFNWeights,
    RouterWeights,
)
from sparse_runtime.kernels.reference import (
    ACTIVATION_FUNCTIONS,
    add_compensation,
    routed_ids,
    sparse_experts_reference,
    sparse_ffn_reference,
)


def sparse_ffn(
    x: Tensor,
    weights: FFNWeights,
    tables: ClusterTables,
    cluster_ids: Tensor,
    *,
    row_counts: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Compute a gated FFN for each token over the neurons of its cluster only.

    y_t = Σ_{i ∈ S_t} h_i(x_t) · down_t[i],    h_i(x) = act(gate[i]·x + b_i) · (up[i]·x + b'_i)

    or, without up, h_i(x) = act(gate[i]·x + b_i).

    S_t is ``active_sets[cluster_ids[t]]``, plus the neurons i of ``maybe_sets[cluster_ids[t]]`` whose
    look record gives |h̃_i|·factors[i]·v > 1, with v = ``cluster_weights[cluster_ids[t]]``, or 1.

    Args:
        x: hidden states [n, H], of the weights' dtype.
        weights: the neurons.
        tables: sets of the clusters.
        cluster_ids: cluster of each token [n] int64, in [0, K).
        row_counts: incremented by the neurons computed and the neurons looked at, summed over
            tokens [2] int64, or None.
        backend: ``reference``, or ``triton`` for tensors on a GPU, all contiguous.

    Returns:
        y [n, H], dtype of ``x``. Zero for a token without any neuron.

    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit together, or there are
            ``maybe_sets`` without ``factors`` or look records.
        IndexError: a cluster id is out of range (CPU only; on a GPU it is not checked).
    """
    _check_arguments(x, weights, tables, cluster_ids, row_counts)
    if backend not in ("reference", "triton"):
        raise ValueError(f"backend is {backend!r}; expected 'reference' or 'triton'")
    operation = torch.ops.sparse_runtime.sparse_ffn
    if backend == "triton":
        from sparse_runtime.kernels.triton import ffn as triton_ffn  # noqa: F401  (it registers the operation)

        operation = torch.ops.sparse_runtime.triton_sparse_ffn
    looks = tables.maybe_sets is not None
    output: Tensor = operation(
        x,
        weights.gate,
        weights.up,
        weights.down_t,
        tables.active_sets,
        cluster_ids,
        weights.activation,
        tables.maybe_sets,
        weights.look if looks else None,
        tables.factors,
        # Never None: torch 2.10 cannot mutate an argument that is left at its default.
        x.new_zeros(2, dtype=torch.int64) if row_counts is None else row_counts,
        tables.cluster_weights if looks else None,
        weights.gate_bias,
        weights.up_bias,
    )
    return output


def routed_ffn(
    x: Tensor,
    weights: FFNWeights,
    tables: ClusterTables,
    router: RouterWeights,
    compensation: Compensation,
    counters: Counters,
    *,
    backend: str,
    choice: ExpertChoice | None = None,
) -> Tensor:
    """Route tokens, compute their clusters' neurons, and add what compensates for the others.

    Of a mixture of experts, those neurons of a token's cluster that are of its experts: with e_j and
    w_j of ``choice``, y_t = Σ_j w_j · Σ_{i ∈ S_t of e_j} h_i(x_t) · down_t[i]; looks judge w_j·h̃_i.

    Arguments are checked by the backend, and by the fused ones as cheaply as they can.

    Args:
        x: hidden states [n, H], of the weights' dtype.
        weights: the neurons.
        tables: sets of the clusters.
        router: of the weights' dtype.
        compensation: of the weights' dtype.
        counters: every call adds to them.
        backend: ``cpu``, ``triton`` or ``reference``; of experts not ``triton``.
        choice: of a mixture of experts.

    Returns:
        y [n, H], dtype of ``x``.
    """
    if backend == "reference":
        ids = routed_ids(x, router)
        counters.clusters.scatter_add_(0, ids, torch.ones_like(ids))
        if choice is not None:
            output = sparse_experts_reference(x, weights, tables, ids, choice, counters.rows)
        else:
            output = sparse_ffn(x, weights, tables, ids, row_counts=counters.rows)
        return add_compensation(output, x, ids, compensation)
    ops = torch.ops.sparse_runtime
    operation = ops.cpu_routed_ffn.default if backend == "cpu" else ops.triton_routed_ffn.default
    looks = tables.maybe_sets is not None
    result: Tensor = operation(
        x,
        weights.gate,
        weights.up,
        weights.down_t,
        tables.active_sets,
        router.down,
        router.up,
        router.bias,
        compensation.cluster_bias,
        counters.clusters,
        weights.activation,
        tables.maybe_sets,
        weights.look if looks else None,
        tables.factors,
        counters.rows,
        compensation.correction_down,
        compensation.correction_up,
        *(() if backend == "cpu" else (counters.programs,)),
        tables.cluster_weights if looks else None,
        weights.gate_bias,
        weights.up_bias,
        *(() if choice is None else (choice.index, choice.weights, choice.experts)),
    )
    return result


def dense_ffn(x: Tensor, weights: FFNWeights) -> Tensor:
    """All neurons by the CPU kernels: y [n, H] of hidden states x [n, H] of the weights' dtype."""
    output: Tensor = torch.ops.sparse_runtime.cpu_dense_ffn.default(
        x,
        weights.gate,
        weights.up,
        weights.down_t,
        weights.activation,
        weights.gate_bias,
        weights.up_bias,
    )
    return output


@torch.library.custom_op("sparse_runtime::sparse_ffn", mutates_args=("row_counts",))
def _sparse_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
    maybe_sets: Tensor | None,
    look: Tensor | None,
    factors: Tensor | None,
    row_counts: Tensor,
    cluster_weights: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    return sparse_ffn_reference(
        x,
        FFNWeights(w_gate, w_up, w_down_t, activation, look, gate_bias, up_bias),
        ClusterTables(sets, maybe_sets, factors, cluster_weights),
        cluster_ids,
        row_counts,
    )


@_sparse_ffn.register_fake
def _(x: Tensor, *unused: object, **also_unused: object) -> Tensor:
    return x.new_empty(x.shape)


def _check_arguments(
    x: Tensor,
    weights: FFNWeights,
    tables: ClusterTables,
    cluster_ids: Tensor,
    row_counts: Tensor | None,
) -> None:
    if weights.activation not in ACTIVATION_FUNCTIONS:
        raise ValueError(
            f"activation is {weights.activation!r}; expected one of "
            f"{', '.join(ACTIVATION_FUNCTIONS)}"
        )
    if x.dim() != 2 or weights.gate.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and gate {tuple(weights.gate.shape)}; expected [n, H], "
            "[I, H]"
        )
    neurons, hidden_size = weights.gate.shape
    clusters = tables.active_sets.shape[0]
    bitmaps = (clusters, packed_size(neurons))
    matrices = 1 if weights.up is None else 2
    records = (neurons, look_size(hidden_size, LOOK_BITS, matrices))
    if weights.up is None and weights.up_bias is not None:
        raise ValueError("up_bias is given, but up is None; expected both or neither")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "x": (x, (x.shape[0], hidden_size), x.dtype),
        "gate": (weights.gate, (neurons, hidden_size), x.dtype),
        "up": (weights.up, (neurons, hidden_size), x.dtype),
        "down_t": (weights.down_t, (neurons, hidden_size), x.dtype),
        "active_sets": (tables.active_sets, bitmaps, torch.uint8),
        "cluster_ids": (cluster_ids, (x.shape[0],), torch.int64),
        "row_counts": (row_counts, (2,), torch.int64),
        "maybe_sets": (tables.maybe_sets, bitmaps, torch.uint8),
        "factors": (tables.factors, (neurons,), torch.float32),
        "cluster_weights": (tables.cluster_weights, (clusters,), torch.float32),
        "look": (weights.look, records, torch.uint8),
        "gate_bias": (weights.gate_bias, (neurons,), torch.float32),
        "up_bias": (weights.up_bias, (neurons,), torch.float32),
    }
    if tables.maybe_sets is not None or tables.factors is not None:
        band = {name: expected[name][0] for name in ("maybe_sets", "factors", "look")}
        missing = [name for name, tensor in band.items() if tensor is None]
        if missing:
            given = next(name for name in band if name not in missing)
            raise ValueError(
                f"{missing[0]} is None, but {given} is given; expected all of {', '.join(band)}, or "
                "neither maybe_sets nor factors"
            )
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected "
                f"{dtype} {shape} on {x.device}"
            )
