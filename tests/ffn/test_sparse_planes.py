"""``sparsify`` over weights in planes."""

import copy
import math
import warnings

import pytest
import torch
from helpers import IDS, logits, make_tiny_model, needs_library, random_cluster_set

from sparse_runtime import cost_report, dense, reset_cost, sparsify, unsparsify
from sparse_runtime.api import sparse_modules
from sparse_runtime.errors import ConfigError
from sparse_runtime.ffn.plane_modules import PlaneFFN, PlaneLinear
from sparse_runtime.ffn.plane_packing import pack_model, unpack_model
from sparse_runtime.ffn.sparse_planes import SparsePlaneFFN

pytestmark = needs_library


@pytest.fixture
def clusters():
    return random_cluster_set(make_tiny_model(), 0.5)


def packed_values(bits, **options):
    """A float model of the packed values."""
    return unpack_model(pack_model(make_tiny_model(), bits, **options))


def test_full_sets_give_the_packed_model():
    sparse = sparsify(
        make_tiny_model(), random_cluster_set(make_tiny_model(), 1.0), weights=6, prefill="sparse"
    )
    torch.testing.assert_close(logits(sparse), logits(packed_values(6)), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sets_give_what_they_give_over_the_packed_values(clusters, backend):
    # Without factors candidates are refined whole: the same neurons, the same weights.
    sparse = sparsify(make_tiny_model(), clusters, weights=5, prefill="sparse", backend=backend)
    floats = sparsify(packed_values(5), clusters, prefill="sparse", check_fingerprint=False)
    torch.testing.assert_close(logits(sparse), logits(floats), rtol=1e-3, atol=2e-3)
    assert all(type(module) is SparsePlaneFFN for module in sparse_modules(sparse))


def test_dense_is_all_neurons_of_the_packed_weights(clusters):
    model = sparsify(make_tiny_model(), clusters, weights=4)
    with dense(model):
        found = logits(model)
    torch.testing.assert_close(found, logits(packed_values(4)), rtol=1e-3, atol=2e-3)


def test_decode_steps_run_sparse_and_are_counted(clusters):
    model = sparsify(make_tiny_model(), clusters, weights=6)
    model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    report = cost_report(model)
    assert report.sparse_tokens == 3 * 3  # steps after the prompt, layers
    assert report.dense_reasons == {"long call": 6 * 3}
    # 44 neurons of H = 32 in half of the sets: look 68, count 34, refine 48 bytes.
    module = sparse_modules(model)[0]
    counted, looked, refined = module.row_counts.tolist()
    assert counted == looked == refined > 0
    assert module.cost.sparse_bytes(counted, looked, refined) == pytest.approx(
        counted * (68 + 34 + 48) + module.cost.overhead_bytes
    )
    reset_cost(model)
    assert cost_report(model).sparse_tokens == 0


def test_stages_follow_the_config(clusters):
    for layer in clusters.layers.values():
        layer.maybe_sets = ~layer.active_sets
        layer.factors = torch.full((44,), 1e30)
    model = sparsify(make_tiny_model(), clusters, weights=6, tau=math.inf, prefill="sparse")
    logits(model)
    counted, looked, refined = sparse_modules(model)[0].row_counts.tolist()
    assert looked == counted == 6 * 44 or looked == counted == 6 * 48  # every neuron is a candidate
    assert refined == 0
    unsparsify(model)


def test_unsparsify_gives_floats_of_the_packed_values_and_says_so(clusters):
    model = sparsify(make_tiny_model(), clusters, weights=6, linear_weights=8)
    assert isinstance(model.model.layers[0].self_attn.q_proj, PlaneLinear)
    with pytest.warns(UserWarning, match="floats of the packed values"):
        unsparsify(model)
    expected = packed_values(6, linears=8)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_model_that_was_packed_before_stays_packed(clusters):
    model = pack_model(make_tiny_model(), 6)
    before = logits(model)
    sparsify(model, clusters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unsparsify(model)
    assert isinstance(model.model.layers[0].mlp, PlaneFFN)
    assert torch.equal(logits(model), before)


def test_packing_twice_is_refused(clusters):
    model = pack_model(make_tiny_model(), 6)
    with pytest.raises(Exception, match="packed already"):
        sparsify(model, clusters, weights=4)


def test_a_copy_is_sparse_on_its_own(clusters):
    model = sparsify(make_tiny_model(), clusters, weights=6, prefill="sparse")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert (
        sparse_modules(twin)[0].row_counts.tolist() == sparse_modules(model)[0].row_counts.tolist()
    )
    twin.model.layers[0].mlp.look.data.zero_()
    assert not torch.equal(logits(twin), logits(model))


def test_bytes_written_anew_are_read(clusters):
    model = sparsify(make_tiny_model(), clusters, weights=6, prefill="sparse")
    other = pack_model(make_tiny_model(initializer_range=0.1), 6)
    model.load_state_dict(other.state_dict())
    expected = sparsify(other, clusters, prefill="sparse", check_fingerprint=False)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": 2}, "weights is 2; expected one of 3, 4, 5, 6, 7, 8, or None"),
        ({"weights": True}, "weights is True"),
        ({"keep_float": True}, "keep_float is True without weights or linear_weights"),
        ({"keep_float": 1, "weights": 6}, "keep_float is 1; expected True or False"),
        ({"linear_weights": 16}, "linear_weights is 16"),
        ({"tau": 0.5}, "tau is 0.5; expected a number of 1 or more"),
        ({"tau": math.nan}, "tau is nan"),
        ({"ramp": -1}, "ramp is -1"),
        ({"ramp": math.inf}, "ramp is inf"),
    ],
)
def test_options_out_of_range_are_refused(clusters, options, words):
    model = make_tiny_model()
    with pytest.raises(ConfigError, match=words):
        sparsify(model, clusters, **options)
    assert isinstance(model.model.layers[0].mlp.gate_proj, torch.nn.Linear)
