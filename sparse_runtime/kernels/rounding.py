"""Rounding float rows to planes (``kernels/planes.py``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.cost import GROUP
from sparse_runtime.kernels.planes import NeuronPlanes, PlaneFormat, Rounded, pack_neurons

# Steps that are tried, in parts of the one that maps a group's largest element to the largest code.
_SHRINKS = (1.0, 0.92, 0.84, 0.76)
# Elements per step of the search: its float32 temporaries stay in the cache.
_BLOCK_VALUES = 1 << 18


def round_rows(weight: Tensor, form: PlaneFormat, importance: Tensor | None = None) -> Rounded:
    """Round rows to the nearest codes, with the scales of the least squared error among a few.

    Args:
        weight: [rows, H], bfloat16, float16 or float32.
        form: planes to round to.
        importance: what an error counts by column [H] float32, E[x²] of the inputs; alike if None.

    Returns:
        codes and scales, on the weight's device.
    """
    parts = [
        _round_block(block, form, importance)
        for block in weight.split(max(1, _BLOCK_VALUES // max(1, weight.shape[1])))
    ]
    hi, lo, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Rounded(hi, lo, scales, form)


def round_neurons(
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    form: PlaneFormat,
    activation: str,
    importance: Tensor | None = None,
) -> NeuronPlanes:
    """Round an FFN's weights.

    Args:
        gate: gate projection [I, H].
        up: up projection [I, H].
        down_t: transposed down projection [I, H].
        form: planes to round to.
        activation: by the kernels' name.
        importance: E[x²] of the hidden states [H] float32, or None.
    """
    return pack_neurons(
        round_rows(gate, form, importance),
        round_rows(up, form, importance),
        round_rows(down_t, form),
        activation,
    )


def _round_block(
    weight: Tensor, form: PlaneFormat, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = weight.shape
    padded = F.pad(weight.float(), (0, -size % GROUP)).view(rows, -1, GROUP)
    counts = None
    if importance is not None:
        counts = F.pad(importance.float(), (0, -size % GROUP)).view(-1, GROUP)
    low, high = padded.amin(-1), padded.amax(-1)
    extreme = torch.where(high > -low, high, low)
    best: tuple[Tensor, Tensor] | None = None
    for shrink in _SHRINKS:
        # The element of largest magnitude gets the code that has no opposite.
        scales = (extreme * (-shrink / 2 ** (form.base - 1))).to(torch.bfloat16)
        error = _errors(padded, scales, form, counts)
        if best is None:
            best = scales, error
            continue
        better = error < best[1]
        best = torch.where(better, scales, best[0]), torch.where(better, error, best[1])
    assert best is not None
    hi, lo = _codes(padded, best[0], form)
    flat = (codes.view(rows, -1)[:, :size].to(torch.int8) for codes in (hi, lo))
    return *flat, best[0]


def _codes(values: Tensor, scales: Tensor, form: PlaneFormat) -> tuple[Tensor, Tensor]:
    """Base and residual codes [rows, G, 64] float32 of values and scales [rows, G]."""
    wide = scales.float().unsqueeze(-1)
    scaled = values * torch.where(wide != 0, 1 / wide, 0)
    most, r = 2 ** (form.base - 1), form.residual
    if not r:
        return scaled.round_().clamp_(-most, most - 1), torch.zeros_like(values)
    half = 2 ** (r - 1)
    full = (scaled * 2**r).round_().clamp_(-most * 2**r - half, (most - 1) * 2**r + half - 1)
    hi = ((full + half) / 2**r).floor_()
    return hi, full - hi * 2**r


def _errors(values: Tensor, scales: Tensor, form: PlaneFormat, importance: Tensor | None) -> Tensor:
    """Squared errors of groups [rows, G]: of the full values, and of the base, as much smaller."""
    hi, lo = _codes(values, scales, form)
    wide = scales.float().unsqueeze(-1)
    error = (values - wide * (hi + lo / 2**form.residual)).square_()
    if form.residual:
        error += (values - wide * hi).square_() / 4**form.residual
    return (error if importance is None else error * importance).sum(-1)
