"""The AWC paper's own evaluation: three separate masks on dense projections (arXiv 2507.14179).

Gate output (before the activation), up output and down output each have a threshold per layer and a
table of centroids. A token's output is computed densely, its pattern ``|value| > threshold`` picks
the nearest centroid (oracle ids), and what the centroid lacks is set to zero. Nothing is saved this
way: it measures quality only, as an upper bound on what a predictor of these ids could reach. It is
here to reproduce the paper; what this package runs uses one neuron set for all three projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.clusters.paper.awc_paper import AWCPaperConfig, fit_awc_paper
from sparse_runtime.clusters.paper.binary_patterns import (
    assign,
    chance,
    coverage,
    precision,
    static_coverage,
)
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.paper.patterns import (
    PROJECTIONS,
    ByLayer,
    PaperPatterns,
    above,
    check_layers,
    collect_paper_patterns,
    edited_outputs,
    pattern_bytes,
)
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_single_ffns
from sparse_runtime.progress import ProgressReporter

__all__ = [
    "PROJECTIONS",
    "PaperMasks",
    "PaperPatterns",
    "collect_paper_patterns",
    "fit_paper_masks",
    "paper_masks_applied",
    "pattern_bytes",
    "score_paper_masks",
]


@dataclass(frozen=True, eq=False)
class PaperMasks:
    """What :func:`paper_masks_applied` needs.

    Attributes:
        thresholds: layer index -> projection -> threshold on |value|.
        centroids: layer index -> projection -> bool [K, I] (gate, up) or [K, H] (down). Pooled
            masks hold the same tensor under every layer.
        history: fit history (see ``AWCPaperResult``) of each projection's tables, in layer order;
            one of them when pooled.
    """

    thresholds: ByLayer
    centroids: dict[int, dict[str, Tensor]]
    history: dict[str, list[list[dict[str, float]]]]


def fit_paper_masks(
    patterns: PaperPatterns,
    config: AWCPaperConfig,
    *,
    pooled: bool = True,
    generator: torch.Generator,
    progress: ProgressReporter | None = None,
) -> PaperMasks:
    """Cluster the patterns of each projection.

    Args:
        patterns: from :func:`collect_paper_patterns`, on calibration text.
        config: settings of the clustering.
        pooled: one table for all layers, as in the paper; False fits one per layer.
        generator: on the CPU.
        progress: see ``fit_awc_paper``.

    Raises:
        ConfigError: there are more clusters than patterns.
    """
    centroids: dict[int, dict[str, Tensor]] = {index: {} for index in patterns.patterns}
    history: dict[str, list[list[dict[str, float]]]] = {}
    for projection in PROJECTIONS:
        if pooled:
            result = fit_awc_paper(
                patterns.pooled(projection), config, generator=generator, progress=progress
            )
            history[projection] = [result.history]
            for tables in centroids.values():
                tables[projection] = result.centroids
            continue
        history[projection] = []
        for index, tables in centroids.items():
            result = fit_awc_paper(
                patterns.patterns[index][projection],
                config,
                generator=generator,
                progress=progress,
            )
            history[projection].append(result.history)
            tables[projection] = result.centroids
    return PaperMasks(patterns.thresholds, centroids, history)


def score_paper_masks(
    masks: PaperMasks, fit_patterns: PaperPatterns, held_out: PaperPatterns
) -> dict[str, dict[str, float]]:
    """Score oracle ids on held-out patterns, beside what needs no clustering.

    Returns:
        Projection -> ``coverage`` (the paper's "clustering precision"), ``chance``, ``static``
        (one most-frequent mask a layer, of equal density), ``precision`` and ``pattern_density``,
        each the mean over layers.
    """
    scores: dict[str, dict[str, float]] = {}
    for projection in PROJECTIONS:
        rows = []
        for index, row in held_out.patterns.items():
            points, table = row[projection], masks.centroids[index][projection]
            ids = assign(points, table)
            by_chance = chance(points, table, ids)
            frequency = fit_patterns.patterns[index][projection].frequency()
            rows.append(
                {
                    "coverage": coverage(points, table, ids),
                    "chance": by_chance,
                    "static": static_coverage(frequency, points, by_chance),
                    "precision": precision(points, table, ids),
                    "pattern_density": points.frequency().mean().item(),
                }
            )
        scores[projection] = {
            name: sum(score[name] for score in rows) / len(rows) for name in rows[0]
        }
    return scores


@contextmanager
def paper_masks_applied(
    model: nn.Module, masks: PaperMasks, ids: str = "oracle", *, thresholds_only: bool = False
) -> Iterator[None]:
    """Mask the outputs of gate, up and down while the context is open.

    Gate is masked before its activation, and down computes from the masked product, so its pattern
    is that of the masked model. The hooks are removed whatever happens inside.

    Args:
        model: the model that the masks were made for.
        masks: from :func:`fit_paper_masks`.
        ids: ``oracle``, the only choice: each output's own nearest centroid.
        thresholds_only: mask with the token's own pattern instead of a centroid: the paper's
            sparsity without any clustering.

    Raises:
        ConfigError: ``ids`` is unknown, or the masks do not fit the model.
    """
    if ids != "oracle":
        raise ConfigError(f"ids is {ids!r}; the paper's evaluation knows only 'oracle'")
    layers = find_single_ffns(model, "the paper's evaluation")
    check_layers(layers, masks.thresholds, "masks")
    missing: dict[tuple[int, torch.device], Tensor] = {}  # pooled tables: one float copy a device

    def mask(layer: FFNLayer, projection: str) -> Callable[[Tensor], Tensor]:
        threshold = masks.thresholds[layer.index][projection]
        if thresholds_only:
            return lambda output: above(output, threshold)
        linear: nn.Linear = getattr(layer, projection)
        table = masks.centroids[layer.index][projection]
        if table.shape[1] != linear.out_features:
            raise ConfigError(
                f"the {projection} masks of layer {layer.index} have {table.shape[1]} columns; "
                f"this model's {layer.name} has {linear.out_features}. Use masks of this model"
            )
        device = linear.weight.device
        key = (id(table), device)
        if key not in missing:
            missing[key] = 1 - table.to(device=device, dtype=torch.float32)
        lacking = missing[key]

        def edit(output: Tensor) -> Tensor:
            pattern = output.float().abs() > threshold
            nearest = F.linear(pattern.float(), lacking).argmin(-1)
            return output.masked_fill(lacking[nearest] != 0, 0)

        return edit

    with edited_outputs(layers, mask):
        yield
