"""The C++ backend: a library of fused operations, loaded when a CPU model first asks for it."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from sparse_runtime.cost import num_groups, plane_size

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
    torch.library.register_fake("sparse_runtime::cpu_plane_ffn", _like_x)
    torch.library.register_fake("sparse_runtime::cpu_plane_linear", _plane_linear_fake)
    torch.library.register_fake("sparse_runtime::cpu_plane_values", _plane_values_fake)
    torch.library.register_fake("sparse_runtime::cpu_round_rows", _round_rows_fake)
    torch.library.register_fake("sparse_runtime::cpu_pack_plane", _pack_plane_fake)
    return True


def runs_natively(tensor: Tensor) -> bool:
    """Whether the library's loops can stand for torch's on a tensor, which has elements then."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and load_cpu_library()


def _like_x(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down_t: Tensor, *extras: object
) -> Tensor:
    given = (extra for extra in (w_up, *extras) if isinstance(extra, Tensor))
    _check_devices(x, w_gate, w_down_t, *given)
    return x.new_empty(x.shape)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_devices(x, weight, *([] if bias is None else [bias]))
    return x.new_empty(x.shape[0], weight.shape[0])


def _plane_linear_fake(
    x: Tensor, records: Tensor, base: int, residual: int, bias: Tensor | None
) -> Tensor:
    _check_devices(x, records, *([] if bias is None else [bias]))
    return x.new_empty(x.shape[0], records.shape[0])


def _plane_values_fake(
    records: Tensor,
    residuals: Tensor,
    scales: Tensor,
    base: int,
    residual: int,
    length: int,
    like: Tensor,
) -> Tensor:
    _check_devices(records, residuals, scales, like)
    return like.new_empty(records.shape[0], length)


def _round_rows_fake(
    weight: Tensor,
    base: int,
    residual: int,
    steps: Tensor,
    limit: float,
    offset: float,
    share: float,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(weight, steps, *([] if counts is None else [counts]))
    hi = weight.new_empty(weight.shape, dtype=torch.int8)
    scales = weight.new_empty(weight.shape[0], num_groups(weight.shape[1]), dtype=torch.bfloat16)
    return hi, torch.empty_like(hi), scales


def _pack_plane_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(codes.shape[0], plane_size(codes.shape[1], bits), dtype=torch.uint8)


def _check_devices(*tensors: Tensor | None) -> None:
    """Refuse a mixture: one meta tensor among real ones would get a fake's empty result."""
    devices = {"missing" if tensor is None else str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            "an operation of sparse_runtime takes tensors of one device; found "
            f"{' and '.join(sorted(devices))}; load the model's weights first"
        )
