"""fast_linear: the same numbers by other kernels, and back."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from helpers import logits, needs_library, random_cluster_set
from torch import nn

from sparse_runtime import dense, fast_linear, slow_linear, sparse_modules, sparsify, unsparsify
from sparse_runtime.errors import NothingMatchedError
from sparse_runtime.kernels import backends
from sparse_runtime.kernels.linear import MAX_TOKENS, FastLinear

pytestmark = needs_library


def fast_names(model):
    return {name for name, module in model.named_modules() if type(module) is FastLinear}


def test_dense_model_all_linears(tiny_model, monkeypatch):
    expected = logits(tiny_model)
    keys = list(tiny_model.state_dict())
    assert fast_linear(tiny_model) is tiny_model
    assert len(fast_names(tiny_model)) == 3 * 7 + 1
    torch.testing.assert_close(logits(tiny_model), expected, atol=1e-5, rtol=0)
    assert list(tiny_model.state_dict()) == keys
    # It is really the kernels that ran.
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    torch.testing.assert_close(logits(tiny_model), expected, atol=1e-5, rtol=0)
    monkeypatch.undo()
    slow_linear(tiny_model)
    assert not fast_names(tiny_model)
    assert torch.equal(logits(tiny_model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 48), (2, 3, 48), (MAX_TOKENS + 1, 48)])
def test_shapes_and_bias(dtype, shape):
    torch.manual_seed(0)
    layer = nn.Linear(48, 20).to(dtype)
    x = torch.randn(shape).to(dtype)
    expected = layer(x)
    layer.__class__ = FastLinear
    with torch.inference_mode():
        found = layer(x)
    assert found.shape == expected.shape
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_option_of_sparsify_leaves_the_ffns(tiny_model):
    expected = logits(tiny_model)
    sparsify(tiny_model, random_cluster_set(tiny_model, 1.0), fast_linear=True)
    assert len(fast_names(tiny_model)) == 3 * 4 + 1
    assert not any("mlp" in name for name in fast_names(tiny_model))
    torch.testing.assert_close(logits(tiny_model), expected, atol=1e-5, rtol=0)
    unsparsify(tiny_model)
    assert not fast_names(tiny_model)
    assert torch.equal(logits(tiny_model), expected)


def test_fast_before_sparse(tiny_model):
    expected = logits(tiny_model)
    fast_linear(tiny_model)
    sparsify(tiny_model, random_cluster_set(tiny_model, 1.0))
    assert len(sparse_modules(tiny_model)) == 3
    torch.testing.assert_close(logits(tiny_model), expected, atol=1e-5, rtol=0)
    with dense(tiny_model):
        torch.testing.assert_close(logits(tiny_model), expected, atol=1e-5, rtol=0)


def test_survives_deepcopy(tiny_model):
    expected = logits(tiny_model)
    twin = copy.deepcopy(fast_linear(tiny_model))
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
    torch.testing.assert_close(logits(twin), expected, atol=1e-5, rtol=0)


def test_without_the_library(tiny_model, monkeypatch):
    monkeypatch.setattr(backends, "load_cpu_library", lambda: False)
    with pytest.warns(UserWarning, match="pip install"):
        fast_linear(tiny_model)
    assert not fast_names(tiny_model)


def test_weights_that_the_kernels_do_not_take(tiny_model):
    with pytest.warns(UserWarning, match=r"float64.*bfloat16, float16, float32"):
        fast_linear(tiny_model.double())
    assert not fast_names(tiny_model)


@pytest.mark.parametrize("fast_first", [False, True])
def test_under_hooks_that_move_inputs(tiny_model, monkeypatch, fast_first):
    names = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]

    def dispatch(model):
        dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)

    for step in (fast_linear, dispatch) if fast_first else (dispatch, fast_linear):
        step(tiny_model)
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    logits(tiny_model)
    slow_linear(tiny_model)
    with pytest.raises(TypeError):
        logits(tiny_model)


def test_nothing_to_do():
    with pytest.raises(NothingMatchedError, match=r"no plain nn\.Linear"):
        fast_linear(nn.LayerNorm(4))
