"""What the benchmarks of single FFNs share: tokens, the dense opponent, and a check of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.baselines.registry import captured_states
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels.reference import (
    activations,
    add_compensation,
    sparse_ffn_reference,
)
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers

#: Relative distance of bfloat16 outputs from the reference; a wrong neuron is far beyond.
TOLERANCE = 0.02


class DenseFFN:
    """A dense FFN in torch's own layouts; a sparse model keeps down transposed. Biases are left out.

    Args:
        gate: [I, H].
        up: [I, H], or None.
        down: [H, I], in any layout; copied.
        activation: its name.
    """

    def __init__(self, gate: Tensor, up: Tensor | None, down: Tensor, activation: str) -> None:
        down = down.detach().clone(memory_format=torch.contiguous_format)
        self.weights = (gate.detach(), None if up is None else up.detach(), down)
        self.activation = activation

    @classmethod
    def of(cls, layer: FFNLayer) -> DenseFFN:
        """A layer's, float."""
        gate, up, down_t = layer.rows()
        return cls(gate, up, down_t.t(), layer.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """Map hidden states [n, H] to outputs [n, H]."""
        gate, up, down = self.weights
        return F.linear(activations(x, gate, up, self.activation), down)


def own_states(
    model: Any, clusters: Sequence[ClusterSet], input_ids: Tensor
) -> dict[int, Tensor] | None:
    """Hidden states that the FFNs of a dense model see of a text [1, n]; see :func:`ffn_inputs`.

    None for random clusters: a random model's routers would send its states to a few clusters, and
    confirm any share of them.
    """
    if any(artifact.build.get("method") == "random" for artifact in clusters):
        return None
    return ffn_inputs(model, input_ids)


def ffn_inputs(model: Any, input_ids: Tensor) -> dict[int, Tensor]:
    """Hidden states [n, H] that every FFN of a dense model sees of a text [1, n], by layer index."""
    with captured_states(model, input_ids) as states:
        return {
            layer.index: states.layer(position, dtype=model.dtype)
            for position, layer in enumerate(find_ffn_layers(model))
        }


def tokens_for(module: SparseFFN, count: int, states: Mapping[int, Tensor] | None = None) -> Tensor:
    """Hidden states [count, H] for an FFN: of the model's own, or noise of the size a norm leaves."""
    generator = torch.Generator().manual_seed(module.layer_index)
    if states is not None:
        x = drawn_tokens(states[module.layer_index], count, generator)
    else:
        x = torch.randn(count, module.cost.hidden_size, generator=generator)
    return x.to(module.router.up)


def drawn_tokens(states: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of states [n, H], each once as long as there are enough: [count, H]."""
    order = torch.randperm(len(states), generator=generator)
    return states[order.repeat(-(-count // len(order)))[:count]]


def float_reference(module: SparseFFN, x: Tensor, ids: Tensor) -> Tensor:
    """Outputs [n, H] for clusters [n] by the reference, of float weights."""
    expected = sparse_ffn_reference(x, module.weights, module.tables, ids)
    return add_compensation(expected, x, ids, module.compensation)


def verify_outputs(
    modules: Sequence[SparseFFN],
    run: Callable[[SparseFFN, Tensor], Tensor] | None = None,
    *,
    reference: Callable[[SparseFFN, Tensor, Tensor], Tensor] = float_reference,
    tokens: Sequence[int] = (1, 5),
) -> None:
    """Compare FFNs with the reference before anything is timed, for one token and for several.

    Args:
        modules: the FFNs.
        run: how they run, ``(module, hidden states [n, H]) -> outputs``; called if None.
        reference: what they are compared with, ``(module, hidden states, clusters [n]) -> outputs``.
        tokens: in each of the calls.

    Raises:
        SparseRuntimeError: the outputs are not the same.
    """
    for module in modules:
        for count in tokens:
            x = tokens_for(module, count)
            with torch.inference_mode():
                before = module.cluster_counts.clone()
                found = (module(x) if run is None else run(module, x)).float()
                picked = (module.cluster_counts - before).nonzero().flatten()
                # Routing is compared elsewhere. Of noise, two clusters' logits may be as good as equal:
                # for one token the counters tell which was picked, for several most must agree.
                ids = module.cluster_ids(x) if count > 1 else picked[:1]
                if len(picked) == 0:
                    raise SparseRuntimeError(
                        f"layer {module.layer_index}, {count} tokens: none ran sparse, so there is "
                        "nothing to time; please report this"
                    )
                expected = reference(module, x, ids).float()
            # A token whose neurons are all skipped has an output of zeros.
            size = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            errors = (found - expected).norm(dim=-1) / size
            error = errors.median().item()
            if not error < TOLERANCE:
                raise SparseRuntimeError(
                    f"layer {module.layer_index}, {count} tokens: the sparse FFN is {error:.3f} "
                    f"(relative) away from the reference; expected less than {TOLERANCE}. Its speed "
                    "means nothing; please report this"
                )
