"""Bands and their price: the estimates against sampling, budgets, overrides, what a user sees."""

import math

import numpy as np
import pytest
import torch
from helpers import cuttable_cluster_set, random_centroids

from sparse_runtime import (
    ClusterSet,
    SparseConfig,
    cost_report,
    recut,
    sparse_modules,
    sparsify,
    unsparsify,
)
from sparse_runtime.artifact.bands import LayerCentroids, StageCosts, cut_bands
from sparse_runtime.artifact.measured import MeasuredCut, MeasuredCuts
from sparse_runtime.errors import ConfigError
from sparse_runtime.ffn.counts import read_counts
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.kernels.bitmaps import unpack_bits
from sparse_runtime.models.ffn_layer import layer_cost
from sparse_runtime.models.ffn_layers import find_ffn_layers

LOOK = 0.18


@pytest.fixture
def clusters(tiny_model):
    return cuttable_cluster_set(tiny_model)


def expected_share(model, clusters):
    """Cost share that the bands promise, a layer at a time."""
    shares = []
    for module in sparse_modules(model):
        layer = clusters.layers[module.layer_index]
        sure = unpack_bits(layer.active_sets, 44).float().mean(-1) @ layer.centroids.shares
        shares.append(module.cost.share(float(sure) * 44))
    return sum(shares) / len(shares)


def one_neuron(sigma, price, look_share=LOOK, costs=None):
    """Bands of one neuron with ln|e| ~ N(-1, σ²), and a sample of its e²."""
    e = (torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * sigma - 1).exp()
    ones = torch.ones(1, 1)
    centroids = LayerCentroids(
        ones * e.square().mean(), ones * e.mean(), ones * 0.5, torch.ones(1), torch.ones(1)
    )
    return cut_bands(centroids, price, costs or StageCosts(look_share)), e.square()


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.2])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_expectations_match_a_sample(sigma, quantile):
    price = one_neuron(sigma, 1.0)[1].quantile(quantile).item()
    bands, squares = one_neuron(sigma, price, look_share=0.0)  # a free look: always maybe
    assert bands.maybe.item()
    assert not bands.sure.item()
    assert bands.looked == 1
    assert bands.computed == pytest.approx(1 - quantile, abs=0.01)
    left_out = squares * (squares <= price)
    assert bands.loss == pytest.approx(left_out.mean().item(), rel=0.03)
    part = (left_out.sqrt().mean() / squares.sqrt().mean()).item()
    assert bands.left_out.item() == pytest.approx(0.5 * part, rel=0.03)


def test_a_look_pays_where_a_neuron_varies():
    steady, squares = one_neuron(0.05, 0.1)
    assert squares.min() > 0.08
    assert steady.sure.item() != steady.maybe.item()
    varied, squares = one_neuron(1.5, 0.1)
    assert varied.maybe.item()
    # Priced by hand: never E[e²], sure λ, maybe q·λ + E[min(e², λ)].
    assert LOOK * 0.1 + squares.clamp_max(0.1).mean() < min(squares.mean(), 0.1)


@pytest.mark.parametrize("sigma", [0.3, 1.2])
@pytest.mark.parametrize("error", [0.002, 0.02, 0.5])
def test_stages_of_planes_against_a_sample(sigma, error):
    """Looked at, counted, refined, and the loss of each, as the prices say."""
    costs = StageCosts(look=1e-6, count=0.1, refine=0.12, base_error=error, looks_first=True)
    squares = one_neuron(sigma, 1.0)[1]
    price = squares.quantile(0.4).item() / costs.count
    bands = one_neuron(sigma, price, costs=costs)[0]
    assert bands.maybe.item()
    assert not bands.sure.item()
    finer = price * 0.1 * max(1.0, 0.12 / (0.1 * error))  # where ρ²·e² is what refining costs
    counted, refined = squares > price * costs.count, squares > finer
    loss = torch.where(counted, error * squares, squares).masked_fill(refined, 0)
    assert bands.computed == pytest.approx(0.6, abs=0.01)
    assert bands.refined == pytest.approx(refined.float().mean().item(), abs=0.01)
    assert bands.loss == pytest.approx(loss.mean().item(), rel=0.05)


