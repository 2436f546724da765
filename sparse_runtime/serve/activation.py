"""The proof that a model runs sparse: it generates a little, and each layer's counters are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparse_runtime.api import reset_cost, sparse_modules
from sparse_runtime.ffn.counts import read_counts
from sparse_runtime.models.ffn_layers import find_ffn_layers

_TOKENS = 3


@dataclass(frozen=True)
class Activation:
    """What decode steps of a model have run on.

    Attributes:
        layers: FFNs of the model.
        sparse_layers: those that ran sparse, by their own counters.
        backends: that they ran on.
        why_dense: the reasons of others.
    """

    layers: int
    sparse_layers: int
    backends: tuple[str, ...]
    why_dense: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every FFN ran sparse."""
        return self.sparse_layers == self.layers

    def __str__(self) -> str:
        text = f"{self.sparse_layers} of {self.layers} FFN layers run sparse"
        if self.backends:
            text += f" on {', '.join(self.backends)}"
        return f"{text} (others: {'; '.join(self.why_dense)})" if self.why_dense else text


def prove(model: Any, prompt: list[int]) -> Activation:
    """Generate some tokens and read off what ran sparse; resets the model's counters.

    Args:
        model: sparse.
        prompt: token ids, at least one.
    """
    reset_cost(model)
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_TOKENS,
            min_new_tokens=_TOKENS,
            do_sample=False,
        )
    modules = sparse_modules(model)
    ran = [module for module in modules if read_counts(module).sparse_tokens]
    reasons: dict[str, None] = {}
    for module in modules:
        if module not in ran:
            counts = read_counts(module).dense
            reasons |= dict.fromkeys(
                [module.problem] if module.problem else filter(counts.get, counts)
            )
    layers = len(find_ffn_layers(model, packed=True, int8=True))
    if layers > len(modules):
        reasons["not in the artifact"] = None
    reset_cost(model)
    backends = dict.fromkeys(module.backend for module in ran)
    return Activation(layers, len(ran), tuple(backends), tuple(reasons))
