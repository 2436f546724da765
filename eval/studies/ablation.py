"""What each setting of the clustering does, one at a time, on held-out text.

Both methods (ours and the paper's, arXiv 2507.14179) start from the same settings; each row changes
one. Scores are those of :class:`SetScorer` by norm importance, so that methods and settings compare;
clusters are of single layers, and nothing runs in the loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.clusters.awc import Clustering, best_sets, cluster_means, fit_awc, top_sets
from sparse_runtime.clusters.capture import capture_hidden_states
from sparse_runtime.clusters.config import METHODS
from sparse_runtime.clusters.importance import chunk_slices, importance_scorer
from sparse_runtime.clusters.layer_data import packed_patterns
from sparse_runtime.clusters.metrics import SetScorer
from sparse_runtime.clusters.paper.awc_paper import AWCPaperConfig, fit_awc_paper
from sparse_runtime.clusters.paper.binary_patterns import percentile_threshold
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.errors import DataError
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_single_ffns, select_layers
from sparse_runtime.predictors.training import initial_router, route
from sparse_runtime.progress import ProgressReporter, SilentProgress

_CHUNK_TOKENS = 2048
# Weight, in tokens, of the layer's mean pattern, as in the build.
_SHRINKAGE = 8.0


@dataclass(frozen=True)
class Setting:
    """One way to cluster a layer.

    Args:
        method: ``awc`` or ``awc-paper``.
        clusters: K.
        top_percentile: p: sets hold the top 1 − p of the neurons.
        sparsity: ``awc-paper``: share of importance below the threshold of a pattern.
        init: ``awc-paper``: ``random`` or ``kmeans++``.
        tokens: share of the calibration tokens.
        seed: of the initialization.
    """

    method: str
    clusters: int = 256
    top_percentile: float = 0.5
    sparsity: float = 0.5
    init: str = "random"
    tokens: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Grid:
    """Values of each factor; the base is that of :class:`Setting`.

    Args:
        clusters: of K.
        top_percentiles: of p, in (0, 1).
        sparsities: of patterns, in (0, 1).
        inits: of ``awc-paper``.
        tokens: shares of the calibration tokens.
        seeds: of the initialization.
    """

    clusters: tuple[int, ...] = (64, 256, 1024)
    top_percentiles: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7)
    inits: tuple[str, ...] = ("random", "kmeans++")
    tokens: tuple[float, ...] = (0.25, 0.5, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)

    def settings(self) -> Iterator[tuple[str, Setting]]:
        """Factors and settings, one factor changed at a time."""
        for method in METHODS:
            base = Setting(method)
            factors: dict[str, Sequence[Any]] = {
                "clusters": self.clusters,
                "top_percentile": self.top_percentiles,
                "tokens": self.tokens,
                "seed": self.seeds,
            }
            if method == "awc-paper":
                factors |= {"sparsity": self.sparsities, "init": self.inits}
            for factor, values in factors.items():
                for value in values:
                    yield factor, replace(base, **{factor: value})


def ablate(
    model: Any,
    fit_windows: Tensor,
    test_windows: Tensor,
    *,
    layers: Sequence[int] | None = None,
    grid: Grid | None = None,
    progress: ProgressReporter | None = None,
) -> list[dict[str, Any]]:
    """Cluster layers in many ways and score each.

    Args:
        model: a dense causal language model.
        fit_windows: calibration text [W, T] int64.
        test_windows: held-out text [W', T] int64.
        layers: layer indices; three spread over the model if None.
        grid: values of each factor.
        progress: reports one unit per fit.

    Returns:
        One row per setting: ``factor``, ``value``, the fields of :class:`Setting`, and means over the
        layers of the scores of :class:`SetScorer` with ids by a linear router in closed form;
        ``iterations``; ``history``, the objective of each iteration (mean coverage for ``awc``, mean
        distance for ``awc-paper``) of the first layer; ``empty``, the share of clusters without a
        token; ``effective``, exp(entropy of the cluster sizes) ÷ K; ``sizes``, those of the first
        layer, by the method's own assignment without limits, largest first; ``seconds`` of one layer.

    Raises:
        ConfigError: a layer does not exist, or a value is out of range.
        DataError: there are more clusters than tokens.
    """
    found = find_single_ffns(model, "this study")
    count = len(found)
    wanted = sorted({0, count // 3, 2 * count // 3}) if layers is None else list(layers)
    selected = select_layers(found, wanted)
    settings = list((grid or Grid()).settings())
    num_fit = fit_windows.numel()
    for _, setting in settings:
        if setting.clusters > setting.tokens * num_fit:
            raise DataError(
                f"{setting.clusters} clusters were asked for, but only "
                f"{int(setting.tokens * num_fit)} calibration tokens are there; give more text or "
                "fewer clusters"
            )
    # The base setting is a value of every factor; it is scored once.
    scores: dict[Setting, list[dict[str, Any]]] = {setting: [] for _, setting in settings}
    progress = progress or SilentProgress()
    with TemporaryDirectory() as folder, torch.inference_mode():
        windows = torch.cat([fit_windows, test_windows])
        states = capture_hidden_states(model, windows, Path(folder), progress=progress)
        with progress.task("ablation", len(selected) * len(scores)) as advance:
            for position, layer in selected:
                data = _Layer.of(layer, states.layer(position), num_fit)
                for setting, of_layers in scores.items():
                    of_layers.append(data.score(setting))
                    advance(1)
    return [
        {
            "factor": factor,
            "value": getattr(setting, factor),
            **vars(setting),
            **_mean(scores[setting]),
        }
        for factor, setting in settings
    ]


@dataclass(frozen=True)
class _Layer:
    """Hidden states [N, H] and norm importance [N, I] of a layer; the first tokens are fitted on."""

    index: int
    states: Tensor
    importance: Tensor
    num_fit: int

    @classmethod
    def of(cls, layer: FFNLayer, states: Tensor, num_fit: int) -> _Layer:
        scorer = importance_scorer(layer)
        chunks = chunk_slices(len(states), _CHUNK_TOKENS)
        device = scorer.gate.device
        importance = torch.cat([scorer(states[s].to(device)).bfloat16().cpu() for s in chunks])
        return cls(layer.index, states, importance, num_fit)

    def score(self, setting: Setting) -> dict[str, Any]:
        tokens = int(setting.tokens * self.num_fit)
        importance, held_out = self.importance[:tokens], self.importance[self.num_fit :]
        generator = layer_generator(setting.seed, self.index)
        started = time.perf_counter()
        clustering = _fit(importance, setting, generator)
        seconds = time.perf_counter() - started
        sets = clustering.active_sets
        _, assignment = best_sets(importance, sets)
        router = initial_router(self.states[:tokens], assignment, len(sets), None)
        ids = route(router, self.states[self.num_fit :])
        average = cluster_means(importance, torch.zeros_like(assignment), 1)
        static = top_sets(average, max(1, round(sets.float().sum(-1).mean().item())))[0]
        scorer = SetScorer(sets, static)
        for rows in chunk_slices(len(held_out), _CHUNK_TOKENS):
            scorer.add(held_out[rows], ids[rows])
        sizes = torch.bincount(assignment, minlength=len(sets))
        shares = sizes[sizes > 0] / sizes.sum()
        return {
            **scorer.scores(),
            "iterations": len(clustering.history),
            "empty": (sizes == 0).float().mean().item(),
            "effective": math.exp(-(shares * shares.log()).sum().item()) / len(sets),
            "seconds": seconds,
            "history": [entry["objective"] for entry in clustering.history],
            "sizes": sizes.sort(descending=True).values.tolist(),
        }


def _fit(importance: Tensor, setting: Setting, generator: torch.Generator) -> Clustering:
    if setting.method == "awc":
        return fit_awc(
            importance,
            num_clusters=setting.clusters,
            set_size=max(1, round((1 - setting.top_percentile) * importance.shape[1])),
            generator=generator,
        )
    threshold = percentile_threshold([importance], 100 * setting.sparsity)
    result = fit_awc_paper(
        packed_patterns((importance > threshold).float()),
        AWCPaperConfig(
            num_clusters=setting.clusters,
            top_percentile=setting.top_percentile,
            init=setting.init,
        ),
        generator=generator,
    )
    return Clustering(result.centroids, result.means, result.assignment, result.history)


def _mean(of_layers: list[dict[str, Any]]) -> dict[str, Any]:
    first = of_layers[0]
    return {
        name: value
        if isinstance(value, list)
        else sum(scores[name] for scores in of_layers) / len(of_layers)
        for name, value in first.items()
    }