def test_planes_are_looked_at_where_that_saves_more_than_it_costs():
    costs = StageCosts(look=0.2, count=0.1, refine=0.1, base_error=0.01, looks_first=True)
    squares = one_neuron(0.8, 1.0)[1]
    for factor, expected in ((0.2, True), (5.0, False)):
        price = squares.mean().item() * factor
        bands = one_neuron(0.8, price, costs=costs)[0]
        assert bands.maybe.item() is expected
        assert bands.looked == float(expected)
        if not expected:
            assert bands.loss == pytest.approx(squares.mean().item(), rel=0.01)


def test_without_verification_the_mean_decides():
    centroids = random_centroids(6, 44, seed=0)
    bands = cut_bands(centroids, 0.01, StageCosts())
    assert bands.maybe is None
    assert torch.equal(bands.sure, centroids.mean_squares > 0.01)
    assert bands.looked == 0
    assert (
        not cut_bands(centroids, 1e9, StageCosts()).sure.sum(-1).ne(1).any()
    )  # the best one stays


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("budget", [0.35, 0.6, 0.9])
def test_budget_is_met(tiny_model, clusters, budget, verify):
    cut = recut(tiny_model, clusters, budget=budget, verify=verify)
    assert cut.budget == budget
    assert cut.verified == verify
    assert all(layer.router_up is clusters.layers[i].router_up for i, layer in cut.layers.items())
    if verify:
        for layer in cut.layers.values():  # a layer may have become dense
            assert layer.maybe_sets is None or not (layer.active_sets & layer.maybe_sets).any()
        return
    sparsify(tiny_model.bfloat16(), cut, backend="reference")
    share = expected_share(tiny_model, cut)
    assert share == pytest.approx(budget, abs=0.03)
    # Layers matter a hundred times apart.
    densities = [unpack_bits(c.active_sets, 44).float().mean() for c in cut.layers.values()]
    assert densities[0] < densities[1] < densities[2] or densities[2] == 1


def test_measured_share_follows_the_bands(tiny_model, clusters):
    """With centroids of the model's own activations, what is counted is what was asked for."""
    from sparse_runtime.clusters.importance import importance_scorer
    from sparse_runtime.models.ffn_layers import find_ffn_layers

    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    for layer in find_ffn_layers(tiny_model):
        h = importance_scorer(layer).activations(x)
        e = h.abs() / h.square().sum(-1).mean().sqrt()
        repeat = torch.ones(6, 1)
        clusters.layers[layer.index].centroids = LayerCentroids(
            repeat * e.square().mean(0),
            repeat * e.mean(0),
            repeat * h.mean(0),
            torch.full((6,), 1 / 6),
            torch.full((44,), 1 / h.square().sum(-1).mean().sqrt().item()),
        )
    sparsify(tiny_model, clusters, budget=0.6, verify=True, prefill="sparse")
    with torch.inference_mode():
        for module in sparse_modules(tiny_model):
            module(x.unsqueeze(0))
    report = cost_report(tiny_model)
    # float32 doubles the neurons' bytes against those of the look records.
    assert 0.4 < report.cost_share < 0.75


def test_layer_budgets(tiny_model, clusters):
    cut = recut(tiny_model, clusters, budget=0.6, verify=False, layer_budgets={0: 1.0, 2: 0.3})
    sparsify(tiny_model.bfloat16(), cut, backend="reference")
    modules = {module.layer_index: module for module in sparse_modules(tiny_model)}
    assert modules[0].active_sets.shape == (1, 6)  # dense: one cluster of all neurons
    assert unpack_bits(modules[0].active_sets, 44).all()
    assert modules[0].cluster_bias is None
    per_layer = {
        i: unpack_bits(c.active_sets, 44).float().mean().item() for i, c in cut.layers.items()
    }
    assert per_layer[2] < 0.3
    assert 0.35 < per_layer[1] < 0.5


