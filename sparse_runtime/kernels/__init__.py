"""One operation, several backends."""

from sparse_runtime.kernels.backends import BACKENDS, cpu_problem, resolve_backend
from sparse_runtime.kernels.cpu.library import load_cpu_library
from sparse_runtime.kernels.op import dense_ffn, routed_ffn, sparse_ffn
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    FFNWeights,
    RouterWeights,
)
from sparse_runtime.kernels.reference import router_logits, sparse_ffn_reference

__all__ = [
    "BACKENDS",
    "ClusterTables",
    "Compensation",
    "Counters",
    "FFNWeights",
    "RouterWeights",
    "cpu_problem",
    "dense_ffn",
    "load_cpu_library",
    "resolve_backend",
    "routed_ffn",
    "router_logits",
    "sparse_ffn",
    "sparse_ffn_reference",
]
