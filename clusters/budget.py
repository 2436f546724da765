"""From centroids to active sets: one threshold over all layers and clusters, met to a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def threshold_sets(mean_squares: Tensor, threshold: float) -> Tensor:
    """Active sets bool [K, I]: neurons whose mean e² in the cluster exceeds the threshold.

    A set keeps its one best neuron at least.
    """
    sets = mean_squares > threshold
    sets.scatter_(1, mean_squares.argmax(-1, keepdim=True), True)
    return sets


def global_threshold(
    mean_squares: Sequence[Tensor], cluster_shares: Sequence[Tensor], mean_density: float
) -> float:
    """The threshold on mean e² at which the mean density over layers and tokens is ``mean_density``.

    Neurons are dropped in the order of the loss they are estimated to cost, whatever their layer, so
    that layers with concentrated importance give way to those without.

    Args:
        mean_squares: per layer, mean e² of each neuron over each cluster's tokens [K, I].
        cluster_shares: per layer, share of tokens in each cluster [K].
        mean_density: wanted, in (0, 1].

    Returns:
        The largest density not above the wanted one is reached at the returned threshold.
    """
    positive = torch.cat([values[values > 0] for values in mean_squares])
    low, high = positive.min().log().item() - 1, positive.max().log().item() + 1
    for _ in range(50):
        middle = (low + high) / 2
        threshold = torch.tensor(middle).exp().item()
        density = sum(
            (threshold_sets(values, threshold).float().mean(-1) * shares).sum().item()
            for values, shares in zip(mean_squares, cluster_shares, strict=True)
        ) / len(mean_squares)
        if density > mean_density:
            low = middle
        else:
            high = middle
    return torch.tensor(high).exp().item()
