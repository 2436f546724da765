"""Offline: text → hidden states → importance → clusters and routers → artifact."""

from sparse_runtime.clusters.build import build_clusters
from sparse_runtime.clusters.config import BuildConfig
from sparse_runtime.clusters.tuning.in_loop import tuning_line

__all__ = ["BuildConfig", "build_clusters", "tuning_line"]
