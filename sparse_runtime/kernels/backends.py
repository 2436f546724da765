"""Which kernels a model on a device can run."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable

import torch

from sparse_runtime.errors import BackendUnavailableError
from sparse_runtime.kernels.cpu.library import LIBRARY, load_cpu_library

BACKENDS = ("auto", "cpu", "triton", "reference")
#: What the kernels compute in.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Volta, the first that Triton compiles for.
_LEAST_CAPABILITY = (7, 0)


def resolve_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    strict: bool,
    warn: Callable[[str], None] = warnings.warn,
) -> str:
    """Pick the kernel backend of a model on ``device``.

    Args:
        name: one of ``BACKENDS``.
        device: of the model's weights.
        dtype: of the model's weights.
        strict: raise instead of falling back.
        warn: is told why, on falling back.

    Returns:
        ``cpu``, ``triton``, ``reference``, or ``dense`` where nothing faster than the dense FFN can
        run.

    Raises:
        BackendUnavailableError: the backend cannot run here and was asked for by name, or ``strict``.
    """
    if name == "reference":
        return "reference"
    backend = name
    if name == "auto":
        backend = "cpu" if device.type == "cpu" else "triton"
    if backend == "cpu":
        problem = cpu_problem(device, dtype, by_name=name == "cpu")
    else:
        problem = triton_problem(device, dtype)
    if problem is None:
        return backend
    if strict or name != "auto":
        raise BackendUnavailableError(f"backend {name!r} cannot run: {problem}")
    warn(f"sparse FFNs run dense: {problem}")
    return "dense"


def cpu_problem(device: torch.device, dtype: torch.dtype, *, by_name: bool = False) -> str | None:
    """Why the C++ kernels cannot run for weights on a device, None if they can.

    Their slowest form, for processors without vector units, counts only if asked for by name.
    """
    if device.type != "cpu":
        return f"the weights are on {device}; the CPU kernels need them on the CPU"
    if dtype not in KERNEL_DTYPES:
        return _wrong_dtype(dtype)
    if not load_cpu_library():
        if sys.platform not in ("linux", "darwin"):
            return f"the CPU kernels are not built on {sys.platform}; on Windows use WSL"
        return (
            f"{LIBRARY.name} is not there: it is built by pip install where torch >= 2.10 and a C++ "
            "compiler are; install them and run pip install --force-reinstall --no-deps again"
        )
    if torch.ops.sparse_runtime.cpu_isa() == "scalar" and not by_name:
        return "this processor has none of AVX2, AVX-512 and NEON"
    return None


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run for weights on a device, None if they can."""
    if device.type not in ("cuda", "cpu"):
        return f"there is no fast backend for device {device}"
    if dtype not in KERNEL_DTYPES:
        return _wrong_dtype(dtype)
    try:
        module = importlib.import_module("sparse_runtime.kernels.triton.ffn")
        importlib.import_module("sparse_runtime.kernels.triton.plane_ffn")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    if module.INTERPRETED:
        return None
    if device.type == "cpu":
        return f"the weights are on {device}; the Triton kernels need a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"{device} has compute capability {found}; the Triton kernels need 7.0 or more"
    return None


def _wrong_dtype(dtype: torch.dtype) -> str:
    names = ", ".join(str(known).removeprefix("torch.") for known in KERNEL_DTYPES)
    return f"the weights are {dtype}; the kernels take {names}"
