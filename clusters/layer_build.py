"""One layer's clusters: importance → clustering → router → the sets that the router gets right."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_runtime.architectures import FFNLayer
from sparse_runtime.atomic import write_tensors
from sparse_runtime.bitmaps import pack_bits
from sparse_runtime.cluster_set import LayerClusters
from sparse_runtime.clusters.awc import (
    Clustering,
    best_sets,
    cluster_means,
    coverage_matrix,
    fit_awc,
    top_sets,
)
from sparse_runtime.clusters.awc_paper import AWCPaperConfig, fit_awc_paper
from sparse_runtime.clusters.binary_patterns import PackedPatterns, percentile_threshold
from sparse_runtime.clusters.capture import HiddenStates
from sparse_runtime.clusters.config import BuildConfig
from sparse_runtime.clusters.importance import (
    ImportanceMatrix,
    ImportanceScorer,
    chunk_slices,
    importance_scorer,
)
from sparse_runtime.clusters.metrics import SetScorer
from sparse_runtime.cost import FFNCost, router_parameter_count
from sparse_runtime.errors import ConfigError
from sparse_runtime.predictors import Router, new_router
from sparse_runtime.predictors.training import (
    RouterTraining,
    initial_router,
    route,
    train_router,
)

_CHUNK_TOKENS = 4096
# Weight, in tokens, of the layer's mean pattern in a recomputed centroid (docs/LOG.md).
_SHRINKAGE = 8.0
# Before a reassignment one epoch is enough: the start in closed form is nearly there.
_ROUND_TRAINING = RouterTraining(max_epochs=1)


@dataclass
class LayerData:
    """A layer's calibration tokens, the last of them held out.

    Attributes:
        hidden_states: [N, H] float32.
        importance: [N, I] bfloat16.
        num_fit: tokens to fit on; the rest are held out.
    """

    hidden_states: Tensor
    importance: Tensor
    num_fit: int

    def free(self) -> None:
        """Let go of the tensors."""
        self.hidden_states = self.importance = torch.empty(0)

    @property
    def fit(self) -> slice:
        """Rows to fit on."""
        return slice(0, self.num_fit)

    @property
    def held_out(self) -> slice:
        """Rows to judge by."""
        return slice(self.num_fit, len(self.hidden_states))


def layer_cost(layer: FFNLayer, config: BuildConfig, rank: int | None) -> FFNCost:
    """Cost of a layer with a router of this rank, in the runtime's default bfloat16."""
    extra = router_parameter_count(layer.hidden_size, config.num_clusters, rank)
    if config.adds_bias:
        extra += layer.hidden_size
    return FFNCost(layer.hidden_size, layer.intermediate_size, extra)


def set_size_for(layer: FFNLayer, config: BuildConfig, rank: int | None) -> int:
    """Neurons per active set that the budget allows beside a router of this rank.

    Raises:
        ConfigError: the router alone exceeds the budget.
    """
    cost = layer_cost(layer, config, rank)
    size = int(cost.density_for(config.budget) * layer.intermediate_size)
    if size < 1:
        kind = "linear router" if rank is None else f"router of rank {rank}"
        raise ConfigError(
            f"budget is {config.budget}, but the {kind} for {config.num_clusters} clusters alone "
            f"costs {cost.share(0):.3f} of the FFN; expected a larger budget, fewer clusters or a "
            "smaller router rank"
        )
    return size


def load_layer(
    states: HiddenStates,
    position: int,
    layer: FFNLayer,
    config: BuildConfig,
    *,
    num_fit: int,
    work: Path,
    fisher: Tensor | None = None,
) -> tuple[LayerData, ImportanceMatrix]:
    """Read a layer's hidden states and score its neurons.

    ``fisher`` is the layer's ``fisher_weights`` [I], used for importance ``fisher``.

    Returns:
        The data and the matrix behind its importance, to be closed after use.
    """
    hidden_states = states.layer(position)
    matrix = ImportanceMatrix(
        len(hidden_states),
        layer.intermediate_size,
        memory_mib=config.memory_mib,
        spill_file=work / "importance.bin",
    )
    by_fisher = config.method == "awc" and config.importance == "fisher"
    scorer = importance_scorer(layer, fisher if by_fisher else None)
    device = layer.gate.weight.device
    for rows in chunk_slices(len(hidden_states), _CHUNK_TOKENS):
        matrix.values[rows] = scorer(hidden_states[rows].to(device)).to("cpu", torch.bfloat16)
    if config.importance == "binary" or config.method == "awc-paper":
        chunks = (matrix.values[r] for r in chunk_slices(num_fit, _CHUNK_TOKENS))
        threshold = percentile_threshold(chunks, config.percentile)
        for rows in chunk_slices(len(hidden_states), _CHUNK_TOKENS):
            matrix.values[rows] = (matrix.values[rows] > threshold).to(torch.bfloat16)
    return LayerData(hidden_states, matrix.values, num_fit), matrix


