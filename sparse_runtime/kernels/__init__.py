"""One operation, several backends."""

from sparse_runtime.kernels.backends import BACKENDS, cpu_problem, resolve_backend
from sparse_runtime.kernels.cpu import load_cpu_library
from sparse_runtime.kernels.op import sparse_ffn
from sparse_runtime.kernels.reference import sparse_ffn_reference

__all__ = [
    "BACKENDS",
    "cpu_problem",
    "load_cpu_library",
    "resolve_backend",
    "sparse_ffn",
    "sparse_ffn_reference",
]
