"""``sparse_ffn``: the one operation of this project, as a ``torch.library`` custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_runtime.bitmaps import packed_size
from sparse_runtime.kernels.low_bit import record_size
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, sparse_ffn_reference


def sparse_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str = "silu",
    *,
    maybe_sets: Tensor | None = None,
    low_bit: Tensor | None = None,
    factors: Tensor | None = None,
    row_counts: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Compute a gated FFN for each token over the neurons of its cluster only.

    y_t = Σ_{i ∈ S_t} h_i(x_t) · w_down_t[i],    h_i(x) = act(w_gate[i]·x) · (w_up[i]·x)

    S_t is ``sets[cluster_ids[t]]``, plus, with verification, the neurons i of
    ``maybe_sets[cluster_ids[t]]`` whose low-bit copy gives |h̃_i|·factors[i] > 1.

    Args:
        x: hidden states [n, H], bfloat16, float16 or float32.
        w_gate: gate projection [I, H], dtype of ``x``.
        w_up: up projection [I, H], dtype of ``x``.
        w_down_t: transposed down projection [I, H], dtype of ``x``: a neuron is one row in all three.
        sets: bitmaps [K, ⌈I/8⌉] uint8 (see :mod:`sparse_runtime.bitmaps`).
        cluster_ids: cluster of each token [n] int64, in [0, K).
        activation: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        maybe_sets: bitmaps [K, ⌈I/8⌉] uint8, or None. Neurons that are in ``sets`` too are computed.
        low_bit: records [I, R] uint8 of :func:`sparse_runtime.kernels.low_bit.quantize_rows`.
        factors: [I] float32.
        row_counts: incremented by the neurons computed and the neurons looked at, summed over
            tokens [2] int64, or None.
        backend: ``reference``, or ``triton`` for tensors on a GPU, all contiguous.

    Returns:
        y [n, H], dtype of ``x``. Zero for a token without any neuron.

    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit together, or only some of
            ``maybe_sets``, ``low_bit`` and ``factors`` are given.
        IndexError: a cluster id is out of range (CPU only; on a GPU it is not checked).
    """
    _check_arguments(x, w_gate, w_up, w_down_t, sets, cluster_ids, activation)
    _check_verification(x, w_gate, sets, maybe_sets, low_bit, factors, row_counts)
    if backend not in ("reference", "triton"):
        raise ValueError(f"backend is {backend!r}; expected 'reference' or 'triton'")
    operation = torch.ops.sparse_runtime.sparse_ffn
    if backend == "triton":
        from sparse_runtime.kernels import triton_ffn  # noqa: F401  (it registers the operation)

        operation = torch.ops.sparse_runtime.triton_sparse_ffn
    return operation(
        x,
        w_gate,
        w_up,
        w_down_t,
        sets,
        cluster_ids,
        activation,
        maybe_sets,
        low_bit,
        factors,
        row_counts,
    )


@torch.library.custom_op("sparse_runtime::sparse_ffn", mutates_args=("row_counts",))
def _sparse_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
    maybe_sets: Tensor | None = None,
    low_bit: Tensor | None = None,
    factors: Tensor | None = None,
    row_counts: Tensor | None = None,
) -> Tensor:
    return sparse_ffn_reference(
        x,
        w_gate,
        w_up,
        w_down_t,
        sets,
        cluster_ids,
        activation,
        maybe_sets,
        low_bit,
        factors,
        row_counts,
    )


@_sparse_ffn.register_fake
def _(x: Tensor, *unused: object, **also_unused: object) -> Tensor:
    return x.new_empty(x.shape)


def _check_arguments(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
) -> None:
    if activation not in ACTIVATION_FUNCTIONS:
        raise ValueError(
            f"activation is {activation!r}; expected one of {', '.join(ACTIVATION_FUNCTIONS)}"
        )
    if x.dim() != 2 or w_gate.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and w_gate {tuple(w_gate.shape)}; expected [n, H], [I, H]"
        )
    num_neurons, hidden_size = w_gate.shape
    expected = {
        "x": (x, (x.shape[0], hidden_size), x.dtype),
        "w_gate": (w_gate, (num_neurons, hidden_size), x.dtype),
        "w_up": (w_up, (num_neurons, hidden_size), x.dtype),
        "w_down_t": (w_down_t, (num_neurons, hidden_size), x.dtype),
        "sets": (sets, (sets.shape[0], packed_size(num_neurons)), torch.uint8),
        "cluster_ids": (cluster_ids, (x.shape[0],), torch.int64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected "
                f"{dtype} {shape} on {x.device}"
            )


def _check_verification(
    x: Tensor,
    w_gate: Tensor,
    sets: Tensor,
    maybe_sets: Tensor | None,
    low_bit: Tensor | None,
    factors: Tensor | None,
    row_counts: Tensor | None,
) -> None:
    num_neurons, hidden_size = w_gate.shape
    band = {
        "maybe_sets": (maybe_sets, tuple(sets.shape), torch.uint8),
        "low_bit": (low_bit, (num_neurons, record_size(hidden_size)), torch.uint8),
        "factors": (factors, (num_neurons,), torch.float32),
    }
    given = [name for name, (tensor, *_) in band.items() if tensor is not None]
    if given and len(given) < len(band):
        missing = next(name for name in band if name not in given)
        raise ValueError(
            f"{missing} is None, but {given[0]} is given; expected all of {', '.join(band)} or none"
        )
    counts = {"row_counts": (row_counts, (2,), torch.int64)}
    for name, (tensor, shape, dtype) in (band | counts).items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected "
                f"{dtype} {shape} on {x.device}"
            )
