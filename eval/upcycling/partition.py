"""Splitting the neurons of an FFN into experts of equal size by which tokens need them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens over which neurons are compared, and over which they choose experts.
_PROFILE_TOKENS = 4096
_ASCENT_TOKENS = 8192
_KMEANS_STEPS = 15
_ASCENT_STEPS = 20


def balanced_labels(scores: Tensor) -> Tensor:
    """Give every row one column, each column to as many rows, the highest scores first.

    Greedy, which is not always the best assignment.

    Args:
        scores: [I, E], with I a multiple of E.

    Returns:
        Column of each row, int64 [I].
    """
    rows, columns = scores.shape
    labels, room = [-1] * rows, [rows // columns] * columns
    order = scores.flatten().argsort(descending=True, stable=True)
    for row, column in zip((order // columns).tolist(), (order % columns).tolist(), strict=True):
        if labels[row] < 0 and room[column]:
            labels[row] = column
            room[column] -= 1
    return torch.tensor(labels, device=scores.device)


def chosen_experts(mass: Tensor, active: int) -> Tensor:
    """The experts with the most mass of each token: 1 for those, 0 for others, as float [n, E]."""
    return torch.zeros_like(mass).scatter_(-1, mass.topk(active, dim=-1).indices, 1.0)


def expert_mass(energy: Tensor, labels: Tensor, experts: int) -> Tensor:
    """Sum of each expert's energy [n, E]; see :func:`split_neurons`."""
    return energy @ F.one_hot(labels, experts).to(energy)


def split_neurons(energy: Tensor, experts: int, active: int, generator: torch.Generator) -> Tensor:
    """Split neurons into experts so that few experts hold most of each token's energy.

    Balanced spherical k-means over the neurons' centered importance, which puts together what acts
    together; then, in turns, each token takes its best ``active`` experts and each neuron the expert
    whose tokens have most of its energy.

    Args:
        energy: squared importance of each neuron for each token, in shares of the token's, [n, I].
        experts: E, a divisor of I.
        active: experts that a token may take.
        generator: draws the first centroids.

    Returns:
        Expert of each neuron, int64 [I].
    """
    profiles = energy[:_PROFILE_TOKENS].sqrt()
    profiles = F.normalize((profiles - profiles.mean(0)).T)
    draw = torch.randperm(len(profiles), generator=generator)[:experts].to(profiles.device)
    centroids = profiles[draw]
    for _ in range(_KMEANS_STEPS):
        labels = balanced_labels(profiles @ centroids.T)
        sums = F.one_hot(labels, experts).to(profiles).T @ profiles
        centroids = F.normalize(sums)
    energy = energy[:_ASCENT_TOKENS]
    best, most = labels, -1.0
    for _ in range(_ASCENT_STEPS):
        mass = expert_mass(energy, labels, experts)
        choice = chosen_experts(mass, active)
        captured = (mass * choice).sum().item()
        if captured <= most:
            break
        best, most = labels, captured
        gains = energy.T @ choice
        labels = balanced_labels(gains - gains.mean(-1, keepdim=True))
    return best
