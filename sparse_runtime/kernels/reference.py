"""The sparse FFN in plain PyTorch: the definition every other backend is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.bitmaps import unpack_bits
from sparse_runtime.kernels.low_bit import dequantize_rows, rounded_tokens

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

# Up to this many tokens each one's rows are gathered; beyond it one dense pass under masks is faster.
_GATHER_MAX_TOKENS = 8


def sparse_ffn_reference(
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
    """Compute y_t = Σ_i act(gate_i·x_t) (up_i·x_t) down_i over t's neurons; see ``sparse_ffn``."""
    chosen = unpack_bits(sets[cluster_ids], w_gate.shape[0])
    maybe = torch.zeros_like(chosen)
    if maybe_sets is not None and low_bit is not None and factors is not None:
        maybe = unpack_bits(maybe_sets[cluster_ids], w_gate.shape[0]) & ~chosen
        chosen |= maybe & confirmed(x, low_bit, factors, activation)
    if row_counts is not None:
        row_counts += torch.stack([chosen.sum(), maybe.sum()])
    if x.shape[0] > _GATHER_MAX_TOKENS:
        return _masked(x, w_gate, w_up, w_down_t, chosen, activation)
    return _gathered(x, w_gate, w_up, w_down_t, chosen, activation)


def confirmed(x: Tensor, low_bit: Tensor, factors: Tensor, activation: str) -> Tensor:
    """Neurons that a look at their low-bit copies finds needed, not |h̃|·factor ≤ 1, bool [n, I].

    h̃ is the activation of 4-bit gate and up and of an 8-bit x, in float32.
    """
    gate, up = dequantize_rows(low_bit, x.shape[1])
    rounded = rounded_tokens(x)
    h = ACTIVATION_FUNCTIONS[activation](F.linear(rounded, gate)) * F.linear(rounded, up)
    return ~(h.abs() * factors <= 1)  # so that NaN is computed, not skipped


def _masked(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    chosen: Tensor,
    activation: str,
) -> Tensor:
    act = ACTIVATION_FUNCTIONS[activation]
    h = act(F.linear(x, w_gate)) * F.linear(x, w_up)
    return h.masked_fill_(~chosen, 0) @ w_down_t


def _gathered(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    chosen: Tensor,
    activation: str,
) -> Tensor:
    act = ACTIVATION_FUNCTIONS[activation]
    y = x.new_empty(x.shape)
    for token in range(x.shape[0]):
        rows = chosen[token].nonzero().squeeze(-1)
        one = x[token : token + 1]
        gate = F.linear(one, w_gate.index_select(0, rows))
        up = F.linear(one, w_up.index_select(0, rows))
        y[token : token + 1] = (act(gate) * up) @ w_down_t.index_select(0, rows)
    return y