def packed_patterns(importance: Tensor) -> PackedPatterns:
    """Bit-pack binary importance [N, I]."""
    bits = [pack_bits(importance[r] > 0) for r in chunk_slices(len(importance), _CHUNK_TOKENS)]
    return PackedPatterns(torch.cat(bits), importance.shape[1])


def fit_paper_clusters(
    patterns: PackedPatterns, config: BuildConfig, density: float, generator: torch.Generator
) -> Clustering:
    """Cluster with the paper's method: centroids that keep the top ``density`` of positions."""
    result = fit_awc_paper(
        patterns,
        AWCPaperConfig(
            num_clusters=config.num_clusters,
            top_percentile=min(max(1 - density, 1e-6), 1 - 1e-6),
            init=config.paper_init,
        ),
        generator=generator,
    )
    return Clustering(result.centroids, result.means, result.assignment, result.history)


def fit_clusters(
    data: LayerData, config: BuildConfig, set_size: int, generator: torch.Generator
) -> Clustering:
    """Cluster a layer's fit tokens with the configured method."""
    importance = data.importance[data.fit]
    if config.method == "awc-paper":
        density = set_size / importance.shape[1]
        return fit_paper_clusters(packed_patterns(importance), config, density, generator)
    if config.clustering_tokens < len(importance):
        sample = torch.randperm(len(importance), generator=generator)[: config.clustering_tokens]
        importance = importance[sample.sort().values]
    return fit_awc(
        importance,
        num_clusters=config.num_clusters,
        set_size=set_size,
        generator=generator,
    )


def fit_router(
    data: LayerData,
    clustering: Clustering,
    config: BuildConfig,
    rank: int | None,
    set_size: int,
    generator: torch.Generator,
) -> tuple[Router, Tensor, Tensor, list[float]]:
    """Train a layer's router, then let the sets follow it.

    After each training the tokens are reassigned by the router and the centroids recomputed from
    *its* assignment, so that a set holds what the tokens it really gets need.

    Returns:
        Router, active sets bool [K, I], centroids [K, I], held-out coverage along the training.
    """
    num_clusters = len(clustering.active_sets)
    sets, centroids = clustering.active_sets, clustering.centroids
    importance = data.importance[data.fit]
    assignment = best_sets(importance, sets)[1]
    router = initial_router(data.hidden_states[data.fit], assignment, num_clusters, rank)
    rounds = config.router_rounds if config.method == "awc" else 0
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
            centroids = cluster_means(importance, assignment, num_clusters, _SHRINKAGE)
            sets = top_sets(centroids, set_size)
    return router, sets, centroids, history


def estimated_loss(
    data: LayerData, scorer: ImportanceScorer, router: Router, sets: Tensor
) -> float:
    """Mean over held-out tokens of Σ e² over the neurons that the router's choice leaves out.

    In units of the loss if the scorer has Fisher weights, so that layers may be added up.
    """
    states = data.hidden_states[data.held_out]
    ids = route(router, states)
    left_out = [
        (scorer(states[rows]).square_() * ~sets[ids[rows]]).sum(-1)
        for rows in chunk_slices(len(states), _CHUNK_TOKENS)
    ]
    return 0.5 * torch.cat(left_out).mean().item()


@dataclass
class FittedLayer:
    """A layer's router and what is needed to cut sets for any budget.

    Attributes:
        router: trained, rounded to bfloat16.
        sets: active sets of equal size, bool [K, I].
        centroids: mean normalized importance of each cluster's tokens [K, I].
        shares: share of fit tokens that the router sends to each cluster [K].
        losses: mean estimated loss of leaving a neuron out, e² by Fisher importance [K, I]; None
            without it.
        activations: mean h of each cluster's tokens [K, I]; None without a bias.
        figures: of clustering and training, as JSON.
    """

    router: Router
    sets: Tensor
    centroids: Tensor
    shares: Tensor
    losses: Tensor | None
    activations: Tensor | None
    figures: dict[str, Any]


