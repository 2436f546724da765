"""Offline: text → hidden states → importance → clusters and routers → artifact."""

from sparse_runtime.clusters.build import build_clusters
from sparse_runtime.clusters.calibrated_packing import pack_calibrated
from sparse_runtime.clusters.config import BuildConfig
from sparse_runtime.clusters.estimate import BuildEstimate, estimate_build
from sparse_runtime.clusters.tuning.in_loop import tuning_lines

__all__ = [
    "BuildConfig",
    "BuildEstimate",
    "build_clusters",
    "estimate_build",
    "pack_calibrated",
    "tuning_lines",
]
