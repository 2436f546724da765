"""The sparse FFN in plain PyTorch: the definition every other backend is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.bitmaps import unpack_bits

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

# Up to this many tokens the active rows are gathered, cluster by cluster, and each is copied once;
# beyond it nearly every row is wanted by some token, and one dense pass under masks is faster. On
# 2 cores at H = 576, I = 1536, K = 256 the two cross between 8 and 16 tokens.
_GATHER_MAX_TOKENS = 8


def sparse_ffn_reference(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
) -> Tensor:
    """Compute y_t = Σ_{i ∈ set(t)} act(gate_i·x_t) (up_i·x_t) down_i; see ``sparse_ffn``."""
    if x.shape[0] > _GATHER_MAX_TOKENS:
        return _masked(x, w_gate, w_up, w_down_t, sets, cluster_ids, activation)
    return _gathered(x, w_gate, w_up, w_down_t, sets, cluster_ids, activation)


def _masked(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
) -> Tensor:
    act = ACTIVATION_FUNCTIONS[activation]
    h = act(F.linear(x, w_gate)) * F.linear(x, w_up)
    mask = unpack_bits(sets[cluster_ids], w_gate.shape[0])
    return h.masked_fill_(~mask, 0) @ w_down_t


def _gathered(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
) -> Tensor:
    act = ACTIVATION_FUNCTIONS[activation]
    y = x.new_empty(x.shape)
    for cluster in cluster_ids.unique().tolist():
        rows = unpack_bits(sets[cluster], w_gate.shape[0]).nonzero().squeeze(-1)
        tokens = (cluster_ids == cluster).nonzero().squeeze(-1)
        x_cluster = x[tokens]
        gate = F.linear(x_cluster, w_gate.index_select(0, rows))
        up = F.linear(x_cluster, w_up.index_select(0, rows))
        y[tokens] = (act(gate) * up) @ w_down_t.index_select(0, rows)
    return y
