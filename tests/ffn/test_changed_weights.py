"""Weights that change after ``sparsify``: nothing that is derived from them is old."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import logits, make_tiny_model, needs_library, random_cluster_set

from sparse_runtime import cost_report, reset_cost, sparsify
from sparse_runtime.eval.latency.shapes import random_clusters

pytestmark = needs_library


@pytest.fixture
def looks(tiny_model):
    return random_clusters(tiny_model, density=0.5, looked=0.5, num_clusters=6, rank=4)


@pytest.mark.parametrize("attempt", range(5))
def test_memory_of_replaced_data_is_not_taken_for_the_old(tiny_model, looks, attempt):
    weight = tiny_model.model.layers[1].mlp.gate_proj.weight
    sparsify(tiny_model, looks, prefill="sparse")
    logits(tiny_model)
    weight.data = weight.data * 1.0
    weight.data = weight.data.flip(0)
    with pytest.warns(UserWarning, match="weights of model.layers.1.mlp have changed"):
        logits(tiny_model)


def test_compiled_calls_look_at_weights_as_they_are(tiny_model, looks):
    def edit(model):
        with torch.no_grad():
            weight = model.model.layers[1].mlp.gate_proj.weight
            weight.copy_(weight.flip(0))

    options = {"prefill": "sparse", "check_fingerprint": False}
    edited = copy.deepcopy(tiny_model)
    edit(edited)
    expected = logits(sparsify(edited, looks, **options))
    sparsify(tiny_model, looks, **options)
    edit(tiny_model)
    torch._dynamo.reset()
    compiled = torch.compile(tiny_model, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="have changed"):
        torch.testing.assert_close(logits(compiled), expected)


def test_a_copy_compiles_to_sparse_calls(sparse_model):
    copied = copy.deepcopy(sparse_model)
    reset_cost(copied)
    torch._dynamo.reset()
    logits(torch.compile(copied, backend="eager", fullgraph=True))
    assert cost_report(copied).dense_tokens == 0


@pytest.mark.parametrize("strict", [False, True])
def test_a_compiled_call_says_what_stands_in_its_way(tiny_model, strict):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse", strict=strict)
    tiny_model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *unused: None)
    torch._dynamo.reset()
    compiled = torch.compile(tiny_model, backend="eager", fullgraph=True)
    if strict:
        with pytest.raises(RuntimeError, match="up_proj has hooks"):
            logits(compiled)
        return
    with pytest.warns(UserWarning, match="up_proj has hooks"):
        logits(compiled)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = make_tiny_model()
        expected = logits(model)
    sparsify(model, random_cluster_set(model, 1.0), prefill="sparse")
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)


def test_swapping_conversion(sparse_model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        sparse_model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    reset_cost(sparse_model)
    logits(sparse_model)
    assert cost_report(sparse_model).dense_tokens == 0
