"""The experts and the router of one layer, made of its dense FFN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.eval.upcycling.partition import expert_mass, split_neurons
from sparse_runtime.eval.upcycling.routing import expert_weights, train_router
from sparse_runtime.models.ffn_layer import FFNLayer

#: Of the mean squared activation: how much the dense weights are trusted beside the calibration text.
_RIDGE = 1e-2


@dataclass(frozen=True)
class LayerExperts:
    """Weights of a mixture as Mixtral holds them, float32.

    Attributes:
        router: [E, H].
        gate_up: gate over up of each expert [E, 2 · I/E, H].
        down: [E, H, I/E]; ``active`` times those of the FFN, as the weights of the chosen experts sum
            to one.
        load: share of the calibration tokens that take each expert.
        error: of the output, squared, relative to its own square; the calibration tokens' mean.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    load: tuple[float, ...] = ()
    error: float = 0.0


def cut_experts(
    layer: FFNLayer, labels: Tensor, router: Tensor, active: int, down_t: Tensor | None = None
) -> LayerExperts:
    """Cut an FFN into experts.

    Args:
        layer: a gated FFN of I neurons without biases.
        labels: expert of each neuron, as many of each, int64 [I].
        router: [E, H].
        active: experts a token.
        down_t: rows of down [I, H] in place of the layer's own.
    """
    gate, up, own_down_t = layer.rows()
    assert up is not None
    order = labels.argsort(stable=True)
    down_t = own_down_t if down_t is None else down_t
    gate, up, down_t = (
        rows.float()[order].unflatten(0, (len(router), -1)) for rows in (gate, up, down_t)
    )
    return LayerExperts(
        router=router,
        gate_up=torch.cat([gate, up], dim=1),
        down=active * down_t.transpose(1, 2).contiguous(),
    )


@torch.no_grad()
def fit_experts(
    layer: FFNLayer, states: Tensor, experts: int, active: int, generator: torch.Generator
) -> LayerExperts:
    """Split an FFN into experts, train a router, and let the chosen ones make up for the others.

    Down is fitted by least squares to the dense output over the tokens, held to the dense weights by a
    ridge.

    Args:
        layer: a gated FFN without biases.
        states: its inputs over calibration text [n, H] float32.
        experts: E, a divisor of the number of neurons.
        active: experts a token.
        generator: of everything that is drawn.
    """
    scorer = importance_scorer(layer)
    hidden = scorer.activations(states)
    energy = (hidden * scorer.neuron_weights).square_()
    energy /= energy.sum(-1, keepdim=True).clamp_min(1e-20)
    labels = split_neurons(energy, experts, active, generator)
    if active == experts:
        router = torch.zeros(experts, states.shape[1], device=states.device)
    else:
        mass = expert_mass(energy, labels, experts)
        with torch.enable_grad():
            router = train_router(states, mass, active, generator)
    del energy
    weights = expert_weights(states, router, active)
    down_t = layer.down_rows().float()
    output = hidden @ down_t
    hidden *= active * weights[:, labels]
    # Every token counts alike: a few, at which attention sinks, have outputs hundreds of times as long.
    lengths = output.norm(dim=-1, keepdim=True).clamp_min(1e-20)
    hidden /= lengths
    missing = output / lengths - hidden @ down_t
    gram = hidden.T @ hidden
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp_min(1e-20))
    change = torch.linalg.solve(gram, hidden.T @ missing)
    missing -= hidden @ change
    result = cut_experts(layer, labels, router, active, down_t + change)
    load = (weights > 0).float().mean(0)
    error = missing.square().sum(-1).mean()
    return LayerExperts(
        result.router, result.gate_up, result.down, tuple(load.tolist()), error.item()
    )
