"""Distilling in the loop, against the runtime's own sparse model."""

from dataclasses import replace

import pytest
import torch
from helpers import make_tiny_model

from sparse_runtime import ClusterSet, cost_report, recut, sparse_modules, sparsify, unsparsify
from sparse_runtime.clusters import tuning_lines
from sparse_runtime.clusters.ranks import Ranks
from sparse_runtime.clusters.tuning import distill as distillation
from sparse_runtime.clusters.tuning.distill import Distillation, distill, reserved
from sparse_runtime.clusters.tuning.in_loop import tune
from sparse_runtime.clusters.tuning.loop_weights import loop_weights
from sparse_runtime.clusters.tuning.student import divergence, measure_scales, students
from sparse_runtime.models.ffn_layers import find_ffn_layers


def sparse_logits(model, clusters, windows):
    sparsify(model, clusters, backend="reference", prefill="sparse")
    with torch.inference_mode():
        logits = model(windows).logits
    unsparsify(model)
    return logits


def true_divergence(model, clusters, windows):
    with torch.inference_mode():
        expected = model(windows).logits.log_softmax(-1)
    found = sparse_logits(model, clusters, windows).log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def test_students_compute_what_the_runtime_does(tiny_model, clusters, windows):
    cut = recut(tiny_model, clusters, budget=0.6, verify=False)
    expected = sparse_logits(tiny_model, cut, windows)
    distance = true_divergence(tiny_model, cut, windows)
    dense = tiny_model(windows).logits
    with students(tiny_model, cut.layers, 0, 0) as modules:
        torch.testing.assert_close(tiny_model(windows).logits, expected, atol=0.02, rtol=0.02)
        assert (dense - expected).abs().max() > 0.2
        found = divergence(tiny_model, modules, windows).item()
        assert found == pytest.approx(distance, rel=0.02)
        assert all(not p.requires_grad for p in tiny_model.lm_head.parameters())
    assert all(p.requires_grad for p in tiny_model.parameters())
    assert torch.equal(tiny_model(windows).logits, dense)


def test_students_keep_what_looks_confirm(tiny_model, clusters, windows):
    cut = recut(tiny_model, clusters, budget=0.6, verify=True)
    assert any(layer.maybe_sets is not None for layer in cut.layers.values())
    expected = true_divergence(tiny_model, cut, windows)
    with students(tiny_model, cut.layers, 0, 0) as modules:
        # Looks err a little at run time.
        found = divergence(tiny_model, modules, windows).item()
    assert found == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("verify", [False, True])
def test_distillation_brings_the_sparse_model_closer(tiny_model, clusters, windows, verify):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    options = {"budget": 0.4, "verify": verify}
    cut = recut(tiny_model, reserved(clusters, 3), **options)
    plain = true_divergence(tiny_model, recut(tiny_model, clusters, **options), windows)
    settings = Distillation(150, 3, step_tokens=90, learning_rate=0.1)
    # Text that is tuned on: what can be learned of random text in general is little.
    tuned, history = distill(tiny_model, cut, windows, windows, settings)
    tuned = recut(tiny_model, tuned, **options)
    assert len(history.divergence) == 150
    assert true_divergence(tiny_model, tuned, windows) < 0.8 * plain
    assert all(
        torch.equal(tiny_model.state_dict()[name], tensor) for name, tensor in before.items()
    )
    for index, layer in tuned.layers.items():
        assert layer.correction_rank == 3
        assert torch.equal(layer.router_up, clusters.layers[index].router_up)
    # The correction's bytes are part of the budget.
    extra = tuned.layers[0].extra_elements - clusters.layers[0].extra_elements
    assert extra == 2 * 3 * 32