def fit_layer(
    data: LayerData,
    layer: FFNLayer,
    config: BuildConfig,
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
    started = time.perf_counter()
    clustering = clustering or fit_clusters(data, config, set_size, generator)
    clustered = time.perf_counter()
    router, sets, centroids, history = fit_router(
        data, clustering, config, rank, set_size, generator
    )
    router = router.to(torch.bfloat16).float()
    num_clusters = len(sets)
    assignment = route(router, data.hidden_states[data.fit])
    sizes = torch.bincount(assignment, minlength=num_clusters)
    losses, activations = _cluster_statistics(data, layer, config, fisher, assignment, num_clusters)
    figures = {
        "index": layer.index,
        "iterations": clustering.history,
        "router_coverage": history,
        "cluster_sizes": sizes.tolist(),
        "unassigned": int((clustering.assignment < 0).sum()),
        "seconds": {
            "clustering": clustered - started,
            "router": time.perf_counter() - clustered,
        },
    }
    shares = sizes / sizes.sum()
    return FittedLayer(router, sets, centroids, shares, losses, activations, figures)


def _cluster_statistics(
    data: LayerData,
    layer: FFNLayer,
    config: BuildConfig,
    fisher: Tensor | None,
    assignment: Tensor,
    num_clusters: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Mean e² and mean h of each cluster's tokens, [K, I] each; None what the build does not need.

    No token's total e² counts above the 99th percentile: without the clip a handful of tokens with
    huge activations decides the threshold.
    """
    allocates = config.method == "awc" and config.allocation == "fisher"
    if not (allocates or config.adds_bias):
        return None, None
    states = data.hidden_states[data.fit]
    scorer = importance_scorer(layer, fisher)
    weights = scorer.neuron_weights
    sample = states[:: max(1, len(states) // _CHUNK_TOKENS)]
    limit = scorer(sample).square_().sum(-1).quantile(0.99)

    def statistics(chunk: Tensor) -> Tensor:
        activations = scorer.activations(chunk)
        squares = (activations * weights).square_()
        squares *= (limit / squares.sum(-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
        return torch.cat([squares, activations], dim=-1)

    means = cluster_means(states, assignment, num_clusters, _SHRINKAGE, statistics)
    losses, activations = means.chunk(2, dim=-1)
    return (
        losses.contiguous() if allocates else None,
        activations.contiguous() if config.adds_bias else None,
    )


def finish_layer(
    data: LayerData, layer: FFNLayer, config: BuildConfig, fitted: FittedLayer, sets: Tensor
) -> tuple[LayerClusters, dict[str, float]]:
    """Turn a fitted layer and its final sets into the artifact's layer.

    Args:
        data: the layer's tokens.
        layer: its FFN.
        config: settings.
        fitted: router and centroids.
        sets: active sets bool [K, I].

    Returns:
        The layer, and its scores on the held-out tokens by the router's ids.
    """
    importance = data.importance[data.fit]
    overall = cluster_means(importance, torch.zeros(len(importance), dtype=torch.int64), 1)
    mean_size = max(1, round((sets.sum(-1) * fitted.shares).sum().item()))
    static_set = top_sets(overall, mean_size)[0]
    bias = None
    if fitted.activations is not None:
        left_out = fitted.activations.masked_fill(sets, 0)
        bias = left_out @ layer.down.weight.detach().float().cpu().t()
    scorer = SetScorer(sets, static_set)
    held_out_ids = route(fitted.router, data.hidden_states[data.held_out])
    scorer.add(data.importance[data.held_out], held_out_ids)
    state = {name: tensor.detach() for name, tensor in fitted.router.state_dict().items()}
    clusters = LayerClusters(
        active_sets=pack_bits(sets),
        static_set=pack_bits(static_set),
        router_down=state.get("down"),
        router_up=state["up"],
        router_bias=state["bias"],
        cluster_bias=bias,
        centroids=fitted.centroids if config.save_centroids else None,
    )
    return clusters, scorer.scores()


_FITTED_TENSORS = ("sets", "centroids", "shares", "losses", "activations")


def save_fitted(file: Path, fitted: FittedLayer) -> None:
    """Write a fitted layer, atomically, to go on from after an interruption."""
    tensors = {f"router.{name}": tensor for name, tensor in fitted.router.state_dict().items()}
    for name in _FITTED_TENSORS:
        tensor = getattr(fitted, name)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    write_tensors(file, tensors, {"figures": json.dumps(fitted.figures)})


def load_fitted(file: Path) -> FittedLayer:
    """Read what :func:`save_fitted` wrote."""
    with safe_open(file, framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        figures = json.loads(reader.metadata()["figures"])
    state = {
        name.removeprefix("router."): tensors.pop(name)
        for name in list(tensors)
        if name.startswith("router.")
    }
    rank = state["down"].shape[0] if "down" in state else None
    hidden_size = state["down" if "down" in state else "up"].shape[1]
    router = new_router(hidden_size, len(state["bias"]), rank)
    router.load_state_dict(state)
    fields = {name: tensors.get(name) for name in _FITTED_TENSORS}
    return FittedLayer(router=router, figures=figures, **fields)  # type: ignore[arg-type]
