"""The C++ backend: a library of fused operations, loaded when a CPU model first asks for it."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from sparse_runtime.errors import BackendUnavailableError

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
    torch.library.register_fake("sparse_runtime::cpu_routed_ffn", _routed_ffn_fake)
    return True


def resolve_backend(name: str, device: torch.device, *, strict: bool) -> str:
    """Pick the kernel backend of a model on ``device``.

    Args:
        name: ``auto``, ``cpu`` or ``reference``.
        device: of the model's weights.
        strict: raise instead of falling back.

    Returns:
        ``cpu`` or ``reference``.

    Raises:
        BackendUnavailableError: ``cpu`` cannot run here and was asked for by name, or ``strict``.
    """
    if name == "reference":
        return "reference"
    available = device.type == "cpu" and load_cpu_library()
    if available:
        return "cpu"
    if device.type != "cpu":
        problem = f"there is no fast backend for device {device} yet"
    else:
        problem = (
            f"{LIBRARY.name} is not there: it is built by pip install where torch and a C++ compiler "
            "are"
        )
    if strict or name == "cpu":
        raise BackendUnavailableError(f"backend {name!r} cannot run: {problem}")
    _warn_once(f"sparse FFNs run in plain PyTorch, slower than dense: {problem}")
    return "reference"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _routed_ffn_fake(x: Tensor, *unused: object) -> Tensor:
    return x.new_empty(x.shape)
