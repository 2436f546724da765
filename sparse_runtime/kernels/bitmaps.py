"""Neuron sets as bitmaps: bit ``i % 8`` of byte ``i // 8`` says whether neuron ``i`` is in the set."""

from __future__ import annotations

import torch
from torch import Tensor

_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask [..., I] into a bitmap [..., ⌈I/8⌉] uint8, padding bits zero."""
    padding = -mask.shape[-1] % 8
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, padding)).unflatten(-1, (-1, 8))
    weights = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmap: Tensor, num_neurons: int) -> Tensor:
    """Unpack a bitmap [..., ⌈I/8⌉] uint8 into a bool mask [..., I]."""
    weights = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=bitmap.device)
    bits = (bitmap.unsqueeze(-1) & weights) != 0
    return bits.flatten(-2)[..., :num_neurons]


def set_sizes(bitmap: Tensor) -> Tensor:
    """Number of neurons in each set: bitmap [..., ⌈I/8⌉] uint8 -> [...] int64."""
    # Bits are added within bytes, in pairs, fours and eights: no temporary is larger than the bitmap.
    pairs = bitmap - ((bitmap >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(-1)


def union(bitmap: Tensor, other: Tensor | None) -> Tensor:
    """Neurons in either of two bitmaps [..., ⌈I/8⌉] uint8; where there is no other, the first."""
    return bitmap if other is None else bitmap | other
