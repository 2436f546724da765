"""One layer's clusters: importance → clustering → router → the sets that the router gets right."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_runtime.artifact.bands import LayerCentroids
from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.clusters.awc import (
    Clustering,
    best_sets,
    cluster_means,
    coverage_matrix,
    expert_counts,
    fit_awc,
    top_sets,
)
from sparse_runtime.clusters.config import BuildSettings
from sparse_runtime.clusters.importance import (
    chunk_rows,
    chunk_slices,
    importance_scorer,
)
from sparse_runtime.clusters.layer_data import LayerData, packed_patterns, set_size_for
from sparse_runtime.clusters.metrics import SetScorer
from sparse_runtime.clusters.paper.awc_paper import AWCPaperConfig, fit_awc_paper
from sparse_runtime.clusters.paper.binary_patterns import PackedPatterns
from sparse_runtime.files import write_tensors
from sparse_runtime.kernels.bitmaps import pack_bits, union, unpack_bits
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.predictors import Router, new_router
from sparse_runtime.predictors.training import (
    RouterTraining,
    initial_router,
    route,
    train_router,
)

# That tell how large a token's Σ e² is.
_SAMPLED_TOKENS = 4096
# Weight, in tokens, of the layer's mean pattern in a recomputed centroid (docs/LOG.md).
_SHRINKAGE = 8.0
# Likewise, of the mean gradient in a cluster's.
_WEIGHT_SHRINKAGE = 20.0
# Before a reassignment one epoch is enough: the start in closed form is nearly there.
_ROUND_TRAINING = RouterTraining(max_epochs=1)


def fit_paper_clusters(
    patterns: PackedPatterns, config: BuildSettings, density: float, generator: torch.Generator
) -> Clustering:
    """Cluster with the paper's method: centroids that keep the top ``density`` of positions."""
    result = fit_awc_paper(
        patterns,
        AWCPaperConfig(
            num_clusters=config.num_clusters,
            top_percentile=min(max(1 - density, 1e-6), 1 - 1e-6),
            init=config.paper_init or "random",
        ),
        generator=generator,
    )
    return Clustering(result.centroids, result.means, result.assignment, result.history)


def fit_clusters(
    data: LayerData, config: BuildSettings, set_size: int, generator: torch.Generator
) -> Clustering:
    """Cluster a layer's fit tokens with the configured method."""
    importance = data.importance[data.fit]
    if config.method == "awc-paper":
        density = set_size / importance.shape[1]
        return fit_paper_clusters(packed_patterns(importance), config, density, generator)
    present = data.present_in_fit
    if config.clustering_tokens is not None and config.clustering_tokens < len(importance):
        sample = torch.randperm(len(importance), generator=generator)[: config.clustering_tokens]
        sample = sample.sort().values
        importance = importance[sample]
        present = None if present is None else present[sample]
    return fit_awc(
        importance,
        num_clusters=config.num_clusters,
        set_size=set_size,
        generator=generator,
        present=present,
    )


def fit_router(
    data: LayerData,
    clustering: Clustering,
    config: BuildSettings,
    rank: int | None,
    set_size: int,
    generator: torch.Generator,
) -> tuple[Router, Tensor, list[float]]:
    """Train a layer's router, then let the sets follow it.

    After each training the tokens are reassigned by the router and the centroids recomputed from
    *its* assignment, so that a set holds what the tokens it really gets need.

    Returns:
        Router, active sets bool [K, I], held-out coverage along the training.
    """
    num_clusters = len(clustering.active_sets)
    sets = clustering.active_sets.to(data.importance.device)
    importance = data.importance[data.fit]
    assignment = best_sets(importance, sets)[1]
    router = initial_router(data.hidden_states[data.fit], assignment, num_clusters, rank)
    rounds = config.router_rounds
    history: list[float] = []
    for number in range(rounds + 1):
        coverage = coverage_matrix(data.importance, sets, torch.float16)
        history += train_router(
            router,
            data.hidden_states[data.fit],
            coverage[data.fit],
            data.hidden_states[data.held_out],
            coverage[data.held_out],
            generator=generator,
            config=_ROUND_TRAINING if number < rounds else RouterTraining(),
        )
        if number < rounds:
            assignment = route(router, data.hidden_states[data.fit])
            means = cluster_means(
                importance, assignment, num_clusters, _SHRINKAGE, present=data.present_in_fit
            )
            sets = top_sets(means, set_size)
    return router, sets, history


