"""Offline: text → hidden states → importance → clusters and routers → artifact."""

from sparse_runtime.clusters.build import build_clusters
from sparse_runtime.clusters.config import BuildConfig

__all__ = ["BuildConfig", "build_clusters"]
