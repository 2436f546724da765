"""The FFN benchmark: what it checks before it times anything, and the tokens it takes."""

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime import sparse_modules, sparsify
from sparse_runtime.bitmaps import pack_bits
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency import ffn_inputs
from sparse_runtime.eval.mlp_latency import _verify, bench_mlp
from sparse_runtime.kernels import load_cpu_library


@pytest.mark.skipif(not load_cpu_library(), reason="needs the C++ library")
def test_outputs_are_checked_for_the_clusters_that_were_picked(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.5), backend="cpu")
    modules = sparse_modules(tiny_model)
    for module in modules:
        # Where two clusters' logits are as good as equal, this may name the other one.
        module.route = lambda x, own=module.route: (own(x) + 1) % 6
    _verify(modules)
    modules[1].cluster_bias = torch.ones(6, 32)
    modules[1].compensated = lambda output, x, ids: output
    with pytest.raises(SparseRuntimeError, match="layer 1: the sparse FFN is"):
        _verify(modules)


@pytest.mark.skipif(not load_cpu_library(), reason="needs the C++ library")
def test_tokens_are_drawn_from_the_models_states(tiny_model):
    states = ffn_inputs(tiny_model, torch.arange(9).unsqueeze(0))
    assert sorted(states) == [0, 1, 2]
    assert {tuple(rows.shape) for rows in states.values()} == {(9, 32)}
    clusters = random_cluster_set(tiny_model, 0.5)
    for layer in clusters.layers.values():  # of different sizes
        layer.active_sets = pack_bits(torch.arange(44) < 6 * torch.arange(1, 7).unsqueeze(1))
    sparsify(tiny_model, clusters, backend="cpu")
    module = sparse_modules(tiny_model)[0]
    one = states[0][:1]
    figures = bench_mlp([module], {0: one}, repeats=3, token_counts=[1, 2])
    assert figures["density"] == pytest.approx(6 * (module.route(one).item() + 1) / 44)
    assert figures["looked_at"] == 0
    assert [row["tokens"] for row in figures["tokens"]] == [1, 2]
