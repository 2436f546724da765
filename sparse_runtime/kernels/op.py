"""``sparse_ffn``: the one operation of this project, as a ``torch.library`` custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_runtime.bitmaps import packed_size
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, sparse_ffn_reference

BACKENDS = ("auto", "cpu", "reference")


def sparse_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str = "silu",
) -> Tensor:
    """Compute a gated FFN for each token over the neurons of its cluster's set only.

    y_t = Σ_{i ∈ sets[cluster_ids[t]]} act(w_gate[i]·x_t) · (w_up[i]·x_t) · w_down_t[i]

    Args:
        x: hidden states [n, H], bfloat16, float16 or float32.
        w_gate: gate projection [I, H], dtype of ``x``.
        w_up: up projection [I, H], dtype of ``x``.
        w_down_t: transposed down projection [I, H], dtype of ``x``: a neuron is one row in all three.
        sets: bitmaps [K, ⌈I/8⌉] uint8 (see :mod:`sparse_runtime.bitmaps`).
        cluster_ids: cluster of each token [n] int64, in [0, K).
        activation: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.

    Returns:
        y [n, H], dtype of ``x``. Zero for a token whose set is empty.

    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit together.
        IndexError: a cluster id is out of range (CPU only; on a GPU it is not checked).
    """
    _check_arguments(x, w_gate, w_up, w_down_t, sets, cluster_ids, activation)
    return torch.ops.sparse_runtime.sparse_ffn(
        x, w_gate, w_up, w_down_t, sets, cluster_ids, activation
    )


@torch.library.custom_op("sparse_runtime::sparse_ffn", mutates_args=())
def _sparse_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
) -> Tensor:
    return sparse_ffn_reference(x, w_gate, w_up, w_down_t, sets, cluster_ids, activation)


@_sparse_ffn.register_fake
def _(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
) -> Tensor:
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
