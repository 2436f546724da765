"""Fisher weights against autograd, sets at a budget, and the bias of what is left out."""

from pathlib import Path

import pytest
import torch

from sparse_runtime import SparseConfig, cost_report, sparse_modules, sparsify
from sparse_runtime.clusters import BuildConfig, build_clusters
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.fisher import fisher_weights, usual_windows
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.clusters.layer_build import cluster_weights, layer_centroids
from sparse_runtime.clusters.layer_data import LayerData
from sparse_runtime.errors import ModelError
from sparse_runtime.kernels.bitmaps import unpack_bits
from sparse_runtime.models.ffn_layers import find_ffn_layers


def test_fisher_weights_match_autograd(tiny_model):
    """By labels that are drawn from what the model predicts, for each window alike."""
    windows = torch.randint(0, 250, (2, 10), generator=torch.Generator().manual_seed(0))
    weights = fisher_weights(tiny_model, windows)

    sums, norms = [torch.zeros(44) for _ in range(3)], [[] for _ in range(3)]
    for row in windows:
        kept, outputs = [], []
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda m, a, kept=kept: (a[0].retain_grad(), kept.append(a[0]))[0]
            )
            for layer in tiny_model.model.layers
        ]
        handles += [
            layer.mlp.register_forward_hook(
                lambda m, a, output, outputs=outputs: (
                    output.retain_grad(),
                    outputs.append(output),
                )[0]
            )
            for layer in tiny_model.model.layers
        ]
        logits = tiny_model(row.unsqueeze(0)).logits[0]
        drawn = torch.Generator().manual_seed(int(row.sum()))
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for total, h in zip(sums, kept, strict=True):
            total += h.grad[0].square().sum(0)
        for norm, y in zip(norms, outputs, strict=True):
            norm.append(y.grad[0].square().sum(-1))
    for weight, total, norm in zip(weights, sums, norms, strict=True):
        assert total.min() > 0
        torch.testing.assert_close(weight.neurons, (total / 20).sqrt())
        torch.testing.assert_close(weight.tokens, torch.cat(norm))


def test_cluster_weights_are_relative_and_shrunk():
    """Two clusters of 20 tokens, one with four times the other's gradients; NaN tells nothing."""
    assignment = torch.tensor([0] * 20 + [1] * 20 + [2, 1])
    gradients = torch.tensor([1.0] * 20 + [4.0] * 20 + [float("nan")] * 2)
    found = cluster_weights(assignment, gradients, 3)
    assert found.square().tolist() == pytest.approx([(0.4 + 1) / 2, (1.6 + 1) / 2, 1.0])
    assert cluster_weights(assignment, torch.zeros(42), 3).tolist() == [1, 1, 1]


def test_a_window_with_exploding_gradients_is_left_out():
    usual = torch.tensor([[1.0, 3.0], [2.0, 2.0], [4.0, 8.0]])
    assert usual_windows(usual).all()
    exploded = torch.cat([usual, torch.tensor([[100.0, 5.0], [float("inf"), 1.0]])])
    assert usual_windows(exploded).tolist() == [True, True, True, False, False]
    # Twice as much in one neuron is no reason, nor is one window alone.
    assert usual_windows(exploded[3:4]).all()
    assert usual_windows(torch.zeros(3, 2)).all()