def test_dense_layers_count_as_dense_and_compute_everything(tiny_model, clusters):
    x = torch.randint(0, 250, (1, 30))
    with torch.inference_mode():
        expected = tiny_model(x).logits
        sparsify(tiny_model, clusters, budget=1.0, verify=False, prefill="sparse")
        torch.testing.assert_close(tiny_model(x).logits, expected, atol=1e-4, rtol=1e-4)
    assert cost_report(tiny_model).cost_share == pytest.approx(1.0, abs=0.03)


def test_sparsify_cuts_from_a_folder(tiny_model, clusters, tmp_path):
    clusters.save_pretrained(tmp_path)
    sparsify(tiny_model, str(tmp_path), budget=0.4, verify=True)
    module = sparse_modules(tiny_model)[1]
    assert module.maybe_sets is not None
    assert module.look.shape == (44, 68)
    unsparsify(tiny_model)
    loaded = ClusterSet.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"without centroids.*centroids=True"):
        sparsify(tiny_model, loaded, budget=0.4)
    sparsify(tiny_model, loaded)  # as it is


def test_verified_artifact_round_trip(tiny_model, clusters, tmp_path):
    cut = recut(tiny_model, clusters, budget=0.5, verify=True)
    cut.save_pretrained(tmp_path)
    loaded = ClusterSet.from_pretrained(tmp_path, centroids=True)
    assert loaded.verified
    for index, layer in cut.layers.items():
        assert torch.equal(loaded.layers[index].maybe_sets, layer.maybe_sets)
        torch.testing.assert_close(loaded.layers[index].factors, layer.factors)
    again = recut(tiny_model, loaded, verify=False)
    assert (again.budget, again.verified) == (0.5, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget is 0.0; expected a cost share"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": 0.001}, "alone read"),
        ({"budget": 0.5, "layer_budgets": {7: 0.5}}, "names layer 7"),
        ({"budget": 0.5, "layer_budgets": {1: 2}}, r"layer_budgets\[1\] is 2"),
        ({"budget": 0.3, "layer_budgets": {0: 1.0}}, "alone read"),
    ],
)
def test_bad_budgets(tiny_model, clusters, options, message):
    with pytest.raises(ConfigError, match=message):
        sparsify(tiny_model, clusters, config=SparseConfig(**options))
    assert not any(type(m).__name__ == "SparseFFN" for m in tiny_model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "no"}, "verify is 'no'; expected True, False or None"),
        ({"verify": 1}, "verify is 1"),
        ({"budget": True}, "budget is True"),
        ({"budget": "0.5"}, "budget is '0.5'"),
        ({"budget": math.nan}, "budget is nan"),
        ({"layer_budgets": [0.5, 0.5, 0.5]}, r"layer_budgets is \[.*; expected a mapping"),
        ({"layer_budgets": 0.5}, "layer_budgets is 0.5"),
        ({"layer_budgets": {"0": 0.5}}, "a layer of layer_budgets is '0'; expected a whole number"),
        ({"layer_budgets": {0: "x"}}, r"layer_budgets\[0\] is 'x'"),
        ({"layer_budgets": {0: False}}, r"layer_budgets\[0\] is False"),
    ],
    ids=str,
)
def test_kinds_are_those_of_the_run_time_options(tiny_model, clusters, options, message):
    with pytest.raises(ConfigError, match=message):
        recut(tiny_model, clusters, **options)
    with pytest.raises(ConfigError, match=message):
        SparseConfig(**options)


def test_numbers_of_numpy_are_numbers(tiny_model, clusters):
    cut = recut(
        tiny_model, clusters, budget=np.float32(0.5), layer_budgets={np.int64(0): np.float64(0.4)}
    )
    assert isinstance(cut.budget, float)
    assert cut.budget == 0.5


