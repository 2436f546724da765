"""A model whose FFNs are in planes while clusters are built for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.clusters.calibrated_packing import pack_calibrated
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.ffn.plane_restoring import Packing
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.progress import ProgressReporter

#: Tokens whose statistics weights are rounded by.
ROUNDING_TOKENS = 16_384
# Tokens that the error of base planes is measured on.
_ERROR_TOKENS = 2048


@contextmanager
def packed(
    model: Any, windows: Tensor, bits: int, progress: ProgressReporter | None = None
) -> Iterator[None]:
    """Inside, the FFNs of a float model are in planes; afterwards they are what they were.

    Args:
        model: a float causal language model; its float weights stay in memory, or on the disk.
        windows: token ids of calibration text [W, window] int64, for compensated rounding.
        bits: of the planes.
        progress: as of ``pack_calibrated``.
    """
    packing = Packing.of(model, keep_float=True, offloaded=True)
    try:
        pack_calibrated(
            model,
            windows[: max(1, ROUNDING_TOKENS // windows.shape[1])],
            bits,
            packing=packing,
            progress=progress,
        )
        yield
    finally:
        packing.undo(model)


def base_error(layer: FFNLayer, hidden_states: Tensor, neuron_weights: Tensor | None) -> float:
    """ρ²: of the neurons that matter, the share of e² that their base planes lose.

    Errors of h, in e's own unit, and of down's rows, relative to these, add up. Neurons matter whose e²
    by base planes is above the mean.

    Args:
        layer: packed.
        hidden_states: its inputs [n, H].
        neuron_weights: w [I], so that e = h·w; ‖down_i‖₂ if None.
    """
    base_gate, base_up, base_down_t = layer.rows(base=True)
    scorer = importance_scorer(layer, neuron_weights)
    looker = replace(scorer, gate=base_gate, up=base_up)
    down_t = layer.down_rows()
    x = hidden_states[:: max(1, len(hidden_states) // _ERROR_TOKENS)].float().to(base_gate.device)
    look, full = (one.activations(x) * scorer.neuron_weights for one in (looker, scorer))
    matters = look.square() > look.square().mean()
    whole = full[matters].square().sum().clamp_min(1e-30)
    error = (full - look)[matters].square().sum() / whole
    error += (down_t - base_down_t).square().sum() / down_t.square().sum().clamp_min(1e-30)
    return float(torch.clamp(error, 0, 1))
