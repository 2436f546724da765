"""Activation-aware clustering as coverage maximization: the default method.

Token t goes to the cluster whose active set S_k holds most of its normalized importance,

    k(t) = argmax_k Σ_{i ∈ S_k} ē(t, i),    ē(t, ·) = e(t, ·) / Σ_i e(t, i)

and a cluster's active set is the top neurons of its tokens' mean ē. Both steps raise the same
objective, the mean coverage, so the alternation converges and needs no balance rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_runtime.clusters.importance import (
    chunk_rows,
    chunk_slices,
    normalized,
    product_dtype,
)
from sparse_runtime.progress import ProgressReporter, SilentProgress

# Weight, in tokens, of all tokens' mean where only those of a cluster count that have an expert.
_EXPERT_SHRINKAGE = 8.0


@dataclass
class Clustering:
    """Clusters of one layer, whatever the method.

    Attributes:
        active_sets: neurons computed for each cluster, bool [K, I].
        centroids: mean normalized importance (``awc``) or mean pattern (``awc-paper``) of each
            cluster's tokens, float32 [K, I].
        assignment: cluster of each token, int64 [N]; -1 where the method left one out.
        history: figures of each iteration, ``objective`` among them.
    """

    active_sets: Tensor
    centroids: Tensor
    assignment: Tensor
    history: list[dict[str, float]] = field(default_factory=list)


def top_sets(centroids: Tensor, set_size: int) -> Tensor:
    """Active sets bool [K, I]: the ``set_size`` largest entries of each centroid [K, I]."""
    top = centroids.topk(set_size, dim=-1).indices
    return torch.zeros_like(centroids, dtype=torch.bool).scatter_(-1, top, True)


class Coverage:
    """Coverage of tokens by given sets, one matrix product for many of them.

    Sets mostly agree, so what is multiplied is by what each differs from the majority: −1, 0 or 1,
    which bfloat16 holds exactly, and its rounding of a difference is far below what tells clusters
    apart.

    Args:
        active_sets: bool [K, I].
        dtype: of the importance that comes.
    """

    def __init__(self, active_sets: Tensor, dtype: torch.dtype) -> None:
        dtype = product_dtype(active_sets.device, dtype)
        self._usual = active_sets.float().mean(0) > 0.5
        self._others = (active_sets.to(dtype) - self._usual.to(dtype)).t().contiguous()

    def __call__(self, importance: Tensor) -> Tensor:
        """Σ_{i ∈ S_k} ē(t, i) of importance [n, I], any scale per token: [n, K] float32."""
        differences = importance.to(self._others.dtype) @ self._others
        values = importance.float()
        total = values.sum(-1, keepdim=True).clamp_min(1e-20)
        usual = (values @ self._usual.float()).unsqueeze(-1)
        return differences.float().add_(usual).div_(total)


def coverage_matrix(
    importance: Tensor, active_sets: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Coverage of each token by each set.

    Args:
        importance: [N, I], any scale per token.
        active_sets: bool [K, I].
        dtype: of the result.

    Returns:
        Σ_{i ∈ S_k} ē(t, i), [N, K].
    """
    of = Coverage(active_sets, importance.dtype)
    coverage = importance.new_empty(importance.shape[0], active_sets.shape[0], dtype=dtype)
    for rows in _chunks(importance):
        coverage[rows] = of(importance[rows])
    return coverage


