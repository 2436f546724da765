"""Packing by statistics of the inputs: what is measured, where, and what it brings."""

import copy

import pytest
import torch
from helpers import assert_same_state, backwards, logits, make_tiny_model, make_tiny_model_of
from model_types import tiny_model_of_type
from torch import nn

from sparse_runtime.clusters.calibrated_packing import pack_calibrated
from sparse_runtime.errors import (
    ConfigError,
    ModelError,
    NothingMatchedError,
    UnsupportedArchitectureError,
)
from sparse_runtime.ffn.plane_modules import PlaneFFN, PlaneLinear
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.kernels.rounding import InputStatistics
from sparse_runtime.models.ffn_forms import LLAMA, Proof
from sparse_runtime.models.ffn_layers import find_ffn_layers

#: With biases of attention; of all; without a gate and with biases, twice, the second by other names.
KINDS = ["mistral", "qwen2", "biased", "starcoder2", "gptj"]


def tiny(kind):
    if kind == "biased":
        return make_tiny_model_of("llama", mlp_bias=True, attention_bias=True)
    if kind in ("starcoder2", "gptj"):
        return tiny_model_of_type(kind)
    return make_tiny_model_of(kind)


def windows(count=6, size=24, seed=1):
    return torch.randint(0, 256, (count, size), generator=torch.Generator().manual_seed(seed))


def inputs_of(model, module, text):
    """What a module is called with over windows [tokens, K]."""
    parts = []
    handle = module.register_forward_pre_hook(lambda _, arguments: parts.append(arguments[0]))
    with torch.inference_mode():
        for window in text:
            model(input_ids=window[None])
    handle.remove()
    return torch.cat([part.flatten(0, -2) for part in parts])


def by_hand(model, text, bits, linears, compensate):
    """Layer after layer, with whole forwards of the model as it is packed so far."""
    form = PlaneFormat.of_bits(bits)

    def statistics(module):
        x = inputs_of(model, module, text)
        return InputStatistics.of(x.T @ x / len(x) if compensate else x.square().mean(0))

    def place(parent, name, statistic):
        linear = getattr(parent, name)
        setattr(
            parent, name, PlaneLinear.from_linear(linear, PlaneFormat.of_bits(linears), statistic)
        )

    for ffn in find_ffn_layers(model):
        layer = ffn.parent
        attention = getattr(layer, "self_attn", None) or layer.attn
        found = {
            name: statistics(module)
            for name, module in attention.named_children()
            if linears and isinstance(module, nn.Linear)
        }
        packed = PlaneFFN.from_mlp(ffn, form, statistics(ffn.mlp), statistics(ffn.down))
        layer.mlp = packed
        for name, statistic in found.items():
            place(attention, name, statistic)
    if linears:
        place(model, "lm_head", statistics(model.lm_head))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("linears", [None, 6])
def test_each_layer_is_rounded_by_what_it_sees_in_the_packed_model(kind, compensate, linears):
    model = tiny(kind)
    expected = by_hand(copy.deepcopy(model), windows(), 5, linears, compensate)
    assert pack_calibrated(model, windows(), 5, linears=linears, compensate=compensate) is model
    a, b = model.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        # Sums in another order move a code here and there.
        same = (tensor == b[name]).float().mean()
        assert same > 0.99, (name, same)
    plain = pack_model(tiny(kind), 5, linears=linears).state_dict()
    assert any((a[name] != plain[name]).float().mean() > 0.02 for name in a)


def test_statistics_bring_outputs_nearer_to_the_float_models():
    text, held_out = windows(16, 32), windows(8, 32, seed=9)
    with torch.no_grad():
        expected = logits(make_tiny_model(), held_out)

    def distance(model):
        log_p, log_q = expected.log_softmax(-1), logits(model, held_out).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    plain = distance(pack_model(make_tiny_model(), 4))
    compensated = distance(pack_calibrated(make_tiny_model(), text, 4))
    assert compensated < 0.9 * plain


@pytest.mark.parametrize("tied", [False, True])
def test_saves_and_loads(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_tiny_model(tie_word_embeddings=tied)
    pack_calibrated(model, windows(), 6, linears=8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_parts_of_a_model():
    model = make_tiny_model()
    pack_calibrated(
        model, windows(), None, linears=8, modules_to_not_convert=["lm_head", "layers.2"]
    )
    packed = {name for name, module in model.named_modules() if isinstance(module, PlaneLinear)}
    assert packed == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}
    model = make_tiny_model()
    left = ["q_proj", "k_proj", "v_proj", "o_proj", "layers"]
    pack_calibrated(model, windows(), None, linears=8, modules_to_not_convert=left)
    packed = [name for name, module in model.named_modules() if isinstance(module, PlaneLinear)]
    assert packed == ["lm_head"]


def test_nothing_stays_on_the_model():
    model = make_tiny_model()
    model.requires_grad_(True)
    pack_calibrated(model, windows(), 6)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_progress_adds_up():
    class Bar:
        def task(self, description, total):
            from contextlib import contextmanager

            self.total, self.done = total, 0

            @contextmanager
            def bar():
                yield lambda units: setattr(self, "done", self.done + units)

            return bar()

    for options, expected in (({}, 3 * 6), ({"linears": 8}, 4 * 6)):
        bar = Bar()
        pack_calibrated(make_tiny_model(), windows(), 6, progress=bar, **options)
        assert bar.total == bar.done == expected


def test_refusals():
    for wrong in (windows()[0], windows()[:0]):
        with pytest.raises(ConfigError, match=r"calibration windows are \[.*\[W, window\]"):
            pack_calibrated(make_tiny_model(), wrong, 6)
    model = make_tiny_model()
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match="bits"):
        pack_calibrated(model, windows(), 2)
    model.model.norm.weight.data[:] = float("inf")
    with pytest.raises(
        ModelError, match=r"the input of lm_head holds infinities or NaN.*model\.norm"
    ):
        pack_calibrated(model, windows(), None, linears=6)
    model = before
    model.model.layers = nn.ModuleDict({str(i): x for i, x in enumerate(model.model.layers)})
    with pytest.raises(NothingMatchedError, match="no decoder layer"):
        pack_calibrated(model, windows(), 6)
    with pytest.raises(UnsupportedArchitectureError, match="more than the sequence of its layers"):
        pack_calibrated(backwards(make_tiny_model()), windows(), 6)


def test_an_interruption_leaves_no_hooks(monkeypatch):
    model = make_tiny_model()
    layer = model.model.layers[1]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.mlp.act_fn, "forward", interrupted)
    monkeypatch.setattr("sparse_runtime.ffn.plane_places._check_ffn", lambda layer: None)
    proof = Proof(LLAMA, "silu")
    monkeypatch.setattr("sparse_runtime.models.ffn_layers.prove", lambda *_: proof)
    with pytest.raises(KeyboardInterrupt):
        pack_calibrated(model, windows(), 6)
    assert not any(module._forward_pre_hooks for module in model.modules())
