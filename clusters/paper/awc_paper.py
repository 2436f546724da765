"""Activation-aware clustering as the paper's public artifact does it (arXiv 2507.14179).

Binary patterns, K centroids started from patterns, a balanced assignment by the active-position
distance and a top-percentile update. Kept as the baseline that ``sparse_runtime.clusters.awc`` is
compared with.

Cost of an iteration: one [K, I] × [I, N] matmul, 2·N·K·I operations (down to half of that where
distances do not fit in memory at once: points already taken are left out block by block), and a
selection of 6 to 11 ns for each of N·K/2 distances. N = 32 k and I = 1536 on two cores: 1.4 s for
K = 256, 3.3 s for K = 2048. Memory: the packed patterns, 512 MiB of distances, [K, I] float32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_runtime.clusters.paper.balanced_assignment import balanced_assignment
from sparse_runtime.clusters.paper.binary_patterns import (
    PackedPatterns,
    assign,
    binarize,
    chance,
    coverage,
    distances,
    nearest,
    percentile_threshold,
    precision,
    static_coverage,
)
from sparse_runtime.errors import ConfigError
from sparse_runtime.progress import ProgressReporter, SilentProgress

__all__ = [
    "AWCPaperConfig",
    "AWCPaperResult",
    "PackedPatterns",
    "assign",
    "balanced_assignment",
    "binarize",
    "chance",
    "coverage",
    "distances",
    "fit_awc_paper",
    "initial_kmeans_plus_plus",
    "initial_random",
    "nearest",
    "percentile_threshold",
    "precision",
    "static_coverage",
    "update_centroids",
]

MAX_CLUSTERS = 16384
INITS = ("random", "kmeans++")

#: k-means++ draws this many batches; see :func:`initial_kmeans_plus_plus`.
_KMEANS_ROUNDS = 32


@dataclass(frozen=True)
class AWCPaperConfig:
    """Settings of :func:`fit_awc_paper`.

    Args:
        num_clusters: K, 1 to 16384.
        top_percentile: p in (0, 1): a centroid is one where the mean exceeds its p-quantile, so its
            density is about 1 − p. The paper uses 0.2, 0.3 and 0.4.
        init: ``random`` or ``kmeans++``.
        init_min_zero_share: smallest share of zeros of a pattern that ``random`` starts from.
        max_iterations: bound on the iterations.

    Raises:
        ConfigError: a value is out of range.
    """

    num_clusters: int
    top_percentile: float = 0.4
    init: str = "random"
    init_min_zero_share: float = 0.4
    max_iterations: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.num_clusters <= MAX_CLUSTERS:
            raise ConfigError(f"num_clusters is {self.num_clusters}; expected 1 to {MAX_CLUSTERS}")
        if not 0 < self.top_percentile < 1:
            raise ConfigError(
                f"top_percentile is {self.top_percentile}; expected a share between 0 and 1, "
                "such as 0.4 for centroids of 60 % ones"
            )
        if self.init not in INITS:
            raise ConfigError(f"init is {self.init!r}; expected one of {', '.join(INITS)}")
        if not 0 <= self.init_min_zero_share <= 1:
            raise ConfigError(
                f"init_min_zero_share is {self.init_min_zero_share}; expected a share from 0 to 1"
            )
        if self.max_iterations < 1:
            raise ConfigError(f"max_iterations is {self.max_iterations}; expected at least 1")


@dataclass(frozen=True, eq=False)
class AWCPaperResult:
    """Clusters of one set of patterns.

    Attributes:
        centroids: bool [K, I], the update of the last assignment.
        assignment: balanced, of the last iteration, int64 [N]; -1 for the N mod K leftovers.
        means: mean pattern of each cluster's points, float32 [K, I].
        cluster_sizes: points of each cluster, int64 [K].
        filled: initial centroids of ``init="random"`` that break ``init_min_zero_share``, because
            fewer than K patterns satisfy it.
        history: for each iteration ``objective`` (mean distance of the assigned points),
            ``coverage`` (Σ|x∧c| ÷ Σ|x| of the same points), ``moved`` (assignments changed, all
            assigned points in the first iteration) and ``unassigned``, all against the centroids
            that the points were assigned to; ``density``, the mean share of ones in the centroids
            that the update then made.
    """

    centroids: Tensor
    assignment: Tensor
    means: Tensor
    cluster_sizes: Tensor
    filled: int
    history: list[dict[str, float]]


def initial_random(
    patterns: PackedPatterns, num_clusters: int, min_zero_share: float, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Start from random patterns whose share of zeros is at least ``min_zero_share``.

    Args:
        patterns: N ≥ K points.
        num_clusters: K.
        min_zero_share: in [0, 1]. If fewer than K patterns qualify, random others fill up.
        generator: on the CPU.

    Returns:
        Distinct token indices int64 [K] on the CPU, and how many of them do not qualify.
    """
    zeros = patterns.num_neurons - patterns.counts().cpu()
    # The slack keeps 0.4 · I from excluding a pattern of exactly that many zeros by rounding.
    qualifies = zeros >= min_zero_share * patterns.num_neurons - 1e-6
    order = torch.randperm(len(patterns), generator=generator)
    order = torch.cat([order[qualifies[order]], order[~qualifies[order]]])
    return order[:num_clusters], max(0, num_clusters - int(qualifies.sum()))