def test_a_budget_that_no_layer_shares(tiny_model, clusters):
    own = {0: 0.5, 1: 0.6, 2: 1}
    with pytest.raises(ConfigError, match=r"budget is 0\.3, but layer_budgets names every layer"):
        recut(tiny_model, clusters, budget=0.3, layer_budgets=own)
    assert recut(tiny_model, clusters, layer_budgets=own).budget == pytest.approx(0.7)


def test_factors_are_weights_over_the_price(tiny_model, clusters):
    cut = recut(tiny_model, clusters, budget=0.5, verify=True)
    prices = []
    for layer in cut.layers.values():
        ratio = layer.centroids.neuron_weights / layer.factors
        torch.testing.assert_close(ratio, ratio[:1].expand(44), rtol=1e-4, atol=0)
        prices.append(ratio[0].item())
    assert math.isclose(min(prices), max(prices), rel_tol=1e-4)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_packed_models_are_cut_by_what_planes_cost(tiny_model, clusters, bits, tmp_path):
    """The budget counts against bfloat16 weights; every candidate is looked at, and τ is kept."""
    for layer in clusters.layers.values():
        layer.weights, layer.base_error = bits, 0.02
    pack_model(tiny_model, bits)
    cost = layer_cost(find_ffn_layers(tiny_model, packed=True)[0], 0, verified=True)
    whole = cost.whole_bytes / cost.dense_bytes
    cut = recut(tiny_model, clusters, budget=0.8 * whole, verify=True)
    assert any(layer.maybe_sets is not None for layer in cut.layers.values())
    for layer in cut.layers.values():
        if layer.maybe_sets is None:  # all neurons
            assert unpack_bits(layer.active_sets, 44).all()
            continue
        assert not layer.active_sets.any()
        assert layer.tau == StageCosts.of(cost, 0.02).tau
    cut.save_pretrained(tmp_path)
    loaded = ClusterSet.from_pretrained(tmp_path, centroids=True)
    for index, layer in cut.layers.items():
        found = loaded.layers[index]
        assert (found.tau, found.weights, found.base_error) == (layer.tau, bits, 0.02)
    sparsify(tiny_model, loaded, prefill="sparse", check_fingerprint=False)
    for module in sparse_modules(tiny_model):
        if module.stages is not None:
            assert module.stages.tau == loaded.layers[module.layer_index].tau
    unsparsify(tiny_model)
    sparsify(tiny_model, loaded, tau=3.0, check_fingerprint=False)
    taus = {module.stages.tau for module in sparse_modules(tiny_model) if module.stages is not None}
    assert taus == {3.0}
    unsparsify(tiny_model)
    sparsify(tiny_model, loaded, budget=0.6 * whole, verify=False, prefill="sparse")
    assert all(module.stages is None for module in sparse_modules(tiny_model))
    with torch.inference_mode():
        tiny_model(torch.randint(0, 250, (1, 30), generator=torch.Generator().manual_seed(0)))
    for module in sparse_modules(tiny_model):  # what is read is read whole
        counts = read_counts(module)
        assert 0 < counts.looked_at == counts.computed == counts.refined


def test_measured_cuts_tell_where_to_aim(tiny_model, clusters, tmp_path):
    """A cut aims below the budget by what text was found to read beyond it, and 1 stays 1."""
    lower = recut(tiny_model, clusters, budget=0.45, verify=False)
    clusters.measured = MeasuredCuts(("text",), (64,), (MeasuredCut(0.45, (0.5,)),))
    clusters.save_pretrained(tmp_path)
    loaded = ClusterSet.from_pretrained(tmp_path, centroids=True)
    assert loaded.measured == clusters.measured
    cut = recut(tiny_model, loaded, budget=0.5, verify=False)
    assert cut.budget == 0.5
    for index, layer in cut.layers.items():
        same = (layer.active_sets == lower.layers[index].active_sets).float().mean()
        assert same > 0.97  # centroids were rounded on disk
    everything = recut(tiny_model, clusters, budget=1.0, verify=False)
    assert all(unpack_bits(layer.active_sets, 44).all() for layer in everything.layers.values())