def test_states_of_the_dense_model_spare_its_runs(tiny_model, clusters, windows):
    cut = recut(tiny_model, reserved(clusters, 2), budget=0.6, verify=False)
    with torch.inference_mode():
        states = tiny_model.model(windows).last_hidden_state
    runs = []
    handle = tiny_model.register_forward_hook(lambda *unused: runs.append(1))
    settings = Distillation(5, 2, step_tokens=60)
    fit, held_out = windows[:10], windows[10:]
    expected, history = distill(tiny_model, cut, fit, held_out, settings)
    weights = loop_weights(tiny_model, cut, windows[:2])
    # Steps, and two looks at two held-out windows, each with the dense model's; one tries the head.
    spared = 5 + 2 * 2
    assert len(runs) == 2 * spared + 1
    found, same = distill(
        tiny_model, cut, fit, held_out, settings, dense_states=lambda numbers: states[numbers]
    )
    assert loop_weights(
        tiny_model, cut, windows[:2], dense_states=lambda numbers: states[numbers]
    ) == pytest.approx(weights, rel=1e-3)
    handle.remove()
    assert len(runs) == 3 * spared + 1
    assert same.divergence == pytest.approx(history.divergence, rel=1e-4)
    assert same.held_out == pytest.approx(history.held_out, rel=1e-4)
    for index, layer in expected.layers.items():
        torch.testing.assert_close(
            found.layers[index].bias_shift, layer.bias_shift, atol=1e-5, rtol=1e-3
        )


