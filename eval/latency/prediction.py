"""What it takes to know which neurons to read: our router beside other methods' predictors.

All run by the same CPU kernels (``cpu_linear``) on cold weights, in turns, for one token: what differs
is how much they read. Their time is to be seen beside the FFN's, part of which it saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.cost import router_parameter_count
from sparse_runtime.eval.latency.mlp import Variant, bench_layers, over_layers
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

# Rank of the per-neuron predictor: 64 for SmolLM2's hidden size, as in eval/baselines/deja_vu.py,
# and as large a share of the FFN for others.
_HIDDEN_PER_RANK = 9


def bench_prediction(
    modules: Sequence[SparseFFN],
    states: Mapping[int, Tensor] | None = None,
    *,
    repeats: int = 41,
) -> dict[str, Any]:
    """Time predictions for one token of a sparse model's FFNs.

    Args:
        modules: the model's sparse FFNs, backend ``cpu``.
        states: as in ``bench_mlp``.
        repeats: calls of each variant.

    Returns:
        ``ffn_ms``: the dense FFN by our kernels, of which a prediction saves a part. ``rows``:
        ``name``, ``ms``, ``share`` of the FFN's time and ``bytes`` of weights read, for

        - ``router``: the low-rank or linear map, argmax and look-up of the set, as calls of their own,
          which is more than they take inside the fused operation;
        - ``per-neuron predictor``: Deja Vu's [H → H/9 → I], and the indices of what is above zero;
        - ``dense gate``: CATS's gate projection, activation, and the indices above a threshold.
    """
    layers = bench_layers(modules)
    hidden_size, neurons = layers[0].cost.hidden_size, layers[0].cost.intermediate_size
    dtype, element_size = layers[0].router.up.dtype, layers[0].cost.element_size
    rank = max(1, hidden_size // _HIDDEN_PER_RANK)
    generator = torch.Generator().manual_seed(0)
    predictors = [
        tuple(
            (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(dtype)
            for shape in ((rank, hidden_size), (neurons, rank))
        )
        for _ in layers
    ]
    linear = torch.ops.sparse_runtime.cpu_linear

    def router(layer: int, x: Tensor) -> Tensor:
        weights = layers[layer].router
        y = x if weights.down is None else linear(x, weights.down, None)
        ids = linear(y, weights.up, weights.bias).argmax(-1)
        return layers[layer].tables.active_sets[ids]

    def per_neuron(layer: int, x: Tensor) -> Tensor:
        down, up = predictors[layer]
        return (linear(linear(x, down, None), up, None) > 0).nonzero()

    def dense_gate(layer: int, x: Tensor) -> Tensor:
        module = layers[layer]
        gate = linear(x, module.weights.gate, None)
        return (ACTIVATION_FUNCTIONS[module.activation](gate).abs() > 0.1).nonzero()

    variants: dict[str, Variant] = {
        "ffn": lambda i, x: layers[i].all_rows(x),
        "router": router,
        "per-neuron predictor": per_neuron,
        "dense gate": dense_gate,
    }
    seconds, _ = over_layers(variants, layers, 1, repeats, states)
    weights = layers[0].router
    elements = {
        "router": router_parameter_count(
            hidden_size,
            len(weights.up),
            None if weights.down is None else len(weights.down),
        ),
        "per-neuron predictor": rank * (hidden_size + neurons),
        "dense gate": hidden_size * neurons,
    }
    return {
        "ffn_ms": 1e3 * seconds["ffn"],
        "rows": [
            {
                "name": name,
                "ms": 1e3 * seconds[name],
                "share": seconds[name] / seconds["ffn"],
                "bytes": element_size * count,
            }
            for name, count in elements.items()
        ],
    }
