"""Sparse runs of a build: the bytes and the outputs of the run time's own, part by part."""

import pytest
import torch
from helpers import make_tiny_model, random_centroids, random_cluster_set
from model_types import tiny_model_of_type

from sparse_runtime import cost_report, recut, sparsify, unsparsify
from sparse_runtime.clusters.tuning import masks
from sparse_runtime.clusters.tuning.held_out import sparse_runs
from sparse_runtime.clusters.tuning.masks import kept_looks
from sparse_runtime.clusters.tuning.student import students
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.models.ffn_layers import find_ffn_layers


def windows():
    return torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(3))


def cut_for(model, budget, verify):
    clusters = random_cluster_set(model, 0.5, num_clusters=4)
    for index, layer in clusters.layers.items():
        layer.centroids = random_centroids(4, layer_sizes(model)[index], seed=index)
        layer.cluster_bias = torch.zeros(4, layer.hidden_size)
    return recut(model, clusters, budget=budget, verify=verify)


def layer_sizes(model):
    return {layer.index: layer.intermediate_size for layer in find_ffn_layers(model, packed=True)}


@pytest.mark.parametrize(
    ("bits", "verify", "budget"),
    [(None, True, 0.6), (None, False, 0.6), (None, True, 0.99), (6, True, 0.25), (4, True, 0.2)],
)
def test_shares_and_states_are_those_of_the_run_time(bits, verify, budget):
    model = make_tiny_model()
    cut = cut_for(model, budget, verify)
    if bits is not None:
        pack_model(model, bits)
        cut = recut(model, cut, budget=budget, verify=verify)
    runs = list(sparse_runs(model, cut, windows()))
    sparsify(model, cut, backend="reference", prefill="sparse")
    with torch.inference_mode():
        expected = [model.model(row[None]).last_hidden_state[0] for row in windows()]
    whole = cost_report(model).bits_per_weight / 16
    unsparsify(model)
    assert sum(share for share, _ in runs) / 3 == pytest.approx(whole, rel=2e-3)
    for (_, states), one in zip(runs, expected, strict=True):
        # A neuron at its threshold may fall to the other side by a rounding.
        assert (states - one).norm() < 0.05 * one.norm()


def test_shares_of_experts():
    model = tiny_model_of_type("mixtral").eval()
    clusters = random_cluster_set(model, 0.5, num_clusters=4)
    runs = list(sparse_runs(model, clusters, windows()))
    sparsify(model, clusters, backend="reference", prefill="sparse")
    with torch.inference_mode():
        for row in windows():
            model.model(row[None])
    assert sum(share for share, _ in runs) / 3 == pytest.approx(
        cost_report(model).bits_per_weight / 16, rel=2e-3
    )


def test_what_is_missing_is_dense_less_sparse():
    model = make_tiny_model()
    cut = cut_for(model, 0.5, True)
    layer = find_ffn_layers(model)[1]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    with students(model, cut.layers, 0, 0) as modules, torch.no_grad():
        _, output, missing = modules[1].compared(x)
        sparse = modules[1](x)
        assert modules[1].read[3] == 50
    with torch.no_grad():
        dense = layer.mlp(x)
    torch.testing.assert_close(output, sparse, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output + missing, dense, atol=1e-5, rtol=1e-4)
    assert missing.norm() > 0.1 * dense.norm()


def test_look_records_that_are_kept_are_rounded_once(tmp_path, monkeypatch):
    model = make_tiny_model()
    cut = cut_for(model, 0.6, verify=True)
    expected = list(sparse_runs(model, cut, windows()))
    rounded, calls = masks.look_records, []
    monkeypatch.setattr(masks, "look_records", lambda *own: calls.append(1) or rounded(*own))
    with kept_looks(tmp_path / "looks"):
        first, second = (list(sparse_runs(model, cut, windows())) for _ in range(2))
    assert len(calls) == 3  # layers
    for found in (first, second):
        for (share, states), (other, others) in zip(found, expected, strict=True):
            assert share == other
            assert torch.equal(states, others)
    list(sparse_runs(model, cut, windows()))
    assert len(calls) == 6
