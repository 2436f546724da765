"""The four runs of evaluate_quality, and that the model is dense and unchanged afterwards."""

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime import sparsify, unsparsify
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.config import SparseConfig
from sparse_runtime.eval.quality.artifact_quality import evaluate_quality
from sparse_runtime.eval.quality.perplexity import perplexity
from sparse_runtime.kernels import router_logits
from sparse_runtime.kernels.bitmaps import pack_bits, unpack_bits
from sparse_runtime.models.ffn_layers import find_ffn_layers

IDS = torch.randint(0, 250, (96,), generator=torch.Generator().manual_seed(0))


def test_figures_agree_with_runs_by_hand(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.4)
    before = perplexity(tiny_model, IDS, window=32)
    result = evaluate_quality(tiny_model, clusters, IDS, window=32)
    assert perplexity(tiny_model, IDS, window=32) == before
    figures = result["perplexity"]
    assert figures["dense"] == pytest.approx(before, rel=1e-5)

    sparsify(tiny_model, clusters, config=SparseConfig(prefill="sparse"))
    assert figures["sparse"] == pytest.approx(perplexity(tiny_model, IDS, window=32), rel=1e-6)
    unsparsify(tiny_model)

    for layer in clusters.layers.values():
        layer.active_sets = layer.static_set.expand_as(layer.active_sets).clone()
    sparsify(tiny_model, clusters, config=SparseConfig(prefill="sparse"))
    assert figures["static"] == pytest.approx(perplexity(tiny_model, IDS, window=32), rel=1e-6)
    assert len({round(value, 6) for value in figures.values()}) == 4


def test_distances_agree_with_logits_by_hand(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.4)
    result = evaluate_quality(tiny_model, clusters, IDS, window=32)

    def log_probabilities():
        with torch.inference_mode():
            return tiny_model(IDS.view(3, 32)).logits[:, :-1].flatten(0, 1).log_softmax(-1)

    dense = log_probabilities()
    sparsify(tiny_model, clusters, config=SparseConfig(prefill="sparse", backend="reference"))
    sparse = log_probabilities()
    expected = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    agreed = (dense.argmax(-1) == sparse.argmax(-1)).float().mean().item()
    assert result["kl"] == pytest.approx(expected, rel=1e-4)
    assert result["top1"] == pytest.approx(agreed, abs=1e-6)
    assert result["bits_per_weight"] == pytest.approx(16 * result["cost_share"])
    distances = ["kl", "kl_interval", "top1", "ratio", "interval"]
    assert list(result)[:5] == distances
    for name in ("oracle_ids", "static"):
        assert list(result[name]) == distances
        assert result[name]["kl"] > 0.01
    for row in (result, result["oracle_ids"], result["static"]):
        for value, interval in (("kl", "kl_interval"), ("ratio", "interval")):
            low, high = row[interval]
            assert low < row[value] < high


def test_oracle_ids_recover_a_perfect_cluster(tiny_model):
    """With half of the neurons dead, the oracle always picks the one cluster of the others."""
    layers = find_ffn_layers(tiny_model)
    for layer in layers:
        layer.mlp.down_proj.weight.data[:, 22:] = 0
    clusters = random_cluster_set(tiny_model, 0.4)
    for layer in layers:
        mask = torch.zeros(6, 44, dtype=torch.bool)
        mask[:, 22:] = True
        mask[3] = ~mask[3]
        clusters.layers[layer.index].active_sets = pack_bits(mask)
    figures = evaluate_quality(tiny_model, clusters, IDS, window=32)["perplexity"]
    assert figures["oracle_ids"] == pytest.approx(figures["dense"], rel=1e-5)
    assert figures["sparse"] != pytest.approx(figures["dense"], rel=1e-3)


def test_layer_scores_are_those_of_the_states_seen(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.4)
    result = evaluate_quality(tiny_model, clusters, IDS[:32], window=32)
    layer = find_ffn_layers(tiny_model)[0]
    states = []
    handle = layer.mlp.register_forward_pre_hook(lambda m, a: states.append(a[0].flatten(0, 1)))
    with torch.inference_mode():
        tiny_model(IDS[:32].unsqueeze(0))
    handle.remove()
    importance = importance_scorer(layer)(states[0])
    share = importance / importance.sum(-1, keepdim=True)
    sets = unpack_bits(clusters.layers[0].active_sets, 44).float()
    best = (share @ sets.t()).max(-1).values.mean().item()
    assert result["layers"][0]["oracle_coverage"] == pytest.approx(best, rel=1e-5)
    of_layer = clusters.layers[0]
    logits = router_logits(
        states[0], of_layer.router_down, of_layer.router_up, of_layer.router_bias
    )
    sure = logits.softmax(-1).max(-1).values
    expected = [((sure >= b / 10) & (sure < (b + 1) / 10)).float().mean().item() for b in range(10)]
    assert result["layers"][0]["confidence"] == pytest.approx(expected, abs=0.04)
    assert max(expected) < 1