@pytest.mark.parametrize("by_fisher", [False, True])
def test_no_token_counts_beyond_the_99th_percentile(tiny_model, by_fisher):
    layer = find_ffn_layers(tiny_model)[0]
    states = torch.randn(400, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    states[7] *= 100
    fisher = torch.ones(layer.intermediate_size) if by_fisher else None

    data = LayerData(states, torch.empty(0), num_fit=400)
    found = layer_centroids(data, layer, fisher, torch.arange(400) % 2, 2)
    # Token 7 is in the second cluster, and would be all there is to it.
    first, second = found.mean_squares.sum(-1)
    assert second < 1.5 * first
    first, second = found.mean_magnitudes.sum(-1)
    assert second < 1.5 * first


def test_fisher_leaves_no_trace(tiny_model):
    fisher_weights(tiny_model, torch.randint(0, 250, (1, 10)))
    assert all(p.requires_grad and p.grad is None for p in tiny_model.parameters())
    hooks = [m for m in tiny_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_fisher_weights_are_the_same_out_of_files(tiny_model, tmp_path):
    windows = torch.randint(0, 250, (3, 10), generator=torch.Generator().manual_seed(0))
    expected = fisher_weights(tiny_model, windows)
    found = fisher_weights(tiny_model, windows, buffers=Buffers(0, tmp_path / "own"))
    assert not any(tmp_path.iterdir())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.neurons, other.neurons)
        assert torch.equal(one.tokens, other.tokens)


def break_backward(model, error):
    def refuse(*unused):
        raise error

    class NoBackward(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(refuse)

    return model.lm_head.register_forward_pre_hook(
        lambda module, arguments: (NoBackward.apply(arguments[0]),)
    )


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_without_memory_for_a_backward_pass_norm_takes_its_place(
    tiny_model, tiny_tokenizer, text, error
):
    handle = break_backward(tiny_model, error)
    with pytest.warns(UserWarning, match=r"falls back to 'norm'.*llocate"):
        fallen = build_clusters(
            tiny_model, tiny_tokenizer, [text], config(loop_weights=True, distill=5)
        )
    handle.remove()
    chosen = build_clusters(tiny_model, tiny_tokenizer, [text], config(importance="norm"))
    for index, layer in fallen.layers.items():
        assert torch.equal(layer.active_sets, chosen.layers[index].active_sets)
    # The record is of what ran, and says why.
    assert fallen.build["config"] == chosen.build["config"]
    assert "llocate" in fallen.build["fallback"]


def test_other_errors_of_the_backward_pass_are_raised(tiny_model, tiny_tokenizer, text):
    handle = break_backward(tiny_model, RuntimeError("a bug of ours"))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        build_clusters(tiny_model, tiny_tokenizer, [text], config())
    handle.remove()


def test_weights_that_are_nowhere(tiny_model):
    tiny_model.model.layers[1].self_attn.q_proj.to("meta")
    with pytest.raises(
        ModelError, match=r"self_attn\.q_proj\.weight.*meta device.*from_pretrained"
    ):
        fisher_weights(tiny_model, torch.zeros(1, 8, dtype=torch.int64))


def config(**changes):
    options = {"num_clusters": 6, "budget": 0.7, "router": "2", "window": 50, "max_tokens": 2000}
    options |= {"loop_weights": False, "distill": 0}  # tests/clusters/test_distill.py
    return BuildConfig(**(options | changes))


def test_bias_is_the_mean_of_what_is_left_out(tiny_model, tiny_tokenizer, text):
    clusters = build_clusters(
        tiny_model, tiny_tokenizer, [text], config(num_clusters=1, verify=False)
    )
    layer, built = find_ffn_layers(tiny_model)[1], clusters.layers[1]
    left_out = ~unpack_bits(built.active_sets, 44)[0]
    assert left_out.any()

    # Capture, on the same windows, what the neurons left out would have added.
    added = []

    def watch(module, arguments):
        h = importance_scorer(layer).activations(arguments[0].reshape(-1, 32))
        added.append((h * left_out) @ layer.down.weight.detach().t())

    from sparse_runtime.clusters.text import calibration_windows, parse_source

    windows = calibration_windows(
        [parse_source(text)], tiny_tokenizer, max_tokens=2000, window=50
    ).windows
    handle = layer.mlp.register_forward_pre_hook(watch)
    with torch.inference_mode():
        for row in windows[: round(len(windows) * 0.9)]:
            tiny_model.model(row.unsqueeze(0))
    handle.remove()
    expected = torch.cat(added).mean(0)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(built.cluster_bias[0].float(), expected, atol=0.02, rtol=0.02)

    sparsify(tiny_model, clusters, config=SparseConfig(prefill="sparse"))
    module = sparse_modules(tiny_model)[1]
    x = torch.randn(3, 32)
    with torch.inference_mode():
        with_bias = module(x)
        module.cluster_bias.zero_()
        found = with_bias - module(x)
    torch.testing.assert_close(found, expected.expand(3, -1), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("importance", ["norm", "fisher", "binary"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_budget_is_met_on_calibration_text(
    tiny_model, tiny_tokenizer, text, importance, allocation
):
    clusters = build_clusters(
        tiny_model,
        tiny_tokenizer,
        [text],
        config(importance=importance, allocation=allocation, verify=False),
    )
    sizes = {int(unpack_bits(c.active_sets, 44).sum(-1).max()) for c in clusters.layers.values()}
    assert (len(sizes) == 1) == (allocation == "uniform")
    # The artifact's budget is in bfloat16, the dtype of a normal run.
    sparsify(tiny_model.to(torch.bfloat16), clusters, config=SparseConfig(prefill="sparse"))
    ids = tiny_tokenizer(Path(text).read_text()[:400], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        tiny_model(ids)
    assert cost_report(tiny_model).cost_share == pytest.approx(0.7, abs=0.04)
