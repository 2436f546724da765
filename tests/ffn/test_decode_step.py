"""What a decode step costs beside its bytes: operations dispatched, and the first call of a size."""

import time

import pytest
import torch
from helpers import cuttable_cluster_set, needs_library, random_cluster_set
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_runtime import recut, sparsify
from sparse_runtime.eval.latency.shapes import random_clusters, random_model

pytestmark = needs_library


class Counted(TorchDispatchMode):
    """Names of the operations that reach the dispatcher, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "view" not in name and "reshape" not in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_an_ffn_is_one_operation(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    x = torch.randn(1, 1, 32)
    with torch.inference_mode():
        tiny_model.model.layers[0].mlp(x)
        with Counted() as counted:
            tiny_model.model.layers[0].mlp(x)
    assert counted.names == ["sparse_runtime.cpu_routed_ffn.default"]


@pytest.mark.parametrize("looks", [0.0, 0.5])
def test_the_first_call_of_a_size_takes_no_longer(looks):
    """Half a second at most on top of a warm one; nothing is measured and nothing cached."""
    model = random_model("smollm2-135m", layers=2)
    clusters = random_clusters(model, density=0.5, looked=looks, num_clusters=64, rank=16)
    sparsify(model, clusters)
    for tokens in (1, 2, 3, 9, 17, 64, 300):
        ids = torch.ones(1, tokens, dtype=torch.int64)
        seconds = []
        with torch.inference_mode():
            for _ in range(3):
                started = time.perf_counter()
                model(input_ids=ids)
                seconds.append(time.perf_counter() - started)
        assert seconds[0] <= min(seconds[1:]) + 0.5, tokens


def test_a_sparse_model_can_be_cut_as_the_dense_one(tiny_model):
    clusters = cuttable_cluster_set(tiny_model)
    expected = recut(tiny_model, clusters, budget=0.6)
    sparsify(tiny_model, clusters)
    found = recut(tiny_model, clusters, budget=0.6)
    for index, layer in expected.layers.items():
        assert torch.equal(found.layers[index].active_sets, layer.active_sets)
