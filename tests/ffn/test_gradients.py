"""Derivatives through a sparse model are the dense model's, whoever asks for them and how."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import IDS, needs_library, random_cluster_set
from torch.autograd import forward_ad

from sparse_runtime import cost_report, reset_cost, sparsify, unsparsify

pytestmark = needs_library


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 20])
def test_gradients_are_those_of_the_dense_model(tiny_model, backend, tokens):
    ids = torch.randint(0, 256, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    tiny_model(input_ids=ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in tiny_model.parameters()]
    tiny_model.zero_grad()
    clusters = random_cluster_set(tiny_model, 0.3)
    sparsify(tiny_model, clusters, backend=backend, fast_linear=True)
    with pytest.warns(UserWarning, match=r"no_grad") if tokens == 1 else warnings.catch_warnings():
        tiny_model(input_ids=ids, labels=ids).loss.backward()
    for gradient, parameter in zip(expected, tiny_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_gradients_to_inputs_alone(sparse_model):
    sparse_model.requires_grad_(False)
    embeds = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sparse_model(inputs_embeds=embeds).logits.sum().backward()
    found = embeds.grad.clone()
    embeds.grad = None
    unsparsify(sparse_model)(inputs_embeds=embeds).logits.sum().backward()
    torch.testing.assert_close(found, embeds.grad)


def test_nothing_that_needs_gradients_runs_sparse_under_grad_mode(sparse_model):
    sparse_model.requires_grad_(False)
    reset_cost(sparse_model)
    sparse_model(input_ids=IDS)
    assert cost_report(sparse_model).dense_tokens == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_forward_mode_derivatives_are_those_of_the_dense_model(tiny_model, mode):
    tiny_model.requires_grad_(False)
    mlp = tiny_model.model.layers[1].mlp
    x, tangent = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.func.jvp(mlp, (x,), (tangent,))[1]
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse", fast_linear=True)
    with mode():
        torch.testing.assert_close(torch.func.jvp(mlp, (x,), (tangent,))[1], expected)
        with forward_ad.dual_level():
            dual = tiny_model.lm_head(forward_ad.make_dual(x, tangent))
            found = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, tiny_model.lm_head(tangent))


def test_transforms_of_torch_func(tiny_model):
    mlp = tiny_model.model.layers[1].mlp
    x = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0))
    transforms = [
        lambda: torch.func.vmap(mlp)(x),
        lambda: torch.func.grad(lambda value: mlp(value).sum())(x),
    ]
    expected = [call() for call in transforms]
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse")
    for call, value in zip(transforms, expected, strict=True):
        torch.testing.assert_close(call(), value)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_those_of_the_dense_model(tiny_model, reentrant):
    tiny_model.train()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tiny_model.enable_input_require_grads()
    weight = tiny_model.model.layers[1].mlp.up_proj.weight

    def gradient():
        weight.grad = None
        tiny_model(input_ids=IDS[:, :2], labels=IDS[:, :2]).loss.backward()
        return weight.grad

    expected = gradient()
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    with pytest.warns(UserWarning, match="checkpointing"):
        torch.testing.assert_close(gradient(), expected)
