"""Opponents that skip what is small: thresholds on what the FFN computes anyway."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_runtime.eval.baselines.masked_ffn import (
    MaskedOutput,
    Variants,
    activations,
    cost_shares,
    most,
    threshold_for,
)
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS
from sparse_runtime.models.ffn_layer import FFNLayer

# Thresholds come from so many tokens, spread over the calibration text: a layer's mean density varies
# by 0.1 / √4096 or so, less than one text differs from another.
_THRESHOLD_TOKENS = 4096


@dataclass(frozen=True)
class TealMasks:
    """Thresholds of one layer: what is not above them in magnitude counts as zero.

    Attributes:
        x_threshold: on entries of the hidden state; skips columns of gate and up.
        h_threshold: on entries of the activation; skips rows of transposed down.
    """

    x_threshold: float
    h_threshold: float

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        kept_x = x.abs() > self.x_threshold
        h = activations(layer, x * kept_x)
        kept_h = h.abs() > self.h_threshold
        share_x, share_h = (kept.float().mean(-1) for kept in (kept_x, kept_h))
        return MaskedOutput(
            layer.down(h * kept_h), cost_shares(layer, share_x, share_x, share_h), None
        )


class Teal:
    """TEAL (arXiv 2408.14690), with one sparsity for all layers and matrices.

    The paper also searches a sparsity for each matrix; that search is left out.
    """

    name = "teal"
    needs_prompt = False

    def least_share(self, layer: FFNLayer) -> float:
        """Nothing is read but what is kept."""
        return 0.0

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Thresholds of each budget: as large a share of x and of h is kept."""
        x = _sample(layer, states)
        fits: list[Variants] = []
        for budget in budgets:
            x_threshold = threshold_for(x.abs(), budget)
            # Of the h that the masked x gives: it is smaller than the dense one.
            h = activations(layer, x * (x.abs() > x_threshold))
            masks = TealMasks(x_threshold, threshold_for(h.float().abs(), budget))
            fits.append({self.name: masks})
        return fits


@dataclass(frozen=True)
class WinaMasks:
    """Shares of one layer's inputs that are kept, each token's largest by weight norms.

    Attributes:
        share: of the entries of the hidden state, for gate and up apart, and of the activation.
        norms: of the columns of gate [H], up [H] (of gate again without one) and down [I], float32.
    """

    share: float
    norms: tuple[Tensor, Tensor, Tensor]

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        of_gate, of_up, of_down = self.norms
        kept_gate, kept_up = (most(x.abs() * norms, self.share) for norms in (of_gate, of_up))
        h = activations(layer, x * kept_gate, x * kept_up)
        kept_h = most(h.abs() * of_down, self.share)
        shares = (kept.float().mean(-1) for kept in (kept_gate, kept_up, kept_h))
        return MaskedOutput(layer.down(h * kept_h), cost_shares(layer, *shares), None)


class Wina:
    """WINA (arXiv 2505.19427): inputs weighted by the norms of the columns they meet.

    Each token keeps as many entries. The paper also rotates the weights so that their columns are
    orthogonal, which its error bound needs; a rotation through SwiGLU is left out.
    """

    name = "wina"
    needs_prompt = False

    def least_share(self, layer: FFNLayer) -> float:
        """Nothing is read but what is kept."""
        return 0.0

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Norms of the weights; no text is needed."""
        gate, up, down = (
            linear.weight.detach().float().norm(dim=0)
            for linear in (layer.gate, layer.up or layer.gate, layer.down)
        )
        return [{self.name: WinaMasks(budget, (gate, up, down))} for budget in budgets]


@dataclass(frozen=True)
class CatsMasks:
    """Threshold of one layer on |act(gate·x)|; up and down are read for the neurons above it."""

    threshold: float

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        gate = ACTIVATION_FUNCTIONS[layer.activation](layer.gate(x))
        kept = gate.abs() > self.threshold
        computed = kept.float().mean(-1)
        h = gate * kept if layer.up is None else gate * kept * layer.up(x)
        return MaskedOutput(layer.down(h), cost_shares(layer, 1.0, computed, computed), computed)


class Cats:
    """CATS (arXiv 2404.08763): the gate is computed in full and tells what else to skip."""

    name = "cats"
    needs_prompt = False

    def least_share(self, layer: FFNLayer) -> float:
        """The gate is a third of the FFN, or half of one without up."""
        return 1 / (layer.form.matrices + 1)

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Thresholds of each budget: (3·budget − 1)/2 of the neurons are kept, or 2·budget − 1."""
        rest = layer.form.matrices
        act = ACTIVATION_FUNCTIONS[layer.activation]
        gate = act(layer.gate(_sample(layer, states))).float().abs()
        return [
            {self.name: CatsMasks(threshold_for(gate, ((rest + 1) * budget - 1) / rest))}
            for budget in budgets
        ]


def _sample(layer: FFNLayer, states: Tensor) -> Tensor:
    """Tokens spread over the states, as the layer takes them [n, H]."""
    step = -(-len(states) // _THRESHOLD_TOKENS)
    return states[torch.arange(0, len(states), step)].to(layer.gate.weight)
