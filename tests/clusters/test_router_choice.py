"""Choosing a router: what clusters lose and what they read, at one price."""

from dataclasses import replace

import pytest
import torch
from helpers import random_centroids

from sparse_runtime.artifact.bands import StageCosts, cut_bands
from sparse_runtime.clusters import BuildConfig, build_clusters, router_choice
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.clusters.layer_build import FittedLayer
from sparse_runtime.clusters.router_choice import priced_loss
from sparse_runtime.cost import FFNCost
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.predictors import new_router

PRICE = 0.02


@pytest.mark.parametrize("verify", [False, True])
def test_priced_loss_by_hand(tiny_model, verify):
    layer = find_ffn_layers(tiny_model)[1]
    cost = FFNCost(32, 44, extra_elements=100, verified=verify)
    router = new_router(32, 6, None)
    torch.nn.init.normal_(router.up, generator=torch.Generator().manual_seed(0))
    centroids = replace(
        random_centroids(6, 44, seed=1, scale=0.05), neuron_weights=torch.full((44,), 0.5)
    )
    fitted = FittedLayer(router, torch.ones(6, 44, dtype=torch.bool), centroids, {})
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(2))
    stages = StageCosts.of(cost)
    found = priced_loss(x, fitted, layer, cost, stages, PRICE)

    bands = cut_bands(centroids, PRICE, stages)
    h = importance_scorer(layer).activations(x)
    total = 0.0
    for token in range(30):
        cluster = int((x[token] @ router.up.t()).argmax())
        for neuron in range(44):
            loss = (float(h[token, neuron]) * 0.5) ** 2
            looked = verify and bool(bands.maybe[cluster, neuron])
            if looked:
                total += PRICE * 68 / (3 * 32 * 2)
            if bool(bands.sure[cluster, neuron]) or (looked and loss > PRICE):
                total += PRICE
            else:
                total += loss
        total += PRICE * (100 * 2 + (2 if verify else 1) * 6) / (3 * 32 * 2)
    assert found == pytest.approx(total / 30, rel=1e-4)
    assert (bands.sure.any() and not bands.sure.all()) or verify


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_auto_takes_the_least(tiny_model, tiny_tokenizer, text, monkeypatch, allocation):
    """Of all candidates on all probed layers; the sum decides."""
    monkeypatch.setattr(router_choice, "ROUTER_CANDIDATES", (None, 4, 1))
    name = "priced_loss" if allocation == "global" else "estimated_loss"
    original, seen = getattr(router_choice, name), {}

    def spy(*arguments):
        value = original(*arguments)
        router = arguments[1].router if allocation == "global" else arguments[2]
        rank = None if router.down is None else len(router.down)
        seen[rank] = seen.get(rank, 0.0) + value
        return value

    monkeypatch.setattr(router_choice, name, spy)
    config = BuildConfig(
        num_clusters=6,
        budget=0.7,
        window=50,
        max_tokens=2000,
        allocation=allocation,
        loop_weights=False,
        distill=0,
    )
    clusters = build_clusters(tiny_model, tiny_tokenizer, [text], config)
    assert set(seen) == {None, 4, 1}
    assert all(value > 0 for value in seen.values())
    best = min(seen, key=seen.get)
    assert clusters.build["router_rank"] == best
    assert {layer.router_rank for layer in clusters.layers.values()} == {best}