def initial_kmeans_plus_plus(
    patterns: PackedPatterns, num_clusters: int, generator: torch.Generator
) -> Tensor:
    """Start from patterns drawn in proportion to their distance from those drawn before.

    Draws are made in batches of ⌈K/32⌉: within a batch they are distinct but do not see each other.
    One at a time (which this is for K ≤ 32) would read all patterns K times. Patterns that
    distances cannot tell from the drawn ones (d = 0) fill up at random at the end.

    Args:
        patterns: N ≥ K points.
        num_clusters: K.
        generator: on the CPU.

    Returns:
        Distinct token indices int64 [K] on the CPU.
    """
    num_points = len(patterns)
    drawn = torch.randint(num_points, (1,), generator=generator)
    batch = -(-num_clusters // _KMEANS_ROUNDS)
    closest = torch.full((num_points,), torch.inf)
    new = drawn
    while len(drawn) < num_clusters:
        seeds = patterns.select(new.to(patterns.bits.device)).dense()
        closest = torch.minimum(closest, nearest(patterns, seeds)[1].cpu())
        available = int((closest > 0).sum())
        if available == 0:
            others = torch.ones(num_points, dtype=torch.bool)
            others[drawn] = False
            rest = others.nonzero().squeeze(-1)
            rest = rest[torch.randperm(len(rest), generator=generator)]
            return torch.cat([drawn, rest[: num_clusters - len(drawn)]])
        size = min(batch, num_clusters - len(drawn), available)
        new = torch.multinomial(closest, size, generator=generator)
        drawn = torch.cat([drawn, new])
    return drawn


def update_centroids(
    patterns: PackedPatterns, assignment: Tensor, centroids: Tensor, top_percentile: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-percentile update: one where the cluster's mean is strictly above its p-quantile.

    The quantile interpolates linearly between neighboring ranks. Without ties the density is 1 − p;
    values tied with the quantile count as zeros, so small clusters, whose means take few values,
    end up less dense. In the extreme (more than 1 − p of the neurons active for all points) the
    centroid is empty. ``AWCPaperResult.history`` reports the real density.

    Args:
        patterns: N points.
        assignment: int64 [N], -1 for points that count nowhere.
        centroids: bool [K, I]; a cluster without points keeps its centroid.
        top_percentile: p.

    Returns:
        Centroids bool [K, I], means float32 [K, I] (an empty cluster's centroid as 0/1), and
        cluster sizes int64 [K].
    """
    sums = torch.zeros(centroids.shape, device=centroids.device)
    for rows in patterns.blocks():
        chosen = (assignment[rows] >= 0).nonzero().squeeze(-1) + rows.start
        sums.index_add_(0, assignment[chosen], patterns.select(chosen).dense())
    sizes = torch.bincount(assignment[assignment >= 0], minlength=len(centroids))
    empty = (sizes == 0).unsqueeze(-1)
    means = torch.where(empty, centroids.float(), sums / sizes.clamp_min(1).unsqueeze(-1))
    updated = means > _row_quantiles(means, top_percentile)
    return torch.where(empty, centroids, updated), means, sizes


def _row_quantiles(values: Tensor, share: float) -> Tensor:
    """Quantile of each row [K, I] with linear interpolation, [K, 1].

    Not ``torch.quantile``: it takes at most 16 M elements, and computes the rank in float32, where
    0.4 · 1535 comes out above 614.
    """
    rank = share * (values.shape[1] - 1)
    below = int(rank)
    low = values.kthvalue(below + 1, dim=-1, keepdim=True).values
    if rank == below:
        return low
    high = values.kthvalue(below + 2, dim=-1, keepdim=True).values
    return low + (high - low) * (rank - below)


def fit_awc_paper(
    patterns: PackedPatterns,
    config: AWCPaperConfig,
    *,
    generator: torch.Generator,
    progress: ProgressReporter | None = None,
) -> AWCPaperResult:
    """Cluster patterns by the paper's method.

    Stops when an assignment repeats the one before it, or after ``max_iterations``.

    Args:
        patterns: N points, of one layer or pooled over layers; the work runs on their device.
        config: settings.
        generator: source of randomness, on the CPU: one seed, one result on every device.
        progress: reports one unit per iteration.

    Raises:
        ConfigError: there are more clusters than patterns.
    """
    num_clusters = config.num_clusters
    if num_clusters > len(patterns):
        raise ConfigError(
            f"num_clusters is {num_clusters}, but there are only {len(patterns)} patterns; use "
            "fewer clusters or more text"
        )
    filled = 0
    if config.init == "random":
        seeds, filled = initial_random(
            patterns, num_clusters, config.init_min_zero_share, generator
        )
    else:
        seeds = initial_kmeans_plus_plus(patterns, num_clusters, generator)
    device = patterns.bits.device
    centroids = patterns.select(seeds.to(device)).dense(dtype=torch.bool)
    counts = patterns.counts()
    previous = torch.full((len(patterns),), -1, dtype=torch.int64, device=device)
    history: list[dict[str, float]] = []
    with (progress or SilentProgress()).task("cluster (paper)", config.max_iterations) as advance:
        for _ in range(config.max_iterations):
            assignment, distance = balanced_assignment(patterns, centroids)
            assigned = assignment >= 0
            missed, active = int(distance[assigned].sum()), int(counts[assigned].sum())
            moved = int((assignment != previous).sum())
            centroids, means, sizes = update_centroids(
                patterns, assignment, centroids, config.top_percentile
            )
            history.append(
                {
                    "objective": missed / int(assigned.sum()),
                    "coverage": 1 - missed / active if active else 0.0,
                    "moved": float(moved),
                    "unassigned": float(len(patterns) - int(assigned.sum())),
                    "density": centroids.float().mean().item(),
                }
            )
            advance(1)
            if moved == 0:
                break
            previous = assignment
    return AWCPaperResult(centroids, assignment, means, sizes, filled, history)
