"""How much a layer's neurons count in the sparse model, by depth.

Fisher weights foretell what one sparse layer does to a dense model. With all layers sparse, early
layers matter less: much of what they leave out is lost again in the layers behind them. So each
layer's e² is scaled by what restoring the layer is really worth,

    r_ℓ = −∂KL(dense ‖ sparse)/∂α_ℓ / Σ e² left out in ℓ,    at α = 0,

where α_ℓ is the share of what layer ℓ leaves out that is given back, and e² is as Fisher weights have
it; r_ℓ = 1 for a layer that is sparse alone. Single layers are noisy, so r_ℓ is taken from a line
through all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.capture import not_finite
from sparse_runtime.clusters.fisher import without_gradients
from sparse_runtime.clusters.ranks import Ranks
from sparse_runtime.clusters.sweep import Sweep
from sparse_runtime.clusters.tuning.student import DenseStates, SparseParts
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.output_head import output_head
from sparse_runtime.progress import ProgressReporter, SilentProgress

# No layer counts for less than this of what its Fisher weights say.
_LEAST = 0.1


def loop_weights(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    *,
    dense_states: DenseStates | None = None,
    buffers: Buffers | None = None,
    ranks: Ranks | None = None,
    progress: ProgressReporter | None = None,
) -> dict[int, float]:
    """Measure r_ℓ.

    Args:
        model: the dense model, dense again when this returns.
        clusters: cut for a budget, with centroids.
        windows: token ids [W, window] int64; some 4,096 tokens do.
        dense_states: of ``windows``, by their numbers; if None, the dense model runs.
        buffers, ranks: as of ``fisher_weights``.
        progress: reports one unit per window and decoder layer, twice.

    Returns:
        Layer index -> r_ℓ of the line, at least 0.1. Without a layer that leaves something out, 1.

    Raises:
        ModelError: what is measured of a layer is not finite.
    """
    with buffers or Buffers() as own:
        measured = _measured(
            model, clusters, windows, dense_states, progress or SilentProgress(), own, ranks
        )
    layers = find_ffn_layers(model, packed=True)
    return _line({x.index: x.depth for x in layers if x.index in clusters.layers}, measured)


def _measured(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    dense_states: DenseStates | None,
    progress: ProgressReporter,
    buffers: Buffers,
    ranks: Ranks | None = None,
) -> dict[int, float]:
    """r_ℓ of each layer that leaves something out."""
    ranks = ranks or Ranks()
    rows = ranks.rows(len(windows))
    mine = windows[rows]

    def states(numbers: Tensor) -> Tensor:
        assert dense_states is not None
        return dense_states(numbers + rows.start)

    def sums() -> dict[int, tuple[float, float]]:
        own = None if dense_states is None else states
        return _sums(model, clusters, mine, own, progress, buffers) if len(mine) else {}

    parts = ranks.together(sums)
    measured = {}
    for index in sorted({index for part in parts for index in part}):
        found = [part[index] for part in parts if index in part]
        gradient, left_out = (math.fsum(values) for values in zip(*found, strict=True))
        if left_out == 0:
            continue  # every neuron is computed
        measured[index] = -gradient / left_out
        if not math.isfinite(measured[index]):
            raise not_finite(model, f"the loop weight of layer {index}")
    return measured


def _sums(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    dense_states: DenseStates | None,
    progress: ProgressReporter,
    buffers: Buffers,
) -> dict[int, tuple[float, float]]:
    """Σ over windows of ∂KL/∂α and of Σ e² left out, of each layer that has a gradient."""
    layers = [
        layer for layer in find_ffn_layers(model, packed=True) if layer.index in clusters.layers
    ]
    sweep, head = Sweep(model, windows, buffers), output_head(model)
    sparse = SparseParts(sweep, layers, clusters.layers)
    restored: dict[int, Tensor] = {}
    left_out: dict[int, float] = {layer.index: 0.0 for layer in layers}

    @contextmanager
    def given_back(number: int) -> Iterator[None]:
        with sparse(number):
            for index, module in sparse.running.items():
                module.restored = restored[index] = torch.zeros(
                    (), requires_grad=True, device=module.bias_shift.device
                )
            yield

    def note(number: int, window: int) -> None:
        for index, module in sparse.running.items():
            left_out[index] += module.left_out

    if dense_states is None:
        sweep.forward()
        finals = [sweep.final(window) for window in range(len(windows))]
        dense_states = lambda numbers: torch.stack([finals[n] for n in numbers.tolist()])  # noqa: E731
        sweep = Sweep(model, windows, buffers)
    found_dense = dense_states

    def loss(window: int, states: Tensor) -> Tensor:
        with torch.no_grad():
            expected = (
                head(found_dense(torch.tensor([window]))[0].to(states)).float().log_softmax(-1)
            )
        found = head(states).float().log_softmax(-1)
        return F.kl_div(found, expected, reduction="sum", log_target=True) / len(expected)

    with without_gradients(model), progress.task("weigh layers", 2 * sweep.steps) as advance:
        sweep.forward(sparse, keep=True, advance=advance)
        sweep.backward(loss, given_back, ran=note, advance=advance)
    return {
        index: (share.grad.item(), left_out[index])
        for index, share in restored.items()
        if share.grad is not None
    }


def _line(depths: dict[int, int], measured: dict[int, float]) -> dict[int, float]:
    """Values of a line through those that were measured, by the layers' depths."""
    if len({depths[index] for index in measured}) < 3:
        return dict.fromkeys(depths, 1.0)
    # Not by LAPACK, whose last digit depends on where in memory its input lies.
    middle = math.fsum(depths[index] for index in measured) / len(measured)
    mean = math.fsum(measured.values()) / len(measured)
    spread = math.fsum((depths[index] - middle) ** 2 for index in measured)
    slope = math.fsum((depths[i] - middle) * value for i, value in measured.items()) / spread
    return {index: max(_LEAST, mean + slope * (at - middle)) for index, at in depths.items()}


def scaled(clusters: ClusterSet, weights: dict[int, float]) -> ClusterSet:
    """An artifact whose layers' e² are multiplied by weights, to be cut anew.

    What e counts in a cluster's tokens takes the root of it, so that centroids stay as they are.
    """
    layers = {}
    for index, layer in clusters.layers.items():
        before = layer.cluster_weights
        own = torch.ones(layer.num_clusters) if before is None else before
        layers[index] = replace(layer, cluster_weights=own * weights[index] ** 0.5)
    return replace(clusters, layers=layers)
