"""Block sizes of the Triton kernels by card and shape: measured by ``tune``, or an H200's.

They are chosen here and not by Triton's own autotuner, which measures during the first call: that
cannot be done while a CUDA graph is captured.
"""

from __future__ import annotations

import functools
import json
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from sparse_runtime.files import cache_folder, write_json

_FILE = "triton_configs.json"


@dataclass(frozen=True)
class TritonConfig:
    """Block sizes; all are powers of two.

    Args:
        route_rows: rows of the router projected by one program.
        route_hidden: elements of these rows per step.
        route_clusters: logits per step of the program that picks.
        route_warps: of these programs.
        look_rows: neurons that one program looks at; 8 or more.
        look_warps: of these programs.
        linear_rows: rows of a linear layer in planes per program, for few tokens; 16 or more.
        linear_warps: of these programs.
        gate_rows: neurons of gate and up per program, for one token.
        gate_hidden: elements of their rows per step.
        gate_warps: of these programs.
        down_rows: neurons of down per step, for one token.
        down_hidden: outputs per program.
        down_splits: programs that share the neurons of the same outputs.
        down_warps: of these programs.
        down_stages: steps whose rows are on the way at once.
        many_rows: neurons per program or step, for several tokens; 16 or more.
        many_hidden: elements of the rows of gate and up per step; 16 or more.
        many_outputs: outputs of down per program; 16 or more.
        many_splits: as ``down_splits``, for several tokens.
        many_warps: of these programs.
        max_tokens: calls of more tokens run densely.
    """

    route_rows: int = 1
    route_hidden: int = 4096
    route_clusters: int = 256
    route_warps: int = 16
    look_rows: int = 32
    look_warps: int = 4
    linear_rows: int = 16
    linear_warps: int = 2
    gate_rows: int = 2
    gate_hidden: int = 1024
    gate_warps: int = 4
    down_rows: int = 16
    down_hidden: int = 512
    down_splits: int = 32
    down_warps: int = 4
    down_stages: int = 3
    many_rows: int = 64
    many_hidden: int = 64
    many_outputs: int = 128
    many_splits: int = 16
    many_warps: int = 4
    max_tokens: int = 1


def config_for(
    device: torch.device, hidden_size: int, neurons: int, dtype: torch.dtype
) -> TritonConfig:
    """The configuration measured for a card and shape, or the default with one warning.

    Args:
        device: a CUDA device; the CPU (under the interpreter) has the default.
        hidden_size: H.
        neurons: I.
        dtype: of the weights.
    """
    if device.type != "cuda":
        return TritonConfig()
    card = torch.cuda.get_device_name(device)
    measured = _read().get(_key(card, hidden_size, neurons, dtype))
    if measured is not None:
        with suppress(TypeError):  # of another version
            return TritonConfig(**measured)
    _warn_once(
        f"the sparse FFN's kernels are not tuned for {card} and FFNs of {hidden_size} x {neurons}; "
        "they run with an H200's settings. 'sparse-runtime tune MODEL' measures better ones, once"
    )
    return TritonConfig()


def remember(
    card: str, hidden_size: int, neurons: int, dtype: torch.dtype, config: TritonConfig
) -> None:
    """Keep a measured configuration in the user's cache folder.

    Raises:
        OutputFolderError: it cannot be written.
    """
    entries = _read()
    entries[_key(card, hidden_size, neurons, dtype)] = asdict(config)
    write_json(cache_folder() / _FILE, entries)


def _key(card: str, hidden_size: int, neurons: int, dtype: torch.dtype) -> str:
    return f"{card}, {hidden_size} x {neurons}, {str(dtype).removeprefix('torch.')}"


def _read() -> dict[str, Any]:
    try:
        entries = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = {field.name for field in fields(TritonConfig)}
    if not isinstance(entries, dict):
        return {}
    return {
        key: value
        for key, value in entries.items()
        if isinstance(value, dict)
        and set(value) <= names
        and all(isinstance(size, int) and size > 0 for size in value.values())
    }


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
