"""Linear layers and FFNs over weights in planes, for few tokens and for many."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.kernels.planes import NeuronPlanes, PlaneFormat, unpack_linear
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

# Rows that are unpacked at a time, for a matrix product of a library's.
_BLOCK_ROWS = 1024


def plane_linear(
    x: Tensor, records: Tensor, form: PlaneFormat, bias: Tensor | None = None
) -> Tensor:
    """A linear layer over rows in planes.

    Args:
        x: inputs [n, K], bfloat16, float16 or float32.
        records: of the layer's rows [N, R] uint8 (``kernels/planes.py``).
        form: their format.
        bias: [N] of x's dtype, or None.

    Returns:
        [n, N] of x's dtype.
    """
    parts = [
        F.linear(x, unpack_linear(block, form, x.shape[1]).values().to(x.dtype))
        for block in records.split(_BLOCK_ROWS)
    ]
    output = torch.cat(parts, dim=1)
    return output if bias is None else output + bias


def dense_plane_ffn(x: Tensor, planes: NeuronPlanes) -> Tensor:
    """All neurons with all their bits: y [n, H] of hidden states x [n, H], of x's dtype."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for first in range(0, planes.look.shape[0], _BLOCK_ROWS):
        gate, up, down = (
            rows.values().to(x.dtype) for rows in planes.rounded(slice(first, first + _BLOCK_ROWS))
        )
        h = ACTIVATION_FUNCTIONS[planes.activation](F.linear(x, gate)) * F.linear(x, up)
        output += h @ down
    return output.to(x.dtype)