@dataclass
class FittedLayer:
    """A layer's router and what is needed to cut sets for any budget, on the CPU.

    Attributes:
        router: trained, rounded to bfloat16.
        sets: active sets of equal size, bool [K, I].
        centroids: what the final sets are cut from, by the router's own assignment.
        figures: of clustering and training, as JSON.
    """

    router: Router
    sets: Tensor
    centroids: LayerCentroids
    figures: dict[str, Any]


def fit_layer(
    data: LayerData,
    layer: FFNLayer,
    config: BuildSettings,
    rank: int | None,
    fisher: Tensor | None,
    generator: torch.Generator,
    clustering: Clustering | None = None,
) -> FittedLayer:
    """Cluster one layer and train its router.

    Args:
        data: the layer's tokens.
        layer: its FFN.
        config: settings.
        rank: of the router, None for linear.
        fisher: the layer's ``fisher_weights`` [I], if there are any.
        generator: randomness, on the CPU.
        clustering: clusters to use instead of fitting them here (pooled over layers).
    """
    set_size = set_size_for(layer, config, rank)
    clustering = clustering or fit_clusters(data, config, set_size, generator)
    return follow_router(data, layer, clustering, config, rank, fisher, generator)


def follow_router(
    data: LayerData,
    layer: FFNLayer,
    clustering: Clustering,
    config: BuildSettings,
    rank: int | None,
    fisher: Tensor | None,
    generator: torch.Generator,
) -> FittedLayer:
    """Train a router for given clusters; sets and centroids are those of the tokens it sends there.

    Arguments as of :func:`fit_layer`.
    """
    set_size = set_size_for(layer, config, rank)
    router, sets, history = fit_router(data, clustering, config, rank, set_size, generator)
    router = router.to(torch.bfloat16).float()
    assignment = route(router, data.hidden_states[data.fit])
    figures = {
        "index": layer.index,
        "iterations": clustering.history,
        "router_coverage": history,
        "cluster_sizes": torch.bincount(assignment, minlength=len(sets)).tolist(),
        "unassigned": int((clustering.assignment < 0).sum()),
    }
    centroids = layer_centroids(data, layer, fisher, assignment, len(sets))
    return FittedLayer(router.cpu(), sets.cpu(), centroids, figures)