def test_an_interrupted_distillation_goes_on(tiny_model, clusters, windows, tmp_path):
    cut = recut(tiny_model, reserved(clusters, 2), budget=0.6, verify=False)
    settings = Distillation(30, 2, step_tokens=60)
    fit, held_out = windows, windows[10:]
    whole, history = distill(tiny_model, cut, fit, held_out, settings)
    file = tmp_path / "state.safetensors"
    calls = []

    def interrupt(module, arguments, keywords):
        calls.append(1)
        if len(calls) > 2 * (25 + 3 * 2):
            raise KeyboardInterrupt

    handle = tiny_model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_model, cut, fit, held_out, settings, state_file=file)
    handle.remove()
    assert file.exists()
    again, resumed = distill(tiny_model, cut, fit, held_out, settings, state_file=file)
    assert resumed.divergence == pytest.approx(history.divergence, rel=1e-4)
    assert resumed.held_out == pytest.approx(history.held_out, rel=1e-4)
    for index, layer in whole.layers.items():
        other = again.layers[index]
        assert layer.bias_shift.abs().max() > 1e-3
        torch.testing.assert_close(other.bias_shift, layer.bias_shift, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(other.correction_up, layer.correction_up, atol=1e-5, rtol=1e-3)


def distilled(clusters):
    """The same with random compensation, as if tuned at their cut."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        index: replace(
            layer,
            bias_shift=torch.randn(6, 32, generator=generator).bfloat16(),
            correction_down=torch.randn(2, 32, generator=generator).bfloat16(),
            correction_up=torch.randn(2, 32, generator=generator).bfloat16(),
        )
        for index, layer in clusters.layers.items()
    }
    return replace(clusters, layers=layers)


@pytest.mark.parametrize("verify", [False, True])
def test_recut_keeps_what_was_distilled(tiny_model, clusters, tmp_path, verify):
    """On disk and back, and to another budget and back."""
    start = recut(tiny_model, reserved(clusters, 2), budget=0.5, verify=verify)
    tuned = recut(tiny_model, distilled(start), budget=0.5)
    recut(tiny_model, tuned, budget=0.8).save_pretrained(tmp_path)
    loaded = ClusterSet.from_pretrained(tmp_path, centroids=True)
    again = recut(tiny_model, loaded, budget=0.5)
    for index, layer in tuned.layers.items():
        plain, same = start.layers[index], again.layers[index]
        shift = layer.cluster_bias.float() - plain.cluster_bias.float()
        torch.testing.assert_close(shift, layer.bias_shift.float(), atol=0.05, rtol=0.05)
        assert torch.equal(same.correction_down, layer.correction_down)
        # Centroids are rounded on disk, which moves a neuron in or out of a set.
        for name in ("correction_up", "bias_shift", "cluster_bias"):
            one, other = getattr(same, name).float(), getattr(layer, name).float()
            assert (one - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize("verify", [False, True])
def test_compensation_goes_with_what_is_left_out(tiny_model, clusters, verify):
    start = recut(tiny_model, reserved(clusters, 2), budget=0.5, verify=verify)
    tuned = distilled(start)
    norms = {}
    for budget in (0.35, 0.5, 0.8, 0.97):
        cut = recut(tiny_model, tuned, budget=budget)
        norms[budget] = [
            [layer.bias_shift.norm() / tuned.layers[index].bias_shift.float().norm()
             for index, layer in cut.layers.items()],
            [layer.correction_up.norm() / tuned.layers[index].correction_up.float().norm()
             for index, layer in cut.layers.items()],
        ]  # fmt: skip
        for index, layer in cut.layers.items():
            shares = layer.left_out / start.layers[index].left_out
            for factors in norms[budget]:
                assert factors[index] == pytest.approx(shares**0.5, rel=1e-3)
    means = [torch.tensor(norms[budget]).mean().item() for budget in sorted(norms)]
    assert means[0] > 1.05
    assert means[1] == pytest.approx(1, rel=1e-3)
    assert means[2] < 0.8
    assert means[3] < 0.3
    # With all neurons there is nothing to make good.
    everything = recut(tiny_model, tuned, budget=1.0)
    assert all(layer.cluster_bias.abs().max() < 0.05 for layer in everything.layers.values())


def test_compensation_of_old_artifacts_does_not_fade(tiny_model, clusters):
    start = recut(tiny_model, reserved(clusters, 2), budget=0.5, verify=False)
    layers = {i: replace(one, left_out=None) for i, one in distilled(start).layers.items()}
    cut = recut(tiny_model, replace(start, layers=layers), budget=0.8)
    for index, layer in cut.layers.items():
        assert torch.equal(layer.bias_shift, layers[index].bias_shift)
        assert torch.equal(layer.correction_up, layers[index].correction_up)
        assert layer.left_out is None


def test_the_correction_is_added(tiny_model, clusters):
    """By the reference and by the C++ operation, beside the cost that is counted."""
    cut = recut(tiny_model, clusters, budget=0.6, verify=False)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    down, up = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    for backend in ("reference", "auto"):
        outputs = []
        for correction in ((None, None), (down, up)):
            layers = {
                index: replace(layer, correction_down=correction[0], correction_up=correction[1])
                for index, layer in cut.layers.items()
            }
            sparsify(tiny_model, replace(cut, layers=layers), backend=backend, prefill="sparse")
            with torch.inference_mode():
                outputs.append(sparse_modules(tiny_model)[1](x))
            share = cost_report(tiny_model).cost_share
            unsparsify(tiny_model)
            outputs.append(share)
        plain, share, corrected, larger = outputs
        expected = x @ down.float().t() @ up.float()
        torch.testing.assert_close(corrected - plain, expected, atol=1e-3, rtol=1e-3)
        assert larger - share == pytest.approx(2 * 4 * 32 / (3 * 32 * 44), rel=1e-3)


def test_scales_are_what_a_typical_token_leaves_out(tiny_model, clusters, windows):
    cut = recut(tiny_model, clusters, budget=0.6, verify=False)
    layers = find_ffn_layers(tiny_model)
    with students(tiny_model, cut.layers, 2, 0) as modules:
        seen = {}
        handles = [
            module.register_forward_pre_hook(
                lambda module, arguments, index=index: seen.update({index: arguments[0].clone()})
            )
            for index, module in modules.items()
        ]
        measure_scales(tiny_model, modules, windows[:1])
        for handle in handles:
            handle.remove()
        for layer in layers:
            module, x = modules[layer.index], seen[layer.index][0]
            left_out = layer.mlp(x) - module(x)
            expected = left_out.square().mean(-1).sqrt().median().item()
            assert module.output_scale == pytest.approx(expected, rel=1e-3)
            assert module.input_scale == pytest.approx(x.square().mean(-1).sqrt().median().item())
            # What the correction makes of x is of the order of one.
            inner = (x @ module.correction_down.t()).square().mean().sqrt().item()
            assert 0.4 < inner < 2.5


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_steps_are_relative_to_the_layers_scale(tiny_model, clusters, windows, factor):
    """The same tuning, whatever the unit that a layer's output is in."""
    settings = Distillation(3, 2, step_tokens=60)
    shifts = []
    for scale in (1.0, factor):
        model = make_tiny_model()
        # What follows a norm does not see the unit of what came before it, but for its ε.
        model.model.embed_tokens.weight.data *= scale * 100
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.data *= scale * 100
            layer.mlp.down_proj.weight.data *= scale * 100
        cut = recut(model, clusters, budget=0.6, verify=False)
        tuned, _ = distill(model, cut, windows, windows[:2], settings)
        shifts.append([layer.bias_shift / scale for layer in tuned.layers.values()])
    for one, other in zip(*shifts, strict=True):
        assert one.abs().max() > 0
        # Not each element: where a gradient is next to nothing, rounding decides its sign.
        assert (one - other).norm() < 0.2 * one.norm()


def tuned_by(model, clusters, windows, settings, held_out=None):
    def cut(uncut):
        return recut(model, uncut, budget=0.5, verify=False)

    held_out = windows[:4] if held_out is None else held_out
    found, record = tune(model, clusters, cut, windows, held_out, settings)
    return cut(found), cut(clusters), record


def test_tuning_that_helps_is_kept(tiny_model, clusters, windows):
    settings = Distillation(40, 2, step_tokens=90, learning_rate=0.1)
    tuned, plain, record = tuned_by(tiny_model, clusters, windows, settings)
    assert record["kept"]
    assert record["steps"] == 40
    assert record["held_out_tokens"] == 4 * 30
    assert len(record["divergence"]) == 40
    assert record["held_out_before"] == pytest.approx(
        true_divergence(tiny_model, plain, windows[:4]), rel=0.02
    )
    assert record["held_out_after"] == pytest.approx(
        true_divergence(tiny_model, tuned, windows[:4]), rel=0.02
    )
    assert record["held_out_after"] < 0.95 * record["held_out_before"]
    assert record["best_step"] > 0
    assert [record["best_step"], record["held_out_after"]] in record["held_out"]
    assert "→" in tuning_lines({"tuning": record})[0]


def test_tuning_that_hurts_is_not_kept(tiny_model, clusters, windows):
    """Steps far too long: what is written is what it was, correction's bytes given back."""
    settings = Distillation(12, 2, step_tokens=90, learning_rate=50.0)
    tuned, plain, record = tuned_by(tiny_model, clusters, windows, settings)
    assert max(value for _, value in record["held_out"]) > 1.5 * record["held_out_before"]
    assert not record["kept"]
    assert record["held_out_after"] >= record["held_out_before"]
    for index, layer in tuned.layers.items():
        assert layer.bias_shift is None
        assert layer.correction_rank == 0
        assert torch.equal(layer.active_sets, plain.layers[index].active_sets)
        assert torch.equal(layer.cluster_bias, plain.layers[index].cluster_bias)
    assert "not kept" in tuning_lines({"tuning": record})[0]


def test_the_best_state_is_kept(tiny_model, clusters, windows, monkeypatch):
    """Learning too fast helps for a while, then no more."""
    monkeypatch.setattr(distillation, "CHECK_EVERY", 2)
    settings = Distillation(60, 2, step_tokens=90, learning_rate=1.0)
    tuned, _, record = tuned_by(tiny_model, clusters, windows, settings, windows[:1])
    values = dict(record["held_out"])
    assert 0 < record["best_step"] < 60
    assert values[record["best_step"]] == min(values.values()) < values[60]
    found = true_divergence(tiny_model, tuned, windows[:1])
    assert found == pytest.approx(record["held_out_after"], rel=0.02)


def test_a_gradient_that_explodes_is_clipped_or_left_out(tiny_model, clusters, windows):
    cut = recut(tiny_model, clusters, budget=0.5, verify=False)
    settings = Distillation(10, 0, step_tokens=90)
    moved = []
    for factor in (1.0, 1e6, float("nan")):
        with students(tiny_model, cut.layers, 0, 0) as modules:
            training = distillation._Training(modules, settings, Ranks())
            for number in range(6):
                scale = factor if number == 4 else 1.0
                training.step(
                    torch.tensor([number]),
                    lambda rows, by=scale, own=modules: (
                        divergence(tiny_model, own, windows[rows]) * by
                    ),
                )
            parameters = [p.detach().clone() for m in modules.values() for p in m.parameters()]
            moved.append(torch.cat([p.flatten() for p in parameters]))
    usual, exploded, broken = moved
    assert all(one.isfinite().all() for one in moved)
    assert usual.abs().max() > 0
    # Without clipping Adam's second moment would stand still for as long as it remembers.
    assert (exploded - usual).norm() < 0.5 * usual.norm()
    assert (broken - usual).norm() < 0.5 * usual.norm()
