"""The C++ library; importing this skips a file of tests where there is none."""

from contextlib import contextmanager

import pytest
import torch

from sparse_runtime.kernels.cpu.library import LIBRARY, load_cpu_library

__all__ = ["EVERY_BACKEND", "ISAS", "LIBRARY", "every_backend", "forced", "ops", "placed"]
if not load_cpu_library():
    pytest.skip(
        "libsparse_ffn_cpu.so is not built: pip install -e . with a C++ compiler",
        allow_module_level=True,
    )
ops = torch.ops.sparse_runtime
ISAS = ops.cpu_isas().split(",")


@contextmanager
def forced(isa="", threads=None):
    """Run on one instruction set ("": the best) and on so many threads."""
    before = torch.get_num_threads()
    ops.cpu_force_isa(isa)
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        ops.cpu_force_isa("")
        torch.set_num_threads(before)


#: Parameters of :func:`every_backend`.
EVERY_BACKEND = [*ISAS, "triton", "reference"]


@contextmanager
def every_backend(name):
    """``cpu`` on an instruction set of the name, or the backend of the name; skips what cannot run."""
    if name == "triton":
        triton_ffn = pytest.importorskip("sparse_runtime.kernels.triton.ffn")
        pytest.importorskip("sparse_runtime.kernels.triton.plane_ffn")
        if not torch.cuda.is_available() and not triton_ffn.INTERPRETED:
            pytest.skip("no GPU, and TRITON_INTERPRET was not set")
    if name in ("triton", "reference"):
        yield name
        return
    with forced(name):
        yield "cpu"


def placed(backend, *tensors):
    """Tensors where a backend wants them."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return [None if tensor is None else tensor.to(device) for tensor in tensors]