def layer_centroids(
    data: LayerData,
    layer: FFNLayer,
    fisher: Tensor | None,
    assignment: Tensor,
    num_clusters: int,
) -> LayerCentroids:
    """Centroids of the fit tokens, by Fisher weights or else by ‖down_i‖₂; means in bfloat16.

    The latter are scaled so that every layer's mean Σ e² is one, as nothing else makes layers
    comparable. No token's Σ e² counts above the 99th percentile: without the clip a handful of tokens
    with huge activations decides the price. An artifact holds means in bfloat16, and so a cut of it is
    what the build cut; and a build holds those of all layers.
    """
    states = data.hidden_states[data.fit]
    scorer = importance_scorer(layer, fisher)
    sample = scorer(states[:: max(1, len(states) // _SAMPLED_TOKENS)].float()).square_().sum(-1)
    if fisher is None:
        scale = sample.mean().clamp_min(1e-30)
        scorer = replace(scorer, neuron_weights=scorer.neuron_weights / scale.sqrt())
        sample = sample / scale
    limit = sample.quantile(0.99)

    def moments(chunk: Tensor) -> Tensor:
        activations = scorer.activations(chunk.float())
        magnitudes = activations.abs() * scorer.neuron_weights
        squares = magnitudes.square()
        clip = (limit / squares.sum(-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
        return torch.stack([squares * clip, magnitudes * clip.sqrt(), activations], dim=1)

    present = data.present_in_fit
    width = 3 * layer.intermediate_size
    means = cluster_means(
        states, assignment, num_clusters, _SHRINKAGE, moments, present, width=width
    )
    squares, magnitudes, activations = (part.bfloat16().cpu() for part in means.unbind(1))
    shares = torch.bincount(assignment, minlength=num_clusters) / len(assignment)
    weights = scorer.neuron_weights.cpu()
    own = None if present is None else _expert_shares(assignment, present, num_clusters).cpu()
    return LayerCentroids(squares, magnitudes, activations, shares.cpu(), weights, own)


def _expert_shares(assignment: Tensor, present: Tensor, num_clusters: int) -> Tensor:
    """Share of each cluster's tokens that have each expert [K, E], shrunk toward that of all tokens."""
    counts = expert_counts(assignment, present, num_clusters)
    tokens = torch.bincount(assignment, minlength=num_clusters).unsqueeze(-1)
    overall = present.float().mean(0)
    return (counts + _SHRINKAGE * overall) / (tokens + _SHRINKAGE)


def cluster_weights(assignment: Tensor, gradients: Tensor, num_clusters: int) -> Tensor:
    """v_k = sqrt(mean of ‖∂loss/∂y(t)‖² over a cluster's tokens ÷ mean over all) [K] float32.

    What is left out of a token's output changes predictions the more, the larger that gradient is, and
    clusters differ by factors of two. Shrunk toward one by :data:`_WEIGHT_SHRINKAGE` tokens.

    Args:
        assignment: clusters of some tokens [n] int64.
        gradients: as of ``LayerFisher.tokens`` [n].
        num_clusters: K.
    """
    known = gradients.isfinite()
    assignment, gradients = assignment[known], gradients[known].double()
    mean = gradients.mean()
    if not mean > 0:  # a layer that outputs nothing may still have none
        return torch.ones(num_clusters)
    sums = torch.zeros(num_clusters, dtype=torch.float64)
    sums = sums.index_add_(0, assignment, gradients / mean) + _WEIGHT_SHRINKAGE
    counts = torch.bincount(assignment, minlength=num_clusters) + _WEIGHT_SHRINKAGE
    return (sums / counts).sqrt().float()


def uncut_layer(
    layer: FFNLayer,
    config: BuildSettings,
    fitted: FittedLayer,
    base_error: float | None = None,
    weights: Tensor | None = None,
) -> LayerClusters:
    """The artifact's layer with sets of equal size, before a price cuts better ones."""
    size = fitted.sets.sum(-1).float().mean().item()
    bias = None
    if config.cluster_bias:
        left_out = fitted.centroids.mean_activations.masked_fill(fitted.sets, 0)
        left_out = fitted.centroids.of_tokens(left_out)
        bias = left_out @ layer.down_rows().float().cpu()
    state = {name: tensor.detach() for name, tensor in fitted.router.state_dict().items()}
    return LayerClusters(
        active_sets=pack_bits(fitted.sets),
        static_set=pack_bits(fitted.centroids.static_set(size)),
        router_down=state.get("down"),
        router_up=state["up"],
        router_bias=state["bias"],
        cluster_bias=bias,
        cluster_weights=weights,
        weights=config.weights,
        base_error=base_error,
        experts=layer.experts or None,
        centroids=fitted.centroids,
    )


def held_out_scores(
    hidden_states: Tensor, layer: FFNLayer, clusters: LayerClusters, router: Router
) -> dict[str, float]:
    """Scores of a layer's sets, both bands together, by norm importance and the router's ids.

    Args:
        hidden_states: held-out tokens [n, H], any float dtype.
        layer: the FFN.
        clusters: the final sets.
        router: the layer's router.
    """
    sets = union(clusters.active_sets, clusters.maybe_sets)
    neurons = layer.intermediate_size
    set_scorer = SetScorer(unpack_bits(sets, neurons), unpack_bits(clusters.static_set, neurons))
    scorer, ids = importance_scorer(layer), route(router, hidden_states)
    for rows in chunk_slices(len(hidden_states), chunk_rows(neurons)):
        x = hidden_states[rows].to(scorer.gate.device).float()
        set_scorer.add(scorer(x).cpu(), ids[rows])
    return set_scorer.scores()


def save_fitted(file: Path, fitted: FittedLayer) -> None:
    """Write a fitted layer, atomically, to go on from after an interruption."""
    tensors = {f"router.{name}": tensor for name, tensor in fitted.router.state_dict().items()}
    tensors |= {
        f"centroids.{name}": tensor
        for name, tensor in vars(fitted.centroids).items()
        if tensor is not None
    }
    tensors["sets"] = fitted.sets
    write_tensors(
        file,
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {"figures": json.dumps(fitted.figures)},
    )


def load_fitted(file: Path) -> FittedLayer:
    """Read what :func:`save_fitted` wrote."""
    with safe_open(file, framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        figures = json.loads(reader.metadata()["figures"])

    def group(prefix: str) -> dict[str, Tensor]:
        named = ((name.partition(".")[::2], tensor) for name, tensor in tensors.items())
        return {name: tensor for (first, name), tensor in named if first == prefix}

    state = group("router")
    rank = state["down"].shape[0] if "down" in state else None
    hidden_size = state["down" if "down" in state else "up"].shape[1]
    router = new_router(hidden_size, len(state["bias"]), rank)
    router.load_state_dict(state)
    return FittedLayer(router, tensors["sets"], LayerCentroids(**group("centroids")), figures)
