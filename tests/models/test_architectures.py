"""The model types that were there first, with all that runs over them, their heads tied or not."""

import copy

import pytest
import torch
from helpers import IDS, assert_same_state, logits, make_tiny_model_of, needs_library
from helpers import random_cluster_set as random_clusters

from sparse_runtime import cost_report, fast_linear, reset_cost, sparsify, unsparsify
from sparse_runtime.attention import fast_attention
from sparse_runtime.ffn.plane_packing import pack_model, unpack_model
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import fingerprint_mismatch, model_fingerprint

KINDS = ["llama", "mistral", "qwen2"]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request, kind):
    return make_tiny_model_of(kind, tie_word_embeddings=request.param)


def biases(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(".bias")}


def test_its_ffns_are_found(model, kind):
    layers = find_ffn_layers(model)
    assert model.config.model_type == kind
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp" for i in range(3)]
    found = {(layer.hidden_size, layer.intermediate_size, layer.activation) for layer in layers}
    assert found == {(32, 44, "silu")}


def test_its_fingerprint(model, kind):
    fingerprint = model_fingerprint(model)
    assert fingerprint["model_type"] == kind
    assert fingerprint_mismatch(copy.deepcopy(model).bfloat16(), fingerprint) is None
    assert fingerprint_mismatch(pack_model(copy.deepcopy(model), 6, linears=8), fingerprint) is None
    other = make_tiny_model_of(next(name for name in KINDS if name != kind))
    assert "model_type is" in fingerprint_mismatch(other, fingerprint)


@needs_library
def test_full_sets_compute_the_model(model):
    before, expected = copy.deepcopy(model), logits(model)
    text = model.generate(IDS, **GREEDY)
    sparsify(model, random_clusters(model, 1.0), prefill="sparse", fast_linear=True)
    fast_attention(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    reset_cost(model)
    assert torch.equal(model.generate(IDS, **GREEDY), text)
    assert cost_report(model).dense_tokens == 0
    unsparsify(model)
    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)


@needs_library
def test_sets_leave_something_out(model):
    expected = logits(model)
    sparsify(model, random_clusters(model, 0.4), prefill="sparse")
    assert (logits(model) - expected).abs().max() > 0.05


@needs_library
@pytest.mark.parametrize("linears", [None, 8])
def test_full_sets_over_planes_compute_the_packed_values(model, linears):
    expected = unpack_model(pack_model(copy.deepcopy(model), 6, linears=linears))
    clusters = random_clusters(model, 1.0)
    sparsify(model, clusters, prefill="sparse", weights=6, linear_weights=linears)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-2, atol=2e-2)
    assert cost_report(model).dense_tokens == 0


@needs_library
@pytest.mark.parametrize("bits", [None, 8], ids=["float", "planes"])
def test_fast_linear_adds_the_biases(model, kind, bits):
    """Those of q, k and v, whose weights are packed or not."""
    assert len(biases(model)) == {"qwen2": 9}.get(kind, 0)
    fast = fast_linear(copy.deepcopy(model), bits=bits)
    if bits is not None:
        model = unpack_model(pack_model(model, None, linears=bits))
    assert biases(fast).keys() == biases(model).keys()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if bits is None else {"rtol": 1e-2, "atol": 2e-2}
    expected = logits(model)
    torch.testing.assert_close(logits(fast), expected, **tolerance)
    if biases(model):
        with torch.no_grad():
            for parameter in (*biases(model).values(), *biases(fast).values()):
                parameter.zero_()
        assert (logits(model) - expected).abs().max() > 0.1
        torch.testing.assert_close(logits(fast), logits(model), **tolerance)
