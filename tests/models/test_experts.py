"""Mixtures of experts: found, proven, and run sparsely without touching their router's choices."""

import copy
import pickle

import pytest
import torch
from helpers import IDS, assert_same_state, logits, needs_library, random_cluster_set
from model_types import tiny_model_of_type

from sparse_runtime import cost_report, dense, sparsify, unsparsify
from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.ffn.counts import bytes_per_token
from sparse_runtime.models.ffn_layers import find_ffn_layers

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3"]


def experts_of(model):
    return [layer for layer in find_ffn_layers(model) if layer.experts]


def calls(model):
    """Hidden states, index and weights of all experts' calls."""
    taken = []

    def take(module, arguments):
        taken.append(tuple(value.clone() for value in arguments))

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


@pytest.mark.parametrize("kind", KINDS)
def test_the_router_is_not_touched(kind):
    """The same experts and weights for the same hidden state, bit for bit."""
    model = tiny_model_of_type(kind)
    sparsify(model, random_cluster_set(model, 0.5), prefill="sparse")
    sparse = calls(model)
    unsparsify(model)
    for (states, index, weights), layer in zip(sparse, experts_of(model), strict=True):
        taken = []
        handle = layer.mlp.register_forward_pre_hook(
            lambda _, found, taken=taken: taken.append(found)
        )
        with torch.no_grad():
            layer.parent(states.unsqueeze(0))
        handle.remove()
        assert torch.equal(taken[0][0], states)
        assert torch.equal(taken[0][1], index)
        assert torch.equal(taken[0][2], weights)


@needs_library
def test_decode_is_sparse_and_prompts_are_not():
    model = tiny_model_of_type("mixtral")
    before = logits(model)
    sparsify(model, random_cluster_set(model, 0.5))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert cost_report(model).sparse_tokens == 0
    model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert cost_report(model).sparse_tokens == 2 * 3


def test_what_is_changed_shows():
    """Weights written to are used; other parameters, and hooks inside, make the experts run dense."""
    model = tiny_model_of_type("mixtral")
    sparsify(model, random_cluster_set(model, 1.0), prefill="sparse")
    experts = experts_of(model)[0].mlp
    logits(model)
    with torch.no_grad():
        experts.down_proj.mul_(2)
    changed = logits(model)
    with dense(model):
        torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4)
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach() / 4)
    found = logits(model)
    experts.act_fn.register_forward_hook(lambda module, arguments, output: output + 1)
    with pytest.warns(UserWarning, match="runs as it stands .*act_fn"):
        hooked = logits(model)
    assert (found - changed).abs().max() > 1e-3
    with dense(model):
        torch.testing.assert_close(logits(model), hooked, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_stand_on_their_own():
    model = tiny_model_of_type("mixtral")
    sparsify(model, random_cluster_set(model, 0.5), prefill="sparse")
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        with torch.no_grad():
            experts_of(copied)[0].mlp.down_proj.zero_()
        assert torch.equal(logits(model), expected)


def test_saved_and_loaded_as_they_were(tmp_path):
    model = tiny_model_of_type("mixtral")
    original = copy.deepcopy(model)
    sparsify(model, random_cluster_set(model, 0.5))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_state(loaded, original)


def test_training_runs_dense():
    model = tiny_model_of_type("mixtral")
    sparsify(model, random_cluster_set(model, 0.5), prefill="sparse")
    with pytest.warns(UserWarning, match="gradients are recorded"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert experts_of(model)[0].mlp.gate_up_proj.grad.abs().sum() > 0
    assert cost_report(model).sparse_tokens == 0


def test_a_captured_step_is_the_eager_one():
    """torch.compile takes the whole model, experts and all."""
    model = tiny_model_of_type("qwen3_moe")
    sparsify(model, random_cluster_set(model, 0.5), prefill="sparse")
    expected = logits(model)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(step(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_bytes_of_experts_that_a_token_has():
    model = tiny_model_of_type("mixtral")
    experts = sum(sum(p.numel() for p in layer.mlp.parameters()) for layer in experts_of(model))
    stored = (
        sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    )
    assert bytes_per_token(model) == 4 * (stored - experts / 2)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt_oss", "its parameters are|transposed"),
        ("llama4_text", "transposed|parameters|experts"),
    ],
)
def test_other_experts_are_refused_by_name(kind, reason):
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        find_ffn_layers(tiny_model_of_type(kind))
