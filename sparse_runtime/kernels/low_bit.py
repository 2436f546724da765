"""4-bit copies of gate and up: enough to tell which neurons a token needs, at 18 % of their bytes.

One record of bytes per neuron, so that looking at it is one stream. With G = ⌈H/64⌉ groups along the
hidden size, a record of 68·G bytes holds

    gate codes [G, 32] | up codes [G, 32] | gate scales [G] bfloat16 | up scales [G] bfloat16

Byte b of a group holds the code of its element b in the low four bits and of element b + 32 in the high
ones. A code c stands for (c − 8)·scale. Elements past H have code 8.

Scales may be negative: the element of largest magnitude gets code 0 or its neighbor, as there are eight
codes on that side and seven on the other. Against a symmetric −7…7 that takes a quarter off the squared
error, for the same bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.cost import record_size

GROUP = 64
# Of the scale that would map the largest element to code 0 exactly; the least squared error on the
# weights of SmolLM2, 0.0091 to 0.0098 of their energy (1.00: 2 % more, 0.90: 7 % more).
_SHRINK = 0.97
# Rows per step: the float32 temporaries stay small.
_BLOCK_VALUES = 1 << 20


def quantize_rows(w_gate: Tensor, w_up: Tensor) -> Tensor:
    """Make the low-bit copies of an FFN's neurons.

    Args:
        w_gate: gate projection [I, H], bfloat16, float16 or float32.
        w_up: up projection [I, H].

    Returns:
        records [I, R] uint8, on the weights' device; R as of :func:`record_size`.
    """
    num_neurons, hidden_size = w_gate.shape
    records = torch.empty(
        num_neurons, record_size(hidden_size), dtype=torch.uint8, device=w_gate.device
    )
    step = max(1, _BLOCK_VALUES // max(1, hidden_size))
    for first in range(0, num_neurons, step):
        rows = slice(first, first + step)
        gate_codes, gate_scales = _quantize(w_gate[rows])
        up_codes, up_scales = _quantize(w_up[rows])
        scales = torch.cat([gate_scales, up_scales], dim=1).view(torch.uint8)
        records[rows] = torch.cat([gate_codes, up_codes, scales], dim=1)
    return records


def dequantize_rows(records: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Gate and up [I, H] float32 that records [I, R] stand for."""
    groups = record_size(hidden_size) // 68
    codes, scales = records.split([64 * groups, 4 * groups], dim=1)
    count = len(records)
    codes = codes.reshape(count, 2, groups, 32)
    values = torch.cat([codes & 0x0F, codes >> 4], dim=-1).float() - 8
    values *= scales.reshape(-1).view(torch.bfloat16).float().view(count, 2, groups, 1)
    gate, up = values.flatten(2)[..., :hidden_size].unbind(1)
    return gate, up


def rounded_tokens(x: Tensor) -> Tensor:
    """Hidden states [n, H] as the kernels see them when they look: 8 bits, one scale per group.

    With the largest magnitude of a group of 64 as 127; float32 [n, H]. A group that holds NaN or
    infinity becomes NaN, one below 1e-30 zero.
    """
    groups = _groups(x)
    largest = groups.abs().amax(-1, keepdim=True)
    # NaN compares false with everything.
    inverse = torch.where(largest <= 1e-30, 0, 127 / largest)
    return ((groups * inverse).round() * (largest / 127)).flatten(1)[:, : x.shape[1]]


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rows, 32·G] uint8 and scales [rows, G] bfloat16 of a weight [rows, H]."""
    groups = _groups(weight)
    low, high = groups.amin(-1), groups.amax(-1)
    extreme = torch.where(high > -low, high, low)
    scales = (extreme * (-_SHRINK / 8)).to(torch.bfloat16)
    wide = scales.float().unsqueeze(-1)
    inverse = torch.where(wide != 0, 1 / wide, 0)
    codes = groups.mul_(inverse).add_(8).round_().clamp_(0, 15).to(torch.uint8)
    return (codes[..., :32] | codes[..., 32:] << 4).flatten(1), scales


def _groups(values: Tensor) -> Tensor:
    """[n, H] as a float32 copy [n, G, 64], zeros past H."""
    padding = -values.shape[1] % GROUP
    padded = F.pad(values.to(torch.float32, copy=True), (0, padding))
    return padded.view(values.shape[0], padded.shape[1] // GROUP, GROUP)
