"""Sparse FFNs by number, because torch 2.10 takes no module for the argument of what it calls while it
traces."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

_BY_KEY: WeakValueDictionary[int, Any] = WeakValueDictionary()
_KEYS = itertools.count()


def key_for(ffn: Any, key: int) -> int:
    """The number of a sparse FFN: the one it says, or a new one for a new one or a copy."""
    if _BY_KEY.get(key) is not ffn:
        key = next(_KEYS)
        _BY_KEY[key] = ffn
    return key


@torch.compiler.assume_constant_result
def is_intact_now(key: int) -> bool:
    """Whether the kernels may stand in for an FFN's projections, asked once while torch traces."""
    intact: bool = _BY_KEY[key]._is_intact_now()
    return intact
