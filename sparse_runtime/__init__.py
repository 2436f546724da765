"""Faster Hugging Face language models: read only the feed-forward neurons a token needs."""

import importlib
from typing import TYPE_CHECKING, Any

from sparse_runtime.api import (
    cost_report,
    dense,
    reset_cost,
    sparse_modules,
    sparsify,
    unsparsify,
)
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.artifact.recut import recut
from sparse_runtime.compiled import compiled_decode
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import CostReport
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.ffn import plane_registration as _plane_registration  # noqa: F401
from sparse_runtime.ffn.fast_linear import fast_linear, slow_linear
from sparse_runtime.version import __version__

if TYPE_CHECKING:
    from sparse_runtime.attention import fast_attention, slow_attention
    from sparse_runtime.ffn.plane_config import PlaneConfig

__all__ = [
    "ClusterSet",
    "CostReport",
    "LayerClusters",
    "PlaneConfig",
    "SparseConfig",
    "SparseRuntimeError",
    "__version__",
    "compiled_decode",
    "cost_report",
    "dense",
    "fast_attention",
    "fast_linear",
    "recut",
    "reset_cost",
    "slow_attention",
    "slow_linear",
    "sparse_modules",
    "sparsify",
    "unsparsify",
]


# What extends classes of transformers, which is imported only for those who ask for it.
_LATE = {
    "PlaneConfig": "sparse_runtime.ffn.plane_config",
    "fast_attention": "sparse_runtime.attention",
    "slow_attention": "sparse_runtime.attention",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
