"""The FFN benchmark: what it checks before it times anything, and the tokens it takes."""

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime import sparse_modules, sparsify
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.ffn_checks import ffn_inputs, verify_outputs
from sparse_runtime.eval.latency.mlp import bench_mlp
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels import load_cpu_library
from sparse_runtime.kernels.bitmaps import pack_bits


@pytest.mark.skipif(not load_cpu_library(), reason="needs the C++ library")
def test_outputs_are_checked_against_the_reference(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.5)
    for layer in clusters.layers.values():
        layer.cluster_bias = torch.ones(6, 32)
    sparsify(tiny_model, clusters, backend="cpu", prefill="sparse")
    modules = sparse_modules(tiny_model)
    verify_outputs(modules)
    verify_outputs(modules, SparseFFN.sparse)

    def uncompensated(module, x):
        output = module.sparse(x)
        return output - 1 if module.layer_index == 1 else output

    def one_neuron_less(module, x):
        output = module.sparse(x)
        return output - 0.1 * output.roll(1, dims=-1) if len(x) > 1 else output

    for run, message in (
        (uncompensated, "layer 1, 1 tokens: the sparse FFN is"),
        (one_neuron_less, "layer 0, 5 tokens: the sparse FFN is"),
        (lambda module, x: 0 * module.sparse(x), "layer 0, 1 tokens: the sparse FFN is 1.000"),
        (lambda module, x: module.dense(x), "layer 0, 1 tokens: none ran sparse"),
    ):
        with pytest.raises(SparseRuntimeError, match=message):
            verify_outputs(modules, run)


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
    assert figures["density"] == pytest.approx(6 * (module.cluster_ids(one).item() + 1) / 44)
    assert figures["looked_at"] == 0
    assert [row["tokens"] for row in figures["tokens"]] == [1, 2]
