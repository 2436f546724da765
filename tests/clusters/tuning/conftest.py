"""An artifact with centroids, and windows of text, that tuning is tried on."""

from dataclasses import replace

import pytest
import torch
from helpers import random_centroids, random_cluster_set

from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.models.ffn_layers import find_ffn_layers


@pytest.fixture
def clusters(tiny_model):
    """Centroids of the model's own activations on random states, in six equal clusters."""
    result = random_cluster_set(tiny_model, 0.5)
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    for layer in find_ffn_layers(tiny_model):
        h = importance_scorer(layer).activations(x)
        centroids = random_centroids(6, 44, seed=layer.index)
        noise = centroids.mean_magnitudes / centroids.mean_magnitudes.mean()
        clusters = result.layers[layer.index]
        clusters.cluster_bias = torch.zeros(6, 32)
        clusters.centroids = replace(
            centroids,
            mean_squares=h.square().mean(0) * noise,
            mean_magnitudes=h.abs().mean(0) * noise.sqrt(),
            mean_activations=h.mean(0).expand(6, -1),
            neuron_weights=torch.ones(44),
        )
    return result


@pytest.fixture
def windows():
    return torch.randint(0, 250, (12, 30), generator=torch.Generator().manual_seed(1))