def best_sets(importance: Tensor, active_sets: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage of each token by its best set, and which it is: float32 [N], int64 [N].

    Ties go to the lowest cluster. Never holds the whole [N, K] matrix.
    """
    of = Coverage(active_sets, importance.dtype)
    best = torch.empty(importance.shape[0], device=importance.device)
    ids = torch.empty(importance.shape[0], dtype=torch.int64, device=importance.device)
    for rows in _chunks(importance):
        torch.max(of(importance[rows]), dim=-1, out=(best[rows], ids[rows]))
    return best, ids


def _chunks(values: Tensor, width: int | None = None) -> Iterator[slice]:
    """Rows of values [N, C], some at a time."""
    return chunk_slices(values.shape[0], chunk_rows(width or values.shape[1], values.device))


def cluster_means(
    values: Tensor,
    assignment: Tensor,
    num_clusters: int,
    shrinkage: float = 0.0,
    transform: Callable[[Tensor], Tensor] = normalized,
    present: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Mean over each cluster's tokens of their normalized importance, float32 [K, ..., I].

    Args:
        values: one row per token [N, C].
        assignment: cluster of each token, int64 [N].
        num_clusters: K.
        shrinkage: weight, in tokens, of the mean over all tokens; keeps small clusters from
            following noise. An empty cluster gets that mean.
        transform: what is averaged, rows [n, C] -> [n, ..., I].
        present: which of E experts each token has, bool [N, E]; the I neurons are theirs one after the
            other, 0 where a token does not have them. Means are over a cluster's tokens that have the
            expert, those over all tokens likewise, and shrunk in turn toward the mean over all experts'
            neurons.
        width: C of what ``transform`` computes with, for the number of rows at a time.
    """
    sums: Tensor | None = None
    for rows in _chunks(values, width):
        chunk = transform(values[rows])
        if sums is None:
            sums = torch.zeros(num_clusters, *chunk.shape[1:], device=chunk.device)
        sums.index_add_(0, assignment[rows], chunk)
    assert sums is not None, "no tokens to average"
    prior = max(shrinkage, 1e-6)
    if present is None:
        counts = torch.bincount(assignment, minlength=num_clusters).view(-1, *[1] * (sums.ndim - 1))
        overall = sums.sum(0) / values.shape[0]
        return (sums + prior * overall) / (counts + prior)
    own = expert_counts(assignment, present, num_clusters).to(sums.device)
    counts = own.repeat_interleave(sums.shape[-1] // own.shape[1], dim=-1)
    total = sums.sum(0)
    level = total.sum(-1, keepdim=True) / counts.sum()  # of a neuron where it is present
    overall = (total + prior * level) / (counts.sum(0) + prior)
    counts = counts.view(num_clusters, *[1] * (sums.ndim - 2), -1)
    return (sums + prior * overall) / (counts + prior)


def expert_counts(assignment: Tensor, present: Tensor, num_clusters: int) -> Tensor:
    """How many tokens of each cluster have each expert, float32 [K, E].

    Args:
        assignment: cluster of each token, int64 [N].
        present: which experts each has, bool [N, E].
        num_clusters: K.
    """
    counts = torch.zeros(num_clusters, present.shape[1], device=present.device)
    return counts.index_add_(0, assignment.to(present.device), present.float())


def fit_awc(
    importance: Tensor,
    *,
    num_clusters: int,
    set_size: int,
    generator: torch.Generator,
    max_iterations: int = 10,
    tolerance: float = 2e-4,
    progress: ProgressReporter | None = None,
    present: Tensor | None = None,
) -> Clustering:
    """Cluster the tokens of one layer.

    Starts from the patterns of K random tokens, each averaged with the overall mean. Clusters left
    empty are reseeded with the tokens that are covered worst. Stops when the objective rises by less
    than ``tolerance``.

    Args:
        importance: [N, I], ≥ 0, any scale per token.
        num_clusters: K ≤ N.
        set_size: neurons in every active set.
        generator: source of randomness, on the CPU.
        max_iterations: bound on the iterations.
        tolerance: smallest rise of mean coverage that goes on.
        progress: reports one unit per iteration.
        present: as of :func:`cluster_means`; sets then hold what matters most of each expert where a
            token has it.

    Returns:
        Clustering with active sets of exactly ``set_size`` neurons.
    """
    num_tokens = importance.shape[0]
    seeds = torch.randperm(num_tokens, generator=generator)[:num_clusters]
    shrinkage = 0.0 if present is None else _EXPERT_SHRINKAGE
    together = importance.new_zeros(num_tokens, dtype=torch.int64)
    overall = cluster_means(importance, together, 1, present=present)
    centroids = 0.5 * normalized(importance[seeds.to(importance.device)]) + 0.5 * overall
    sets = top_sets(centroids, set_size)
    history: list[dict[str, float]] = []
    with (progress or SilentProgress()).task("cluster", max_iterations) as advance:
        for _ in range(max_iterations):
            coverage, assignment = best_sets(importance, sets)
            objective = coverage.mean().item()
            sizes = torch.bincount(assignment, minlength=num_clusters)
            empty = (sizes == 0).nonzero().squeeze(-1)
            history.append({"objective": objective, "empty_clusters": float(len(empty))})
            if len(history) > 1 and objective - history[-2]["objective"] < tolerance:
                break
            centroids = cluster_means(
                importance, assignment, num_clusters, shrinkage, present=present
            )
            if len(empty):
                worst = coverage.topk(len(empty), largest=False).indices
                centroids[empty] = 0.5 * normalized(importance[worst]) + 0.5 * overall
            sets = top_sets(centroids, set_size)
            advance(1)
    return Clustering(sets, centroids, best_sets(importance, sets)[1], history)
