"""The C++ library; importing this skips a file of tests where there is none."""

from contextlib import contextmanager

import pytest
import torch

from sparse_runtime.kernels.cpu.library import LIBRARY, load_cpu_library

__all__ = ["ISAS", "LIBRARY", "forced", "ops"]
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
