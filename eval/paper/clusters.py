"""The paper's clustering (arXiv 2507.14179) as an opponent: one set of neurons for gate, up and down.

Unlike ``sparse_runtime.eval.paper.masks``, which reproduces the paper's own evaluation, this is what
its clusters would do at run time: by oracle ids, as the paper stops at, and by a router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_runtime.clusters.config import BuildConfig, BuildSettings
from sparse_runtime.clusters.importance import ImportanceScorer, chunk_slices, importance_scorer
from sparse_runtime.clusters.layer_build import fit_layer
from sparse_runtime.clusters.layer_data import LayerData, routed_cost
from sparse_runtime.clusters.paper.binary_patterns import (
    PackedPatterns,
    assign,
    percentile_threshold,
)
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.cost import router_parameter_count
from sparse_runtime.eval.baselines.masked_ffn import MaskedOutput, Variants, run_neurons
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.predictors import Router
from sparse_runtime.predictors.training import route

_CHUNK_TOKENS = 2048
# Of the tokens that routers are trained on, those that tell when to stop.
_HELD_OUT_SHARE = 1 / 16


@dataclass(frozen=True)
class PaperClusterMasks:
    """Clusters of one layer and how a token finds its own.

    Attributes:
        sets: bool [K, I].
        router: from hidden states; None for oracle ids.
        scorer: importance |h_i|·‖down_i‖₂ that patterns are made of.
        threshold: a neuron is active if its importance is above it.
    """

    sets: Tensor
    router: Router | None
    scorer: ImportanceScorer
    threshold: float

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        if self.router is None:
            patterns = PackedPatterns.from_dense(self.scorer(x) > self.threshold)
            return run_neurons(layer, x, self.sets[assign(patterns, self.sets)], clustered=True)
        ids = route(self.router, x.float())
        rank = None if self.router.down is None else len(self.router.down)
        extra = router_parameter_count(layer.hidden_size, len(self.sets), rank)
        return run_neurons(layer, x, self.sets[ids], extra_elements=extra, clustered=True)


@dataclass(frozen=True)
class AwcPaper:
    """How the clusters are fitted.

    Args:
        num_clusters: K.
        rank: of the routers.
        percentile: of importance, above which a neuron is active.
        seed: of clustering and routers.
    """

    num_clusters: int = 256
    rank: int = 32
    percentile: float = 50.0
    seed: int = 0
    name: str = "awc-paper"
    needs_prompt: bool = False

    def least_share(self, layer: FFNLayer) -> float:
        """The router is read whatever it says."""
        return routed_cost(layer, self._config(1.0), self.rank).share(0)

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Cluster and train a router for each budget; oracle ids cost as much less as the router."""
        states = states.to(layer.device)
        scorer = importance_scorer(layer)
        importance = torch.cat(
            [scorer(states[s]).bfloat16() for s in chunk_slices(len(states), _CHUNK_TOKENS)]
        )
        threshold = percentile_threshold([importance], self.percentile)
        patterns = (importance > threshold).bfloat16()
        num_fit = len(states) - max(1, round(len(states) * _HELD_OUT_SHARE))
        data = LayerData(states, patterns, num_fit)
        fits: list[Variants] = []
        for budget in budgets:
            generator = layer_generator(self.seed, layer.index)
            with torch.enable_grad():
                fitted = fit_layer(data, layer, self._config(budget), self.rank, None, generator)
            predicted, oracle = (
                PaperClusterMasks(fitted.sets.to(layer.device), router, scorer, threshold)
                for router in (fitted.router.to(layer.device), None)
            )
            fits.append({self.name: predicted, f"{self.name}, oracle ids": oracle})
        return fits

    def _config(self, budget: float) -> BuildSettings:
        return BuildConfig(
            method="awc-paper",
            num_clusters=self.num_clusters,
            budget=budget,
            percentile=self.percentile,
        ).resolved()
