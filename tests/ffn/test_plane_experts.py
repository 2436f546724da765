"""Experts in planes: packed, run dense and sparse, saved and loaded, and given back as floats."""

import copy

import pytest
import torch
from helpers import (
    IDS,
    assert_same_state,
    logits,
    needs_library,
    random_cluster_set,
)
from model_types import tiny_model_of_type

from sparse_runtime import cost_report, dense, fast_linear, sparsify, unsparsify
from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.ffn.plane_config import PlaneConfig
from sparse_runtime.ffn.plane_experts import PlaneExperts
from sparse_runtime.ffn.plane_modules import PlaneFFN
from sparse_runtime.ffn.plane_packing import pack_model, unpack_model
from sparse_runtime.models.ffn_layers import find_ffn_layers

pytestmark = needs_library

KINDS = ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoe"]
LONG = torch.arange(40).view(1, 40)


@pytest.fixture(params=KINDS)
def model(request):
    return tiny_model_of_type(request.param)


def with_looks(model, density=0.6):
    """Random clusters of which looks decide on half of the neurons."""
    clusters = random_cluster_set(model, density)
    for layer in find_ffn_layers(model, packed=True):
        own = clusters.layers[layer.index]
        own.maybe_sets = torch.randint(0, 256, own.active_sets.shape, dtype=torch.uint8)
        own.maybe_sets &= ~own.active_sets & own.active_sets[:1].bitwise_or(255)
        if layer.intermediate_size % 8:
            own.maybe_sets[:, -1] &= (1 << layer.intermediate_size % 8) - 1
        own.factors = torch.full((layer.intermediate_size,), 20.0)
        own.cluster_weights = torch.linspace(0.5, 1.5, own.num_clusters)
    return clusters


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_packed_values_are_those_of_the_floats(model, bits):
    """The kernels', the unpacked blocks' for more tokens, and those of the model given back."""
    before = logits(model)
    packed = pack_model(model, bits)
    if bits == 8:  # with fewer the model's router may choose others
        torch.testing.assert_close(logits(packed), before, rtol=0.05, atol=0.1)
    assert any(isinstance(module, PlaneExperts) for module in packed.modules())
    found, many = logits(packed), logits(packed, LONG)
    unpacked = unpack_model(packed)
    assert not any(isinstance(module, PlaneFFN) for module in unpacked.modules())
    torch.testing.assert_close(logits(unpacked), found, rtol=1e-2, atol=5e-3)
    torch.testing.assert_close(logits(unpacked, LONG), many, rtol=1e-2, atol=5e-3)


def test_saved_and_loaded(model, tmp_path):
    packed = pack_model(model, 6)
    found = logits(packed)
    packed.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_state(loaded, packed)
    torch.testing.assert_close(logits(loaded), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [4, 6])
def test_sparse_kernels_equal_the_reference(model, weights):
    clusters = with_looks(model)
    pack_model(model, weights)
    results, shares = [], []
    for backend in ("cpu", "reference"):
        sparsify(model, clusters, prefill="sparse", backend=backend, tau=2.0)
        results.append(logits(model))
        shares.append(cost_report(model).cost_share)
        unsparsify(model)
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert 0.02 < shares[0] < 0.5


def test_sparsify_packs_and_unsparsify_gives_back(model):
    before, original = logits(model), copy.deepcopy(model)
    sparsify(model, random_cluster_set(model, 1.0), weights=8, keep_float=True, prefill="sparse")
    assert 1e-4 < (logits(model) - before).abs().max() < 0.1 * before.abs().max()
    with dense(model):
        logits(model)
    report = cost_report(model)
    assert set(report.dense_reasons) == {"dense()"}
    tokens = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == IDS.shape[1] + 3
    unsparsify(model)
    assert_same_state(model, original)
    assert torch.equal(logits(model), before)


def test_linear_layers_beside_packed_experts(model):
    pack_model(model, 6, linears=8)
    found = logits(model)
    assert found.isfinite().all()
    fast_linear(unpack_model(model))
    torch.testing.assert_close(logits(model), found, rtol=0.05, atol=0.05)


def test_packing_while_loading_is_refused_by_name(tmp_path):
    tiny = tiny_model_of_type("mixtral")
    tiny.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=r"mixture of experts.*pack_model"):
        type(tiny).from_pretrained(tmp_path, quantization_config=PlaneConfig(bits=6))
