"""Mixtures of experts: found, proven, and run sparsely without touching their router's choices."""

import copy

import pytest
import torch
from helpers import IDS, assert_same_state, logits, random_cluster_set
from model_types import tiny_model_of_type

from sparse_runtime import cost_report, dense, sparsify, unsparsify
from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.models.ffn_layers import find_ffn_layers

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3"]


def experts_of(model):
    return [layer for layer in find_ffn_layers(model) if layer.experts]


def choices(model):
    """Index and weights of all experts' calls."""
    taken = []

    def take(module, arguments):
        taken.append(tuple(value.clone() for value in arguments[1:]))

    handles = [layer.mlp.register_forward_pre_hook(take) for layer in experts_of(model)]
    logits(model)
    for handle in handles:
        handle.remove()
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_all_neurons_are_the_dense_model(kind):
    model = tiny_model_of_type(kind)
    before, original = logits(model), copy.deepcopy(model)
    assert experts_of(model)
    sparsify(model, random_cluster_set(model, 1.0), prefill="sparse")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    with dense(model):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    unsparsify(model)
    assert torch.equal(logits(model), before)
    assert_same_state(model, original)


@pytest.mark.parametrize("kind", KINDS)
def test_sets_differ_and_count(kind):
    model = tiny_model_of_type(kind)
    before = logits(model)
    sparsify(model, random_cluster_set(model, 0.5), prefill="sparse")
    assert (logits(model) - before).abs().max() > 1e-3
    assert 0.3 < cost_report(model).cost_share < 0.9
    tokens = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == IDS.shape[1] + 4
