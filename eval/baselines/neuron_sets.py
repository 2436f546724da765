"""Opponents that choose whole neurons without a predictor: floors and ceilings of any that has one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_runtime.clusters.importance import importance_scorer, normalized
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.eval.baselines.masked_ffn import (
    MaskedOutput,
    Masks,
    Variants,
    activations,
    most,
    run_neurons,
)
from sparse_runtime.models.ffn_layer import FFNLayer

_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class OracleMasks:
    """Each token's most important neurons, as if they were known.

    Attributes:
        share: of the neurons, the largest by |h_i|·‖down_i‖₂.
        norms: ‖down_i‖₂ [I] float32.
    """

    share: float
    norms: Tensor

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        h = activations(layer, x)
        return run_neurons(layer, x, most(h.abs() * self.norms, self.share), h=h)


class Oracle:
    """The ceiling: neurons chosen after all were computed, at no cost, one density everywhere."""

    name = "oracle"
    needs_prompt = False

    def least_share(self, layer: FFNLayer) -> float:
        """Choosing is free."""
        return 0.0

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Nothing is fitted."""
        norms = importance_scorer(layer).neuron_weights
        return [{self.name: OracleMasks(budget, norms)} for budget in budgets]


@dataclass(frozen=True)
class SetMasks:
    """One set for all tokens.

    Attributes:
        kept: bool [I].
    """

    kept: Tensor

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        return run_neurons(layer, x, self.kept)


class Static:
    """The neurons most important on the whole: what pruning would keep."""

    name = "static"
    needs_prompt = False

    def least_share(self, layer: FFNLayer) -> float:
        """Nothing is chosen at run time."""
        return 0.0

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Means of each token's normalized importance."""
        scorer = importance_scorer(layer)
        total = torch.zeros(layer.intermediate_size, device=layer.device)
        for chunk in states.split(_CHUNK_TOKENS):
            total += normalized(scorer(chunk.to(total.device))).sum(0)
        return [{self.name: SetMasks(most(total, budget))} for budget in budgets]


class Random:
    """The floor: random neurons, the same for all tokens.

    Args:
        seed: of the choice, which differs from layer to layer.
    """

    name = "random"
    needs_prompt = False

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def least_share(self, layer: FFNLayer) -> float:
        """Nothing is chosen at run time."""
        return 0.0

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Nothing is fitted; the set of a larger budget holds that of a smaller one."""
        generator = layer_generator(self._seed, layer.index)
        order = torch.rand(layer.intermediate_size, generator=generator)
        order = order.to(layer.device)
        return [{self.name: SetMasks(most(order, budget))} for budget in budgets]


@dataclass(frozen=True)
class GriffinMasks:
    """The neurons that mattered in the prompt.

    Attributes:
        share: of the neurons.
    """

    share: float

    def after(self, layer: FFNLayer, prompt: Tensor) -> Masks:
        """One set for all tokens after a prompt of hidden states [T, H]."""
        h = activations(layer, prompt).float()
        relative = h / h.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        return SetMasks(most(relative.norm(dim=0), self.share))


class Griffin:
    """GRIFFIN (arXiv 2404.01365): a sequence keeps the neurons with the largest
    s_i = ‖(h(t, i) ÷ ‖h(t)‖₂)_t‖₂ over its prompt."""

    name = "griffin"
    needs_prompt = True

    def least_share(self, layer: FFNLayer) -> float:
        """The choice is made in the prompt, which runs densely anyway."""
        return 0.0

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Nothing is fitted."""
        return [{self.name: GriffinMasks(budget)} for budget in budgets]
