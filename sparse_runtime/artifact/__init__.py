"""What is on disk: the cluster artifact, its checks, and the sets cut from it."""

from sparse_runtime.artifact.bands import LayerCentroids
from sparse_runtime.artifact.cluster_set import ClusterSet, LayerClusters

__all__ = ["ClusterSet", "LayerCentroids", "LayerClusters"]
