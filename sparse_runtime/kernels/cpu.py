"""The C++ backend: a library of fused operations, loaded when a CPU model first asks for it."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from sparse_runtime.errors import BackendUnavailableError

#: What the kernels compute in.
CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIBRARY = Path(__file__).with_name("libsparse_ffn_cpu.so")


@functools.cache
def load_cpu_library() -> bool:
    """Load the C++ library and register its fakes; False where it was not built or cannot load."""
    if not LIBRARY.is_file():
        return False
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        warnings.warn(f"{LIBRARY.name} does not load here: {error}", stacklevel=2)
        return False
    torch.library.register_fake("sparse_runtime::cpu_routed_ffn", _like_x)
    torch.library.register_fake("sparse_runtime::cpu_dense_ffn", _like_x)
    torch.library.register_fake("sparse_runtime::cpu_linear", _linear_fake)
    return True


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, *, strict: bool) -> str:
    """Pick the kernel backend of a model on ``device``.

    Args:
        name: ``auto``, ``cpu`` or ``reference``.
        device: of the model's weights.
        dtype: of the model's weights.
        strict: raise instead of falling back.

    Returns:
        ``cpu``, ``reference``, or ``dense`` where nothing faster than the dense FFN can run.

    Raises:
        BackendUnavailableError: ``cpu`` cannot run here and was asked for by name, or ``strict``.
    """
    if name == "reference":
        return "reference"
    problem = None
    if device.type != "cpu":
        problem = f"there is no fast backend for device {device} yet"
    elif dtype not in CPU_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in CPU_DTYPES)
        problem = f"the weights are {dtype}; the CPU kernels take {names}"
    elif not load_cpu_library():
        problem = (
            f"{LIBRARY.name} is not there: it is built by pip install where torch >= 2.10 and a C++ "
            "compiler are; install them and run pip install again"
        )
    elif torch.ops.sparse_runtime.cpu_isa() == "scalar" and name == "auto":
        problem = "this processor has none of AVX2, AVX-512 and NEON"
    if problem is None:
        return "cpu"
    if strict or name == "cpu":
        raise BackendUnavailableError(f"backend {name!r} cannot run: {problem}")
    _warn_once(f"sparse FFNs run dense: {problem}")
    return "dense"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _like_x(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down_t: Tensor, *extras: object) -> Tensor:
    _check_devices(x, w_gate, w_up, w_down_t, *(e for e in extras if isinstance(e, Tensor)))
    return x.new_empty(x.shape)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_devices(x, weight, *([] if bias is None else [bias]))
    return x.new_empty(x.shape[0], weight.shape[0])


def _check_devices(*tensors: Tensor | None) -> None:
    """Refuse a mixture: one meta tensor among real ones would get a fake's empty result."""
    devices = {"missing" if tensor is None else str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            "an operation of sparse_runtime takes tensors of one device; found "
            f"{' and '.join(sorted(devices))}; load the model's weights first"
        )
