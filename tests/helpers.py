"""Builders shared by the tests."""

from sparse_runtime import ClusterSet
from sparse_runtime.eval.shapes import random_clusters


def random_cluster_set(model, density, num_clusters=6, rank=4) -> ClusterSet:
    """Random sets and routers that fit a tiny model."""
    return random_clusters(model, density=density, num_clusters=num_clusters, rank=rank)
