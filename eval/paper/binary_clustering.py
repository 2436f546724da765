"""The clusterings of binary patterns that the paper (arXiv 2507.14179) compares its own with.

All are Lloyd's iterations from random patterns; a point has one cluster. Unlike the paper's method none
lets a density be asked for: read their coverage beside their chance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.clusters.paper.awc_paper import initial_random
from sparse_runtime.clusters.paper.binary_patterns import PackedPatterns
from sparse_runtime.errors import ConfigError

_MAX_ITERATIONS = 10

#: Patterns, K, generator -> centroids bool [K, I].
Fit = Callable[[PackedPatterns, int, torch.Generator], Tensor]


def fit_relaxed_kmeans(
    patterns: PackedPatterns, num_clusters: int, generator: torch.Generator
) -> Tensor:
    """k-means with real centroids and squared distances, rounded in the end.

    Args:
        patterns: N ≥ K points.
        num_clusters: K.
        generator: on the CPU.

    Returns:
        Centroids bool [K, I].

    Raises:
        ConfigError: there are more clusters than patterns.
    """
    centroids = _start(patterns, num_clusters, generator)
    return _lloyd(patterns, centroids, lambda c: (2 * c, -c.square().sum(-1)), lambda m: m) > 0.5


def fit_penalized(
    patterns: PackedPatterns,
    num_clusters: int,
    generator: torch.Generator,
    *,
    penalty: float = 0.5,
) -> Tensor:
    """Binary centroids by the distance d(x, c) = Σ x ∧ ¬c + penalty · Σ ¬x ∧ c.

    A neuron belongs to the centroid of least distance if more than penalty ÷ (1 + penalty) of the
    points have it. A penalty of 0 is the paper's distance, which alone would make every centroid all
    ones; 1 is the Hamming distance with the majority's vote, which for one factor per point is binary
    matrix factorization (Li, A General Model for Clustering Binary Data, KDD 2005).

    Args:
        patterns: N ≥ K points.
        num_clusters: K.
        generator: on the CPU.
        penalty: of a one that the point lacks, above 0.

    Returns:
        Centroids bool [K, I].

    Raises:
        ConfigError: there are more clusters than patterns, or the penalty is not above 0.
    """
    if penalty <= 0:
        raise ConfigError(f"penalty is {penalty}; expected a number above 0")
    least = penalty / (1 + penalty)
    centroids = _start(patterns, num_clusters, generator)
    return (
        _lloyd(
            patterns,
            centroids,
            lambda c: ((1 + penalty) * c, -penalty * c.sum(-1)),
            lambda means: (means > least).float(),
        )
        > 0.5
    )


def fit_factorization(
    patterns: PackedPatterns, num_clusters: int, generator: torch.Generator
) -> Tensor:
    """Binary matrix factorization, one factor per point: :func:`fit_penalized` with penalty 1."""
    return fit_penalized(patterns, num_clusters, generator, penalty=1.0)


#: Name in tables -> fit with default settings.
BINARY_CLUSTERINGS: dict[str, Fit] = {
    "binary k-means": fit_relaxed_kmeans,
    "matrix factorization": fit_factorization,
    "penalized": fit_penalized,
}


def _start(patterns: PackedPatterns, num_clusters: int, generator: torch.Generator) -> Tensor:
    if num_clusters > len(patterns):
        raise ConfigError(
            f"num_clusters is {num_clusters}, but there are only {len(patterns)} patterns; use "
            "fewer clusters or more text"
        )
    seeds, _ = initial_random(patterns, num_clusters, 0.0, generator)
    return patterns.select(seeds.to(patterns.bits.device)).dense()


def _lloyd(
    patterns: PackedPatterns,
    centroids: Tensor,
    similarity: Callable[[Tensor], tuple[Tensor, Tensor]],
    update: Callable[[Tensor], Tensor],
) -> Tensor:
    """Alternate assignment and update until assignments repeat; empty clusters keep their centroid.

    Args:
        patterns: N points.
        centroids: [K, I] float32.
        similarity: centroids -> weight [K, I] and bias [K]; a point x goes to the largest
            weight·x + bias.
        update: means of the clusters' points [K, I] -> centroids.
    """
    previous = None
    for _ in range(_MAX_ITERATIONS):
        weight, bias = similarity(centroids)
        sums = torch.zeros_like(centroids)
        assignment = []
        for rows in patterns.blocks(len(centroids)):
            points = patterns.dense(rows.start, rows.stop)
            ids = F.linear(points, weight, bias).argmax(-1)
            sums.index_add_(0, ids, points)
            assignment.append(ids)
        ids = torch.cat(assignment)
        if previous is not None and torch.equal(ids, previous):
            break
        previous = ids
        sizes = torch.bincount(ids, minlength=len(centroids)).unsqueeze(-1)
        centroids = torch.where(sizes > 0, update(sums / sizes.clamp_min(1)), centroids)
    return centroids
