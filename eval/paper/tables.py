"""The paper's own figures, on any model (arXiv 2507.14179): coverage by binary clusters, and
perplexity under its three masks. Evaluation only; nothing here makes a model faster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.capture import capture_hidden_states
from sparse_runtime.clusters.config import BuildConfig
from sparse_runtime.clusters.layer_data import load_layer, packed_patterns
from sparse_runtime.clusters.paper.awc_paper import AWCPaperConfig, fit_awc_paper
from sparse_runtime.clusters.paper.binary_patterns import (
    PackedPatterns,
    assign,
    chance,
    coverage,
    precision,
    static_coverage,
)
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.eval.paper.binary_clustering import BINARY_CLUSTERINGS, Fit
from sparse_runtime.eval.paper.masks import (
    collect_paper_patterns,
    fit_paper_masks,
    paper_masks_applied,
    score_paper_masks,
)
from sparse_runtime.eval.quality.perplexity import perplexity
from sparse_runtime.models.ffn_layers import find_single_ffns, select_layers
from sparse_runtime.progress import ProgressReporter, SilentProgress


def paper_settings(num_clusters: int, density: float, init: str) -> AWCPaperConfig:
    """Settings for centroids of a density. Raises ConfigError where a value is out of range."""
    return AWCPaperConfig(num_clusters=num_clusters, top_percentile=1 - density, init=init)


def paper_coverage(
    model: Any,
    fit_windows: Tensor,
    test_windows: Tensor,
    *,
    clusters: Sequence[int],
    densities: Sequence[float],
    layers: Sequence[int] | None = None,
    percentile: float = 50.0,
    init: str = "random",
    compare: bool = False,
    seed: int = 0,
    progress: ProgressReporter | None = None,
) -> list[dict[str, Any]]:
    """Coverage by the paper's clusters over a grid of K and density, per layer.

    Patterns are those of ``build --method awc-paper``: neurons whose |h_i|·‖down_i‖ is above the
    percentile of their layer, one pattern for gate, up and down.

    Args:
        model: a dense causal language model.
        fit_windows: calibration text [W, T] int64.
        test_windows: held-out text [W', T] int64.
        clusters: values of K.
        densities: densities of the centroids, in (0, 1).
        layers: layer indices; all if None.
        percentile: threshold of the patterns.
        init: ``random`` or ``kmeans++``.
        compare: also fit the clusterings of ``eval/paper/binary_clustering.py``, for each K.
        seed: of the initialization.
        progress: reports one unit per fit.

    Returns:
        One row per method, K and, for the paper's, density (None for the others, whose density is
        their own): means over the layers of oracle ids' ``coverage``, ``static`` (the most frequent
        neurons), ``chance`` (the centroids' density) and ``precision`` on the held-out text;
        ``fitted_coverage`` on the text that was fitted, as the paper scores; ``seconds`` of one layer.

    Raises:
        ConfigError: a layer does not exist, or a value is out of range.
        DataError: there are more clusters than tokens.
    """
    found = find_single_ffns(model, "the paper's evaluation")
    selected = select_layers(found, [layer.index for layer in found] if layers is None else layers)
    fits: list[tuple[dict[str, Any], Fit]] = []
    for count in clusters:
        for density in densities:
            settings = paper_settings(count, density, init)
            fits.append((_row("awc-paper", count, density), _paper_fit(settings)))
        for name, fit in BINARY_CLUSTERINGS.items() if compare else ():
            fits.append((_row(name, count, None), fit))
    config = BuildConfig(method="awc-paper", percentile=percentile, seed=seed).resolved()
    progress = progress or SilentProgress()
    scores: list[list[dict[str, float]]] = [[] for _ in fits]
    with TemporaryDirectory() as folder:
        work = Path(folder)
        windows = torch.cat([fit_windows, test_windows])
        states = capture_hidden_states(model, windows, work, progress=progress)
        with progress.task("binary clusters", len(selected) * len(fits)) as advance:
            for position, layer in selected:
                with Buffers(config.memory_mib) as buffers:
                    data = load_layer(
                        *(states, position, layer, config),
                        num_fit=fit_windows.numel(),
                        buffers=buffers,
                    )
                    parts = data.fit, data.held_out
                    seen, test = (packed_patterns(data.importance[part]) for part in parts)
                for of_layers, (row, fit) in zip(scores, fits, strict=True):
                    generator = layer_generator(seed, layer.index)
                    started = time.perf_counter()
                    centroids = fit(seen, row["clusters"], generator)
                    seconds = time.perf_counter() - started
                    of_layers.append({**_coverage(centroids, seen, test), "seconds": seconds})
                    advance(1)
    return [
        {**row, **{name: sum(s[name] for s in of_layers) / len(of_layers) for name in of_layers[0]}}
        for (row, _), of_layers in zip(fits, scores, strict=True)
    ]


def _row(method: str, num_clusters: int, density: float | None) -> dict[str, Any]:
    return {"method": method, "clusters": num_clusters, "density": density}


def _paper_fit(settings: AWCPaperConfig) -> Fit:
    def fit(patterns: PackedPatterns, num_clusters: int, generator: torch.Generator) -> Tensor:
        return fit_awc_paper(patterns, settings, generator=generator).centroids

    return fit


def _coverage(centroids: Tensor, seen: PackedPatterns, test: PackedPatterns) -> dict[str, float]:
    """Scores of centroids on held-out patterns, and on those that they were fitted on."""
    ids = assign(test, centroids)
    by_chance = chance(test, centroids, ids)
    return {
        "coverage": coverage(test, centroids, ids),
        "static": static_coverage(seen.frequency(), test, by_chance),
        "chance": by_chance,
        "precision": precision(test, centroids, ids),
        "fitted_coverage": coverage(seen, centroids, assign(seen, centroids)),
    }


def paper_perplexity(
    model: Any,
    fit_windows: Tensor,
    tokens: Tensor,
    *,
    num_clusters: int,
    densities: Sequence[float],
    window: int = 512,
    percentile: float = 50.0,
    init: str = "random",
    pooled: bool = True,
    seed: int = 0,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Perplexity under the paper's separate masks for gate, up and down, oracle ids.

    Args:
        model: a dense causal language model.
        fit_windows: calibration text [W, T] int64.
        tokens: held-out text [n] int64.
        num_clusters: K.
        densities: densities of the centroids.
        window: tokens per window of the perplexity.
        percentile: of |value|, the enforced sparsity; 50 in the paper.
        init: ``random`` or ``kmeans++``.
        pooled: one table per projection for all layers, as in the paper.
        seed: of the initialization.
        progress: reports windows and iterations.

    Returns:
        ``dense`` and ``thresholds_only`` (the sparsity without clusters) perplexity, and under
        ``masks`` one row per density with its perplexity, ``ratio`` to dense and the scores of
        ``score_paper_masks`` by projection.
    """
    test_windows = tokens[: len(tokens) // window * window].view(-1, window)
    fitted = collect_paper_patterns(model, fit_windows, percentile, progress=progress)
    held_out = collect_paper_patterns(
        model, test_windows, thresholds=fitted.thresholds, progress=progress
    )
    dense = perplexity(model, tokens, window=window, progress=progress)
    thresholds_only, rows = None, []
    for density in densities:
        settings = paper_settings(num_clusters, density, init)
        generator = torch.Generator().manual_seed(seed)
        masks = fit_paper_masks(
            fitted, settings, pooled=pooled, generator=generator, progress=progress
        )
        if thresholds_only is None:
            with paper_masks_applied(model, masks, thresholds_only=True):
                thresholds_only = perplexity(model, tokens, window=window, progress=progress)
        with paper_masks_applied(model, masks):
            masked = perplexity(model, tokens, window=window, progress=progress)
        rows.append(
            {
                "clusters": num_clusters,
                "density": density,
                "perplexity": masked,
                "ratio": masked / dense,
                "projections": score_paper_masks(masks, fitted, held_out),
            }
        )
    return {"dense": dense, "thresholds_only": thresholds_only, "masks": rows}
