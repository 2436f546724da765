"""Degenerate statistics: layers that output nothing, text that repeats, numbers that overflow."""

import math

import pytest
import torch
from helpers import make_tiny_model

from sparse_runtime import ClusterSet, SparseConfig, recut, sparsify, unsparsify
from sparse_runtime.clusters import BuildConfig, build_clusters
from sparse_runtime.clusters.fisher import fisher_weights
from sparse_runtime.errors import ModelError
from sparse_runtime.kernels.bitmaps import set_sizes
from sparse_runtime.predictors.training import initial_router, route

SMALL = {"num_clusters": 6, "budget": 0.7, "router": "2", "window": 50, "max_tokens": 2000}


def config(**changes):
    return BuildConfig(**({**SMALL, "distill": 2, "correction_rank": 2} | changes))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "dead", [{"down_proj": (1,)}, {"gate_proj": (0, 2)}, {"up_proj": (0, 1, 2)}]
)
def test_a_layer_that_outputs_nothing_gets_the_smallest_sets(
    tiny_tokenizer, text, tmp_path, verify, dead
):
    """As in models that were deepened by blocks of zeros, and trained no further."""
    model = make_tiny_model()
    ((name, layers),) = dead.items()
    for index in layers:
        getattr(model.model.layers[index].mlp, name).weight.data.zero_()
    built = build_clusters(
        model, tiny_tokenizer, [text], config(verify=verify), output=tmp_path / "clusters"
    )
    sizes = {
        index: set_sizes(layer.active_sets).max().item() for index, layer in built.layers.items()
    }
    assert all(sizes[index] <= 1 for index in layers)
    assert all(sizes[index] > 1 for index in {0, 1, 2} - set(layers))
    assert all(math.isfinite(weight) for weight in built.build["loop_weights"].values())
    # It runs, and its layer still outputs nothing.
    loaded = ClusterSet.from_pretrained(tmp_path / "clusters", centroids=True)
    for clusters in (loaded, recut(model, loaded, budget=0.4)):
        sparsify(model, clusters, config=SparseConfig(prefill="sparse"))
        x = torch.randn(5, 32)
        for index in range(3):
            output = model.model.layers[index].mlp(x)
            assert (output.abs().max() < 1e-6) == (index in layers)
        unsparsify(model)


@pytest.mark.parametrize("pattern", ["a", "ab", "the same words again and again. "])
@pytest.mark.parametrize("importance", ["fisher", "norm", "binary"])
def test_text_that_repeats_can_be_clustered(
    tiny_model, tiny_tokenizer, tmp_path, pattern, importance
):
    file = tmp_path / "repeats.txt"
    file.write_text(pattern * (4000 // len(pattern)))
    # Neither positions nor the start of the text tell tokens apart here.
    tiny_model.model.rotary_emb.inv_freq.zero_()
    built = build_clusters(tiny_model, tiny_tokenizer, [str(file)], config(importance=importance))
    for layer in built.layers.values():
        assert all(part.isfinite().all() for part in (layer.router_up, layer.cluster_bias))
        assert set_sizes(layer.active_sets).max() > 0


@pytest.mark.parametrize("rank", [None, 3])
def test_a_router_of_states_that_are_all_the_same(rank):
    states = torch.randn(1, 40).expand(200, 40) * 100
    router = initial_router(states, torch.arange(200) % 6, 6, rank)
    assert all(parameter.isfinite().all() for parameter in router.parameters())
    assert route(router, states).unique().numel() == 1
    # Of states in two places it tells which is which.
    states = torch.cat([states[:100], -states[:100]])
    router = initial_router(states, (torch.arange(200) >= 100).long(), 2, rank)
    assert torch.equal(route(router, states), (torch.arange(200) >= 100).long())


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        ("model.layers.1.mlp.down_proj", r"model\.layers\.2\.mlp"),
        ("model.layers.0.self_attn.q_proj", r"model\.layers\.0\.mlp"),
        ("model.layers.2.mlp.up_proj", "last hidden state"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    tiny_model, tiny_tokenizer, text, weight, found, value
):
    tiny_model.get_parameter(f"{weight}.weight").data[3, 5] = value
    with pytest.raises(ModelError, match=rf"{found}.* as the weights {weight}\.weight do"):
        build_clusters(tiny_model, tiny_tokenizer, [text], config())


@pytest.mark.parametrize("loop_weights", [True, False])
def test_what_is_not_finite_past_the_decoder_is_named(
    tiny_model, tiny_tokenizer, text, loop_weights
):
    """All hidden states are finite; a logit is not, and with it all that is measured in the loop."""
    tiny_model.lm_head.weight.data[3, 5] = float("nan")
    found = "loop weight of layer 0" if loop_weights else "divergence of held-out text"
    with pytest.raises(ModelError, match=rf"{found}.*weights lm_head\.weight do \(torch\.float32"):
        build_clusters(
            tiny_model, tiny_tokenizer, [text], config(importance="norm", loop_weights=loop_weights)
        )


def test_logits_that_overflow_are_named_with_the_dtype(tiny_model, tiny_tokenizer, text):
    tiny_model.lm_head.register_forward_hook(lambda module, inputs, output: output * math.inf)
    with pytest.raises(ModelError, match=r"loop weight of layer 0.*in torch\.float32 from finite"):
        build_clusters(tiny_model, tiny_tokenizer, [text], config(importance="norm"))


def test_a_dtype_that_overflows_is_named(tiny_tokenizer, text):
    model = make_tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data *= 3e4
    model.model.layers[1].mlp.down_proj.weight.data /= 3e4
    build_clusters(model, tiny_tokenizer, [text], config())  # in float32 there is nothing to it
    match = r"model\.layers\.2\.mlp.*torch\.float16 from finite weights; build in bfloat16"
    with pytest.raises(ModelError, match=match):
        build_clusters(model.half(), tiny_tokenizer, [text], config())


def test_gradients_that_overflow_are_named(tiny_model):
    def explode(module, gradients):
        return (gradients[0] * float("inf"),)

    windows = torch.randint(0, 250, (3, 10), generator=torch.Generator().manual_seed(0))
    calls = []
    handle = tiny_model.model.layers[2].register_full_backward_pre_hook(
        lambda module, gradients: (
            explode(module, gradients) if not calls.append(1) and len(calls) == 2 else None
        )
    )
    weights = fisher_weights(tiny_model, windows)
    handle.remove()
    # One window of three is left out.
    for found, expected in zip(weights, fisher_weights(tiny_model, windows[::2]), strict=True):
        torch.testing.assert_close(found.neurons, expected.neurons)
        assert found.tokens.isfinite().tolist() == [True] * 10 + [False] * 10 + [True] * 10
    handle = tiny_model.model.layers[2].register_full_backward_pre_hook(explode)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp.*gradients.*torch\.float32; build in"):
        fisher_weights(tiny_model, windows)
    handle.remove()
