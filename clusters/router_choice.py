"""Which router a model's layers get: the one that loses least for its bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparse_runtime.artifact.bands import StageCosts, cut_bands
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import price_for
from sparse_runtime.clusters.awc import top_sets
from sparse_runtime.clusters.config import BuildSettings
from sparse_runtime.clusters.context import BuildContext
from sparse_runtime.clusters.importance import (
    ImportanceScorer,
    chunk_rows,
    chunk_slices,
    importance_scorer,
)
from sparse_runtime.clusters.layer_build import (
    FittedLayer,
    fit_clusters,
    follow_router,
    uncut_layer,
)
from sparse_runtime.clusters.layer_data import LayerData, routed_cost, set_size_for
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.cost import FFNCost
from sparse_runtime.errors import ConfigError
from sparse_runtime.files import write_json
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.predictors import Router
from sparse_runtime.predictors.training import route
from sparse_runtime.progress import Advance

#: Routers that ``router="auto"`` compares: ranks, and None for the linear one.
ROUTER_CANDIDATES: tuple[int | None, ...] = (None, 128, 64, 32, 16)

#: Tokens that routers are compared on.
PROBE_TOKENS = 16_384


def router_candidates(layers: Sequence[FFNLayer], config: BuildSettings) -> list[int | None]:
    """Ranks of routers (None: linear) that leave neurons of the budget on every layer.

    Beside the correction that the build tunes, if there is one.

    Raises:
        ConfigError: none does.
    """
    if config.router == "auto":
        sizes = [config.num_clusters, *(layer.hidden_size for layer in layers)]
        ranks = [rank for rank in ROUTER_CANDIDATES if rank is None or rank < min(sizes)]
    else:
        ranks = [None if config.router == "linear" else int(config.router)]
    fitting, failure = [], None
    for rank in ranks:
        try:
            for layer in layers:
                set_size_for(layer, config, rank, config.correction_rank)
            fitting.append(rank)
        except ConfigError as error:
            failure = error
    if failure is not None and not fitting:
        raise failure
    return fitting


def choose_router(context: BuildContext) -> int | None:
    """Rank of the router (None: linear) that loses least for its bytes, on three layers.

    Judged by the estimated loss, not by the coverage that the router is trained on: that forgives
    what perplexity does not (docs/LOG.md).
    """
    config, layers = context.config, context.layers
    candidates = router_candidates(layers, config)
    if config.router != "auto":
        return candidates[0]
    file, ranks = context.work / "router.json", context.ranks
    if ranks.by_first(file.exists):
        rank: int | None = json.loads(file.read_text(encoding="utf-8"))
        return rank
    probes = sorted({0, len(layers) // 4, 3 * len(layers) // 4})
    fits: dict[tuple[int, int | None], FittedLayer] = {}
    mine = ranks.mine(probes)

    def fitted() -> dict[tuple[int, int | None], FittedLayer]:
        found: dict[tuple[int, int | None], FittedLayer] = {}
        for position in mine:
            with context.layer(position) as whole:
                data = whole.at_most(PROBE_TOKENS)
            with context.weights_of(position) as layer:
                by_rank = _probed(context, position, layer, data, candidates, advance)
            found |= {(position, rank): one for rank, one in by_rank.items()}
        return found

    with context.progress.task("choose router", len(mine) * len(candidates)) as advance:
        for found in ranks.together(fitted):
            fits |= found
    loss = dict.fromkeys(candidates, 0.0)
    price = _probe_price(context, {p: fits[p, candidates[0]] for p in probes})
    for position in probes:
        states = context.states.layer(position, context.num_fit)
        with context.weights_of(position) as layer:
            for rank in candidates:
                one = fits[position, rank]
                if price is None:
                    scorer = importance_scorer(layer, context.fisher_of(position))
                    loss[rank] += estimated_loss(states, scorer, one.router, one.sets)
                    continue
                cost = routed_cost(layer, config, rank)
                stages = StageCosts.of(cost, context.base_error(position) or 0.0)
                loss[rank] += priced_loss(states, one, layer, cost, stages, price)
    best = min(candidates, key=lambda rank: loss[rank])
    ranks.by_first(lambda: write_json(file, best))
    return best


def _probed(
    context: BuildContext,
    position: int,
    layer: FFNLayer,
    data: LayerData,
    candidates: Sequence[int | None],
    advance: Advance,
) -> dict[int | None, FittedLayer]:
    """A layer fitted with each router, by one clustering; the sets' size follows the router's."""
    config = context.config
    generator = layer_generator(config.seed, layer.index)
    size = set_size_for(layer, config, candidates[0])
    clustering = fit_clusters(data, config, size, generator)
    fits = {}
    for rank in candidates:
        size = set_size_for(layer, config, rank)
        start = replace(clustering, active_sets=top_sets(clustering.centroids, size))
        fisher = context.fisher_of(position)
        fits[rank] = follow_router(data, layer, start, config, rank, fisher, generator)
        advance(1)
    return fits


def _probe_price(context: BuildContext, fits: dict[int, FittedLayer]) -> float | None:
    """Price of a neuron by a few layers, given by position; None where sets are not cut at one."""
    config = context.config
    if config.allocation != "global":
        return None
    uncut = {}
    for position, fitted in fits.items():
        with context.weights_of(position) as layer:
            uncut[layer.index] = uncut_layer(layer, config, fitted, context.base_error(position))
    clusters = ClusterSet(uncut, {}, config.budget)
    return price_for(context.model, clusters, config.budget, verify=config.verify)


def priced_loss(
    states: Tensor,
    fitted: FittedLayer,
    layer: FFNLayer,
    cost: FFNCost,
    stages: StageCosts,
    price: float,
) -> float:
    """What a router's clusters lose and cost at a price of λ per float neuron, per token.

    Σ e² over what is left out, or ρ²·e² of what is not refined, + λ·I·(cost share): the bytes of
    router, looks and neurons count at the price that neurons are bought at, so that routers of
    different size compare.

    Args:
        states: the layer's inputs for tokens that nothing was fitted on [n, H].
        fitted: its router and centroids.
        layer: its FFN.
        cost: with that router.
        stages: what its neurons cost.
        price: λ.
    """
    centroids = fitted.centroids
    bands = cut_bands(centroids, price, stages)
    threshold, finer = price * stages.count, stages.refined_from(price)
    maybe = torch.zeros_like(bands.sure) if bands.maybe is None else bands.maybe
    scorer = importance_scorer(layer, centroids.neuron_weights)
    ids = route(fitted.router, states)
    loss, num_computed, num_looked, num_refined = 0.0, 0, 0, 0
    for rows in chunk_slices(len(states), chunk_rows(layer.intermediate_size)):
        chunk = states[rows].to(scorer.gate.device)
        squares, present = scorer(chunk).square_().cpu(), scorer.present(chunk)
        sure, looked = bands.sure[ids[rows]], maybe[ids[rows]]
        if present is not None:
            read = present.repeat_interleave(sure.shape[1] // present.shape[1], dim=1)
            sure, looked = sure & read, looked & read
        computed = sure | (looked & (squares > threshold))
        refined = looked & (squares > finer)
        left = torch.where(computed, squares * stages.base_error, squares).masked_fill_(refined, 0)
        loss += left.sum().item()
        num_refined += int(refined.sum())
        num_computed += int(computed.sum())
        num_looked += int(looked.sum())
    count = len(states)
    bytes_read = cost.sparse_bytes(num_computed / count, num_looked / count, num_refined / count)
    return loss / count + price * bytes_read / cost.neuron_bytes


def estimated_loss(states: Tensor, scorer: ImportanceScorer, router: Router, sets: Tensor) -> float:
    """Mean over tokens [n, H] of Σ e² over the neurons that the router's choice leaves out.

    In units of the loss if the scorer has Fisher weights, so that layers may be added up.
    """
    ids = route(router, states)
    left_out = [
        (scorer(states[rows].to(scorer.gate.device)).square_().cpu() * ~sets[ids[rows]]).sum(-1)
        for rows in chunk_slices(len(states), chunk_rows(sets.shape[1]))
    ]
    return 0.5 * torch.cat(left_out).mean().item()
