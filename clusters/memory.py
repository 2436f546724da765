"""Errors that mean that memory ran out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, of the machine or of a GPU."""
    # On a CPU torch has no error type of its own for it.
    words = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in words or "not enough memory" in words
    )
