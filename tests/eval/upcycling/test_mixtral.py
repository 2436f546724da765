"""Mixtures are Mixtrals: equal to the dense model with all experts, near it with some."""

import model_types
import pytest
import torch
from helpers import IDS, assert_same_state, logits, make_tiny_model_of
from transformers import MixtralForCausalLM

from sparse_runtime.errors import ConfigError, ModelError, UnsupportedArchitectureError
from sparse_runtime.eval.upcycling import distilling
from sparse_runtime.eval.upcycling import mixtral as form
from sparse_runtime.eval.upcycling.layer_experts import fit_experts
from sparse_runtime.eval.upcycling.upcycle import UpcycleConfig, compare, round_to, upcycle

WINDOWS = torch.randint(256, (24, 32), generator=torch.Generator().manual_seed(0))


def make_dense(kind="llama", **changes):
    return make_tiny_model_of(kind, intermediate_size=64, **changes)


def mixture_of(model, folder, **options):
    config = UpcycleConfig(**({"experts": 4, "active": 2, "distill": 0} | options))
    made, layers = upcycle(model, WINDOWS, config, work=folder / "work")
    assert not (folder / "work").exists()
    return made, layers


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_all_experts_are_the_dense_model(kind, tied, tmp_path):
    model = make_dense(kind, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made, layers = mixture_of(model, tmp_path, active=4)
    assert isinstance(made, MixtralForCausalLM)
    assert torch.allclose(logits(made), logits(model), atol=1e-4)
    assert logits(model).abs().max() > 0.1
    assert [layer["load"] for layer in layers] == [[1.0] * 4] * 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_some_experts(tmp_path):
    model = make_dense()
    made, layers = mixture_of(model, tmp_path)
    mlp = made.model.layers[1].mlp
    assert mlp.gate.weight.shape == (4, 32)
    assert mlp.experts.gate_up_proj.shape == (4, 32, 32)
    assert mlp.experts.down_proj.shape == (4, 32, 16)
    assert (made.config.num_local_experts, made.config.num_experts_per_tok) == (4, 2)
    for layer in layers:
        assert sum(layer["load"]) == pytest.approx(2)
        assert 0 < layer["error"] < 0.9
    result = compare(model, made, WINDOWS.flatten()[:256], window=32)
    assert result["kl"] > 0.001
    # The experts that the router likes least.
    for layer in made.model.layers:
        layer.mlp.gate.weight.data.neg_()
    assert compare(model, made, WINDOWS.flatten()[:256], window=32)["kl"] > 1.1 * result["kl"]


def test_the_layer_is_what_mixtral_computes(tmp_path):
    """The error of the fit is that of the running module."""
    model = make_dense()
    layers = form.check_dense(model, 4)
    states = torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
    fitted = [fit_experts(x, states, 4, 2, torch.Generator().manual_seed(0)) for x in layers]
    made = form.as_mixtral(model, layers, fitted, 2)
    for layer, block, own in zip(layers, made.model.layers, fitted, strict=True):
        with torch.inference_mode():
            expected, found = layer.mlp(states), block.mlp(states[None])[0]
        errors = (found - expected).square().sum(-1) / expected.square().sum(-1)
        assert errors.mean().item() == pytest.approx(own.error, rel=1e-3)
        # Neurons that are left out are made up for in part.
        assert own.error < 0.5


def test_the_seed_decides(tmp_path):
    a, b, c = (mixture_of(make_dense(), tmp_path, seed=seed)[0] for seed in (1, 1, 2))
    assert_same_state(a, b)
    assert not torch.equal(logits(a), logits(c))


def test_distilling_brings_it_nearer(tmp_path, monkeypatch):
    monkeypatch.setattr(distilling, "_LEARNING_RATE", 3e-3)
    model = make_dense()
    made, _ = mixture_of(model, tmp_path)
    router = made.model.layers[0].mlp.gate.weight.clone()
    before = compare(model, made, WINDOWS.flatten(), window=32)["kl"]
    dense = logits(model)
    losses = distilling.distill(made, model, WINDOWS, steps=40)
    assert len(losses) == 40
    assert compare(model, made, WINDOWS.flatten(), window=32)["kl"] < 0.9 * before
    assert torch.equal(logits(model), dense)
    assert torch.equal(made.model.layers[0].mlp.gate.weight, router)


def test_rounding_leaves_the_dense_model_alone(tmp_path):
    model = make_dense()
    made, _ = mixture_of(model, tmp_path)
    dense, exact = logits(model), logits(made)
    round_to(made, torch.bfloat16)
    assert torch.equal(logits(model), dense)
    assert not torch.equal(logits(made), exact)
    assert torch.allclose(logits(made.bfloat16()).float(), exact, atol=0.2)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("arcee", "has no gate"),
        ("qwen2", r"k_proj\.bias it has"),
        ("qwen3", r"k_norm\.weight it has"),
        ("mixtral", "is a mixture of 4 experts; upcycling takes"),
        ("granite", "its logits are off by"),
    ],
)
def test_models_that_are_no_mixtral(kind, words, tmp_path, monkeypatch):
    monkeypatch.setitem(model_types._SIZES, "intermediate_size", 64)
    model = model_types.tiny_model_of_type(kind).eval().float()
    with pytest.raises(UnsupportedArchitectureError, match=words):
        mixture_of(model, tmp_path, experts=2, active=1)


def test_biases_of_the_ffn_are_refused(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="has biases"):
        mixture_of(make_dense(mlp_bias=True), tmp_path)


def test_weights_that_are_not_finite(tmp_path):
    model = make_dense()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"NaN, as the weights model.layers.1.mlp.up_proj.weight"):
        mixture_of(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("experts", [6, 16])
def test_experts_that_do_not_divide_the_neurons(tmp_path, experts):
    words = f"has 64 neurons, of which {experts} experts cannot have the same multiple of 8 each"
    with pytest.raises(ConfigError, match=words):
        mixture_of(make_dense(), tmp_path, experts=experts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 1, "active": 1}, "experts is 1"),
        ({"experts": 4, "active": 5}, "active is 5; expected 1 to the number of experts, 4"),
        ({"active": 0}, "active is 0"),
        ({"distill": -1}, "distill is -1"),
    ],
)
def test_values_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        UpcycleConfig(**options)


def test_the_proof_would_notice():
    model = make_dense()
    layers = form.check_dense(model, 4)
    form.prove_form(model, layers, 4, IDS[0])
    model.config.rope_parameters["rope_theta"] = 77.0  # the running model keeps the old one
    with pytest.raises(UnsupportedArchitectureError, match="its logits are off by"):
        form.prove_form(model, layers, 4, IDS[0])
