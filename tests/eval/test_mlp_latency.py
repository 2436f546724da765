"""The check that the FFN benchmark makes before it times anything."""

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime import sparse_modules, sparsify
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.mlp_latency import _verify
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
