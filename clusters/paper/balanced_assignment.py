"""Balanced assignment of binary patterns to clusters, as the AWC paper's public artifact does it.

Sequential by definition: a cluster's choice depends on what all earlier ones took. Distances come
in blocks of clusters from one matmul over the points still free; the choices of a group of clusters
come from one selection of candidates, walked through in order on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_runtime.clusters.importance import chunk_slices
from sparse_runtime.clusters.paper.binary_patterns import PackedPatterns

#: Clusters whose candidates are selected together, and bound on candidates a cluster.
_GROUP_CLUSTERS = 16
_GROUP_CANDIDATES = 4096


def balanced_assignment(
    patterns: PackedPatterns, centroids: Tensor, *, memory_mib: int = 512
) -> tuple[Tensor, Tensor]:
    """Give each cluster, in index order, its nearest ⌊N/K⌋ points that no earlier one took.

    Ties go to the lowest point index. Distances are whole numbers, so the answer depends neither on
    the block sizes nor on the device.

    Args:
        patterns: N ≥ K points.
        centroids: bool or 0/1 [K, I].
        memory_mib: bound on the distances held at once.

    Returns:
        Cluster of each point, int64 [N], and its distance, int64 [N]; -1 for the N mod K points
        left over.
    """
    num_points, num_clusters, device = len(patterns), len(centroids), patterns.bits.device
    capacity = num_points // num_clusters
    missing = 1 - centroids.to(device=device, dtype=torch.float32)
    dtype = torch.int16 if patterns.num_neurons < 2**15 else torch.int32
    assignment = torch.full((num_points,), -1, dtype=torch.int64, device=device)
    distance = assignment.clone()
    left = torch.arange(num_points, device=device)
    first = 0
    while first < num_clusters:
        block = max(1, memory_mib * 2**20 // (len(left) * dtype.itemsize))
        rows = slice(first, min(first + block, num_clusters))
        points = patterns.select(left)
        table = torch.empty(rows.stop - first, len(left), dtype=dtype, device=device)
        for columns in points.blocks(rows.stop - first):
            table[:, columns] = missing[rows] @ points.dense(columns.start, columns.stop).t()
        owner, owner_distance = _take_in_order(table, capacity)
        taken = owner >= 0
        assignment[left[taken]] = owner[taken] + first
        distance[left[taken]] = owner_distance[taken]
        left = left[~taken]
        first = rows.stop
    return assignment, distance


def _take_in_order(table: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Row by row, take the ``capacity`` smallest columns that no earlier row took.

    Args:
        table: distances [B, n], whole numbers, with n ≥ B · capacity.
        capacity: columns for each row.

    Returns:
        Row that took each column and its distance there, int64 [n] both; -1 where none did.
    """
    owner = np.full(table.shape[1], -1, dtype=np.int64)
    distance = owner.copy()
    free = np.arange(table.shape[1])
    group = max(1, min(_GROUP_CLUSTERS, _GROUP_CANDIDATES // capacity))
    for rows in chunk_slices(len(table), group):
        group_table = table[rows].index_select(1, torch.from_numpy(free).to(table.device))
        # Earlier rows of the group can take at most (group − 1) · capacity of a row's favorites, so
        # this many candidates always leave it enough.
        candidates = _smallest_keys(group_table, len(group_table) * capacity)
        taken = np.zeros(len(free), dtype=bool)
        for row, keys in enumerate(candidates, start=rows.start):
            row_distance, position = np.divmod(keys, len(free))
            chosen = np.flatnonzero(~taken[position])[:capacity]
            position = position[chosen]
            taken[position] = True
            owner[free[position]] = row
            distance[free[position]] = row_distance[chosen]
        free = free[~taken]
    return torch.from_numpy(owner).to(table.device), torch.from_numpy(distance).to(table.device)


def _smallest_keys(table: Tensor, size: int) -> NDArray[Any]:
    """Keys ``distance · n + column`` of the ``size`` smallest of each row, ascending.

    Args:
        table: distances [B, n], whole numbers.
        size: at most n.

    Returns:
        [B, size] int32 or int64; keys are distinct, so ties go to the lowest column.
    """
    width = table.shape[1]
    if table.device.type == "cpu":
        # numpy on one thread, with SIMD in partition: 3 ns an element, half of that in int32, where
        # torch.topk takes 61 ns, and 50 ns go into the keys alone when other threads are busy.
        values = table.numpy()
        wide = (int(values.max()) + 1) * width >= 2**31
        keys: NDArray[Any] = values.astype(np.int64 if wide else np.int32)
        keys *= width
        keys += np.arange(width, dtype=keys.dtype)
        return np.sort(np.partition(keys, size - 1, axis=-1)[:, :size], axis=-1)
    on_device = table.to(torch.int64) * width + torch.arange(width, device=table.device)
    return on_device.topk(size, dim=-1, largest=False, sorted=True).values.cpu().numpy()
