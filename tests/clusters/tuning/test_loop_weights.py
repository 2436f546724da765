"""Weighing layers in the loop, against differences of the runtime's own outputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparse_runtime import recut, sparse_modules, sparsify, unsparsify
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.clusters.tuning.loop_weights import _line, _measured, loop_weights, scaled
from sparse_runtime.kernels.bitmaps import unpack_bits
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.progress import SilentProgress


def test_loop_weights_are_what_restoring_a_layer_is_worth(tiny_model, clusters, windows):
    """Against differences of the runtime's own outputs, with a hundredth of a layer given back."""
    cut = recut(tiny_model, clusters, budget=0.85, verify=False)
    found = _measured(tiny_model, cut, windows, None, SilentProgress(), Buffers())

    layers = {layer.index: layer for layer in find_ffn_layers(tiny_model)}
    with torch.inference_mode():
        expected = tiny_model(windows).logits.double().log_softmax(-1)
    sparsify(tiny_model, cut, backend="reference", prefill="sparse")
    modules = {module.layer_index: module for module in sparse_modules(tiny_model)}

    def run():
        with torch.inference_mode():
            logits = tiny_model(windows).logits.double().log_softmax(-1)
        return (expected.exp() * (expected - logits)).sum(-1).mean().item()

    ratios, step = [], 0.02
    for index, module in modules.items():
        left_out = []

        def give_back(module, arguments, output, index=index, left_out=left_out):
            x = arguments[0].reshape(-1, 32)
            h = importance_scorer(layers[index]).activations(x)
            chosen = unpack_bits(module.tables.active_sets, 44)[module.cluster_ids(x)]
            left_out.append((h.square() * ~chosen).sum(-1).mean().item())
            return output + give_back.share * (module.dense(arguments[0]) - output)

        handle = module.register_forward_hook(give_back)
        values = []
        for give_back.share in (step, -step, 0.0):
            values.append(run())
        handle.remove()
        ratios.append((values[1] - values[0]) / (2 * step) / left_out[-1])
    unsparsify(tiny_model)
    assert max(map(abs, ratios)) > 0.05
    assert list(found.values()) == pytest.approx(ratios, rel=0.05, abs=0.02)
    weights = loop_weights(tiny_model, cut, windows)
    slope, offset = np.polyfit([0, 1, 2], list(found.values()), 1)
    assert weights == pytest.approx({i: max(0.1, offset + slope * i) for i in range(3)})


def test_the_line_through_few_layers():
    own = {number: number for number in range(4)}
    assert _line(own, {0: 1.0, 2: 3.0, 3: 4.0}) == pytest.approx({0: 1, 1: 2, 2: 3, 3: 4})
    few = {number: number for number in range(3)}
    assert _line(few, {0: -2.0, 1: 0.0, 2: 2.0}) == pytest.approx({0: 0.1, 1: 0.1, 2: 2})
    assert _line({0: 0, 1: 1}, {0: 5.0, 1: 6.0}) == {0: 1.0, 1: 1.0}
    # What runs beside experts has their depth.
    assert _line({0: 0, 1: 1, 2: 2, 4: 1}, {0: 1.0, 1: 2.0, 2: 3.0})[4] == pytest.approx(2.0)


def test_scaled_multiplies_e_squared(tiny_model, clusters):
    factors = {0: 4.0, 1: 1.0, 2: 0.25}
    result = scaled(clusters, factors)
    layers = {}
    for index, factor in factors.items():
        old, new = clusters.layers[index], result.layers[index]
        assert new.centroids is old.centroids
        weighted = new.centroids.weighted(new.cluster_weights)
        before = old.centroids.weighted(old.cluster_weights)
        torch.testing.assert_close(weighted.mean_squares, before.mean_squares * factor)
        torch.testing.assert_close(weighted.mean_magnitudes, before.mean_magnitudes * factor**0.5)
        centroids = replace(
            old.centroids,
            mean_squares=old.centroids.mean_squares * factor,
            mean_magnitudes=old.centroids.mean_magnitudes * factor**0.5,
            neuron_weights=old.centroids.neuron_weights * factor**0.5,
        )
        layers[index] = replace(old, centroids=centroids)
    # Cut as if the centroids themselves were multiplied, and looks are compared with the same e.
    expected = recut(tiny_model, replace(clusters, layers=layers), budget=0.6, verify=True)
    found = recut(tiny_model, result, budget=0.6, verify=True)
    for index, layer in expected.layers.items():
        other = found.layers[index]
        assert torch.equal(other.active_sets, layer.active_sets)
        assert torch.equal(other.maybe_sets, layer.maybe_sets)
        (found_e, expected_e) = (
            one.factors * (torch.ones(one.num_clusters) if weights is None else weights)[:, None]
            for one, weights in ((other, other.cluster_weights), (layer, layer.cluster_weights))
        )
        torch.testing.assert_close(found_e, expected_e)
