"""One layer's clusters: importance → clustering → router → the sets that the router gets right."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_runtime.architectures import FFNLayer
from sparse_runtime.artifact.bands import LayerCentroids, cut_bands
from sparse_runtime.artifact.cluster_set import LayerClusters
from sparse_runtime.atomic import write_tensors
from sparse_runtime.bitmaps import pack_bits, union, unpack_bits
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

    def at_most(self, tokens: int) -> LayerData:
        """The same with so many tokens to fit on, at most."""
        kept = min(tokens, self.num_fit)
        parts = (slice(0, kept), self.held_out)
        return LayerData(
            torch.cat([self.hidden_states[part] for part in parts]),
            torch.cat([self.importance[part] for part in parts]),
            kept,
        )

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
) -> tuple[Router, Tensor, list[float]]:
    """Train a layer's router, then let the sets follow it.

    After each training the tokens are reassigned by the router and the centroids recomputed from
    *its* assignment, so that a set holds what the tokens it really gets need.

    Returns:
        Router, active sets bool [K, I], held-out coverage along the training.
    """
    num_clusters = len(clustering.active_sets)
    sets = clustering.active_sets
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
            means = cluster_means(importance, assignment, num_clusters, _SHRINKAGE)
            sets = top_sets(means, set_size)
    return router, sets, history


def priced_loss(
    states: Tensor, fitted: FittedLayer, layer: FFNLayer, cost: FFNCost, price: float
) -> float:
    """What a router's clusters lose and cost at a price of λ per neuron, per token.

    Σ e² over what is left out + λ·I·(cost share): the bytes of router, looks and neurons count at
    the price that neurons are bought at, so that routers of different size compare.

    Args:
        states: the layer's inputs for tokens that nothing was fitted on [n, H].
        fitted: its router and centroids.
        layer: its FFN.
        cost: with that router; ``verified`` says whether there are looks.
        price: λ.
    """
    centroids = fitted.centroids
    look_share = cost.look_bytes / cost.neuron_bytes if cost.verified else None
    bands = cut_bands(centroids, price, look_share)
    maybe = torch.zeros_like(bands.sure) if bands.maybe is None else bands.maybe
    scorer = importance_scorer(layer, centroids.neuron_weights)
    ids = route(fitted.router, states)
    loss, num_computed, num_looked = 0.0, 0, 0
    for rows in chunk_slices(len(states), _CHUNK_TOKENS):
        squares = scorer(states[rows].to(scorer.gate.device)).square_().cpu()
        looked = maybe[ids[rows]]
        computed = bands.sure[ids[rows]] | (looked & (squares > price))
        loss += squares.masked_fill_(computed, 0).sum().item()
        num_computed += int(computed.sum())
        num_looked += int(looked.sum())
    count = len(states)
    bytes_read = cost.sparse_bytes(num_computed / count, num_looked / count)
    return loss / count + price * bytes_read / cost.neuron_bytes


def estimated_loss(states: Tensor, scorer: ImportanceScorer, router: Router, sets: Tensor) -> float:
    """Mean over tokens [n, H] of Σ e² over the neurons that the router's choice leaves out.

    In units of the loss if the scorer has Fisher weights, so that layers may be added up.
    """
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
    fitted = follow_router(data, layer, clustering, config, rank, fisher, generator)
    fitted.figures["seconds"] = {
        "clustering": clustered - started,
        "router": time.perf_counter() - clustered,
    }
    return fitted


def follow_router(
    data: LayerData,
    layer: FFNLayer,
    clustering: Clustering,
    config: BuildConfig,
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
    centroids = _layer_centroids(data, layer, fisher, assignment, len(sets))
    return FittedLayer(router, sets, centroids, figures)


def _layer_centroids(
    data: LayerData,
    layer: FFNLayer,
    fisher: Tensor | None,
    assignment: Tensor,
    num_clusters: int,
) -> LayerCentroids:
    """Centroids of the fit tokens, by Fisher weights or else by ‖down_i‖₂.

    The latter are scaled so that every layer's mean Σ e² is one, as nothing else makes layers
    comparable. No token's Σ e² counts above the 99th percentile: without the clip a handful of tokens
    with huge activations decides the price.
    """
    states = data.hidden_states[data.fit]
    scorer = importance_scorer(layer, fisher)
    sample = scorer(states[:: max(1, len(states) // _CHUNK_TOKENS)]).square_().sum(-1)
    if fisher is None:
        scale = sample.mean().clamp_min(1e-30)
        scorer = replace(scorer, neuron_weights=scorer.neuron_weights / scale.sqrt())
        sample = sample / scale
    limit = sample.quantile(0.99)

    def moments(chunk: Tensor) -> Tensor:
        activations = scorer.activations(chunk)
        magnitudes = activations.abs() * scorer.neuron_weights
        squares = magnitudes.square()
        clip = (limit / squares.sum(-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
        return torch.cat([squares * clip, magnitudes * clip.sqrt(), activations], dim=-1)

    means = cluster_means(states, assignment, num_clusters, _SHRINKAGE, moments)
    squares, magnitudes, activations = (part.contiguous().cpu() for part in means.chunk(3, dim=-1))
    shares = torch.bincount(assignment, minlength=num_clusters) / len(assignment)
    weights = scorer.neuron_weights.cpu()
    return LayerCentroids(squares, magnitudes, activations, shares.cpu(), weights)


def uncut_layer(layer: FFNLayer, config: BuildConfig, fitted: FittedLayer) -> LayerClusters:
    """The artifact's layer with sets of equal size, before a price cuts better ones."""
    size = fitted.sets.sum(-1).float().mean().item()
    bias = None
    if config.adds_bias:
        left_out = fitted.centroids.mean_activations.masked_fill(fitted.sets, 0)
        bias = left_out @ layer.down.weight.detach().float().cpu().t()
    state = {name: tensor.detach() for name, tensor in fitted.router.state_dict().items()}
    return LayerClusters(
        active_sets=pack_bits(fitted.sets),
        static_set=pack_bits(fitted.centroids.static_set(size)),
        router_down=state.get("down"),
        router_up=state["up"],
        router_bias=state["bias"],
        cluster_bias=bias,
        centroids=fitted.centroids,
    )


def held_out_scores(
    hidden_states: Tensor, layer: FFNLayer, clusters: LayerClusters, router: Router
) -> dict[str, float]:
    """Scores of a layer's sets, both bands together, by norm importance and the router's ids.

    Args:
        hidden_states: held-out tokens [n, H].
        layer: the FFN.
        clusters: the final sets.
        router: the layer's router.
    """
    sets = union(clusters.active_sets, clusters.maybe_sets)
    neurons = layer.intermediate_size
    set_scorer = SetScorer(unpack_bits(sets, neurons), unpack_bits(clusters.static_set, neurons))
    scorer, ids = importance_scorer(layer), route(router, hidden_states)
    for rows in chunk_slices(len(hidden_states), _CHUNK_TOKENS):
        set_scorer.add(scorer(hidden_states[rows].to(scorer.gate.device)).cpu(), ids[rows])
    return set_scorer.scores()


def save_fitted(file: Path, fitted: FittedLayer) -> None:
    """Write a fitted layer, atomically, to go on from after an interruption."""
    tensors = {f"router.{name}": tensor for name, tensor in fitted.router.state_dict().items()}
    tensors |= {f"centroids.{name}": tensor for name, tensor in vars(fitted.centroids).items()}
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
