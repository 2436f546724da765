"""What a build sees of planes: the students that are tuned, and the error of base planes."""

import copy

import pytest
import torch
from helpers import cuttable_cluster_set

from sparse_runtime import recut, sparsify, unsparsify
from sparse_runtime.clusters.plane_layers import base_error
from sparse_runtime.clusters.tuning.student import divergence, students
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.models.ffn_layer import layer_cost
from sparse_runtime.models.ffn_layers import find_ffn_layers


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_students_over_planes_compute_what_the_runtime_does(tiny_model, bits):
    """The same neurons skipped, counted and refined, and a gradient that reaches the biases."""
    clusters = cuttable_cluster_set(tiny_model)
    windows = torch.randint(0, 250, (12, 30), generator=torch.Generator().manual_seed(1))
    for layer in clusters.layers.values():
        layer.weights, layer.base_error = bits, 0.3
    pack_model(tiny_model, bits)
    cost = layer_cost(find_ffn_layers(tiny_model, packed=True)[0], 0, verified=True)
    cut = recut(
        tiny_model, clusters, budget=0.75 * cost.whole_bytes / cost.dense_bytes, verify=True
    )
    assert any(layer.maybe_sets is not None for layer in cut.layers.values())
    with torch.inference_mode():
        dense = tiny_model(windows).logits
    sparsify(tiny_model, cut, backend="reference", prefill="sparse")
    with torch.inference_mode():
        expected = tiny_model(windows).logits
    unsparsify(tiny_model)
    assert (dense - expected).abs().max() > 0.2
    with students(tiny_model, cut.layers, 0, 0) as modules:
        found = tiny_model(windows).logits
        # A decision or two may fall otherwise: both round.
        assert (found - expected).abs().mean() < 0.02 * (dense - expected).abs().mean()
        loss = divergence(tiny_model, modules, windows)
        loss.backward()
        assert loss.item() > 0
        gradients = [module.common.grad for module in modules.values()]
        assert any(grad is not None and grad.any() for grad in gradients)


def test_the_error_of_base_planes_is_measured(tiny_model):
    """Larger for coarser bases, none where there is nothing but a base, and of neurons that matter."""
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    errors = {}
    for bits in (4, 5, 6):
        model = copy.deepcopy(tiny_model)
        pack_model(model, bits)
        errors[bits] = base_error(find_ffn_layers(model, packed=True)[0], x, None)
    assert errors[4] == 0
    assert 0.001 < errors[6] < 0.05
    assert 2 * errors[6] < errors[5] < 0.3
