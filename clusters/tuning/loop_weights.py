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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.clusters.capture import not_finite
from sparse_runtime.clusters.fisher import checkpointed
from sparse_runtime.clusters.tuning.student import DenseStates, divergence, students
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.progress import ProgressReporter, SilentProgress

# No layer counts for less than this of what its Fisher weights say.
_LEAST = 0.1


def loop_weights(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    *,
    dense_states: DenseStates | None = None,
    progress: ProgressReporter | None = None,
) -> dict[int, float]:
    """Measure r_ℓ.

    Args:
        model: the dense model, dense again when this returns.
        clusters: cut for a budget, with centroids.
        windows: token ids [W, window] int64; some 4,096 tokens do.
        dense_states: of ``windows``, by their numbers; if None, the dense model runs.
        progress: reports one unit per window.

    Returns:
        Layer index -> r_ℓ of the line, at least 0.1. Without a layer that leaves something out, 1.

    Raises:
        ModelError: what is measured of a layer is not finite.
    """
    measured = _measured(model, clusters, windows, dense_states, progress or SilentProgress())
    layers = find_ffn_layers(model, packed=True)
    return _line({x.index: x.depth for x in layers if x.index in clusters.layers}, measured)


def _measured(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    dense_states: DenseStates | None,
    progress: ProgressReporter,
) -> dict[int, float]:
    """r_ℓ of each layer that leaves something out."""
    with (
        students(model, clusters.layers, 0, 0) as modules,
        checkpointed(model, windows.shape[1]),
        progress.task("weigh layers", len(windows)) as advance,
    ):
        for module in modules.values():
            device = module.bias_shift.device
            module.restored = torch.zeros((), requires_grad=True, device=device)
        left_out = dict.fromkeys(modules, 0.0)
        for number, window in zip(
            torch.arange(len(windows)).split(1), windows.split(1), strict=True
        ):
            states = None if dense_states is None else dense_states(number)
            loss = divergence(model, modules, window.to(model.device), states)
            if loss.requires_grad:
                loss.backward()
            for index, module in modules.items():
                left_out[index] += module.left_out
            advance(1)
        measured = {}
        for index, module in modules.items():
            gradient = None if module.restored is None else module.restored.grad
            if gradient is None or left_out[index] == 0:
                continue  # it outputs nothing, or every neuron is computed
            measured[index] = -gradient.item() / left_out[index]
            if not math.isfinite(measured[index]):
                raise not_finite(model, f"the loop weight of layer {index}")
        return measured


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
    """An artifact whose layers' e² are multiplied by weights, to be cut anew."""
    layers = {}
    for index, layer in clusters.layers.items():
        assert layer.centroids is not None
        centroids, weight = layer.centroids, weights[index]
        root = weight**0.5
        layers[index] = replace(
            layer,
            centroids=replace(
                centroids,
                mean_squares=centroids.mean_squares * weight,
                mean_magnitudes=centroids.mean_magnitudes * root,
                neuron_weights=centroids.neuron_weights * root,
            ),
        )
    return replace(clusters, layers=layers)
