"""The sparse FFN in plain PyTorch: the definition every other backend is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.kernels.bitmaps import unpack_bits
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    ExpertChoice,
    FFNWeights,
    RouterWeights,
)
from sparse_runtime.kernels.planes import LOOK_FORMAT, unpack_look

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

# Up to this many tokens each one's rows are gathered; beyond it one dense pass under masks is faster.
_GATHER_MAX_TOKENS = 8


def sparse_ffn_reference(
    x: Tensor,
    weights: FFNWeights,
    tables: ClusterTables,
    cluster_ids: Tensor,
    row_counts: Tensor | None = None,
) -> Tensor:
    """Compute y_t = Σ_i act(gate_i·x_t) (up_i·x_t) down_i over t's neurons; see ``sparse_ffn``."""
    neurons = weights.gate.shape[0]
    chosen = unpack_bits(tables.active_sets[cluster_ids], neurons)
    maybe = torch.zeros_like(chosen)
    if tables.maybe_sets is not None and tables.factors is not None:
        assert weights.look is not None
        maybe = unpack_bits(tables.maybe_sets[cluster_ids], neurons) & ~chosen
        factors = token_factors(tables.factors, tables.cluster_weights, cluster_ids)
        chosen |= maybe & confirmed(x, weights, factors)
    if row_counts is not None:
        row_counts += torch.stack([chosen.sum(), maybe.sum()])
    if x.shape[0] > _GATHER_MAX_TOKENS:
        return gated_ffn(x, weights, chosen)
    y = x.new_empty(x.shape)
    for token in range(x.shape[0]):
        rows = chosen[token].nonzero().squeeze(-1)
        own = FFNWeights(
            weights.gate.index_select(0, rows),
            None if weights.up is None else weights.up.index_select(0, rows),
            weights.down_t.index_select(0, rows),
            weights.activation,
            None,
            None if weights.gate_bias is None else weights.gate_bias[rows],
            None if weights.up_bias is None else weights.up_bias[rows],
        )
        y[token : token + 1] = gated_ffn(x[token : token + 1], own)
    return y


def sparse_experts_reference(
    x: Tensor,
    weights: FFNWeights,
    tables: ClusterTables,
    cluster_ids: Tensor,
    choice: ExpertChoice,
    row_counts: Tensor | None = None,
) -> Tensor:
    """Σ_j w_j·FFN of each token's experts over their neurons of its cluster; see ``routed_ffn``."""
    y = x.new_zeros(x.shape, dtype=torch.float32)
    for rows, tokens, scale in choice.parts(len(weights.down_t)):
        own, sets = expert_operands(weights, tables, rows)
        factors = sets.factors
        if factors is not None:
            # What a token's factors are multiplied by, as if each were a cluster of its own.
            clusters = cluster_ids[tokens]
            counts = 1.0 if sets.cluster_weights is None else sets.cluster_weights[clusters]
            assert sets.maybe_sets is not None
            each = torch.arange(len(tokens), device=x.device)
            tables_of = ClusterTables(
                sets.active_sets[clusters], sets.maybe_sets[clusters], factors, scale.abs() * counts
            )
            output = sparse_ffn_reference(x[tokens], own, tables_of, each, row_counts)
        else:
            output = sparse_ffn_reference(x[tokens], own, sets, cluster_ids[tokens], row_counts)
        y.index_add_(0, tokens, output.float() * scale.unsqueeze(-1))
    return y.to(x.dtype)


def expert_operands(
    weights: FFNWeights, tables: ClusterTables, rows: slice
) -> tuple[FFNWeights, ClusterTables]:
    """The weights and sets of the expert that has these rows, out of those of all, as views."""
    bits = slice(rows.start // 8, rows.stop // 8)
    gate, up = weights.gate[2 * rows.start : 2 * rows.stop].chunk(2)
    look = None if weights.look is None else weights.look[rows]
    own = FFNWeights(gate, up, weights.down_t[rows], weights.activation, look)
    maybe = None if tables.maybe_sets is None else tables.maybe_sets[:, bits]
    factors = None if tables.factors is None else tables.factors[rows]
    return own, ClusterTables(tables.active_sets[:, bits], maybe, factors, tables.cluster_weights)


def gated_ffn(x: Tensor, weights: FFNWeights, chosen: Tensor | None = None) -> Tensor:
    """The whole FFN of hidden states [n, H], or that of the neurons in a mask [n, I] bool."""
    biases = weights.gate_bias, weights.up_bias
    h = activations(x, weights.gate, weights.up, weights.activation, *biases)
    if chosen is not None:
        h = h.masked_fill(~chosen, 0)
    return h @ weights.down_t


def activations(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """h = act(gate·x + b) ⊙ (up·x + b'), or without up act(gate·x + b).

    Args:
        x: hidden states [n, H].
        gate, up: weights [I, H]; up may be None.
        activation: one of ``ACTIVATION_FUNCTIONS``.
        gate_bias, up_bias: [I] or None, of any float dtype.

    Returns:
        h [n, I].
    """
    gates = F.linear(x, gate, None if gate_bias is None else gate_bias.to(x.dtype))
    h = ACTIVATION_FUNCTIONS[activation](gates)
    if up is None:
        return h
    return h * F.linear(x, up, None if up_bias is None else up_bias.to(x.dtype))


def token_factors(factors: Tensor, cluster_weights: Tensor | None, cluster_ids: Tensor) -> Tensor:
    """Factors [I], or those of each token [n, I] where clusters have weights [K]."""
    if cluster_weights is None:
        return factors
    return factors * cluster_weights[cluster_ids].unsqueeze(-1)


def confirmed(x: Tensor, weights: FFNWeights, factors: Tensor) -> Tensor:
    """Which neurons a look does not skip: [n, I] bool.

    Args:
        x: hidden states [n, H].
        weights: with look records.
        factors: [I], or [n, I] of each token.
    """
    assert weights.look is not None
    gate, up = unpack_look(weights.look, LOOK_FORMAT, x.shape[1])
    biases = weights.gate_bias, weights.up_bias
    h = activations(x.float(), gate, up, weights.activation, *biases)
    return ~(h.abs() * factors <= 1)  # so that NaN is computed, not skipped


def router_logits(x: Tensor, down: Tensor | None, up: Tensor, bias: Tensor) -> Tensor:
    """Cluster logits of hidden states.

    Args:
        x: hidden states [n, H].
        down: first matrix of a low-rank router [r, H], or None for a linear one.
        up: [K, r], or [K, H] for a linear router.
        bias: [K].

    Returns:
        logits [n, K].
    """
    if down is not None:
        x = F.linear(x, down)
    return F.linear(x, up, bias)


def routed_ids(x: Tensor, router: RouterWeights) -> Tensor:
    """Cluster ids [n] int64 of hidden states [n, H]: argmax of the router's logits."""
    return router_logits(x, router.down, router.up, router.bias).argmax(-1)


def add_compensation(output: Tensor, x: Tensor, ids: Tensor, compensation: Compensation) -> Tensor:
    """Add, in place, bias and correction for what the neurons of x's clusters leave out.

    Args:
        output: of the clusters' neurons [n, H].
        x: hidden states [n, H].
        ids: clusters [n] int64.
        compensation: of the layer.
    """
    if compensation.cluster_bias is not None:
        output += compensation.cluster_bias[ids]
    if compensation.correction_down is not None and compensation.correction_up is not None:
        output += F.linear(x, compensation.correction_down) @ compensation.correction_up
    return output
