"""One operation, several backends."""

from sparse_runtime.kernels.op import BACKENDS, sparse_ffn
from sparse_runtime.kernels.reference import sparse_ffn_reference

__all__ = ["BACKENDS", "sparse_ffn", "sparse_ffn_reference"]
