"""Modules over weights in planes: what they compute, what they refuse, and the way back."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import IDS, assert_same_state, logits
from helpers import make_tiny_model_of as tiny
from torch import nn

from sparse_runtime import fast_linear
from sparse_runtime.errors import (
    ConfigError,
    ModelError,
    NothingMatchedError,
    SparseRuntimeError,
)
from sparse_runtime.ffn.plane_modules import PlaneFFN, PlaneLinear
from sparse_runtime.ffn.plane_packing import pack_model, unpack_model
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.kernels.rounding import InputStatistics, round_down, round_rows
from sparse_runtime.models.ffn_layers import find_ffn_layers

BITS = (3, 4, 5, 6, 8)
# Up to eight tokens kernels round the inputs, too.
FEW, MANY = {"rtol": 1e-3, "atol": 1e-3}, {"rtol": 1e-4, "atol": 1e-5}
TOKENS = [(2, FEW), (9, MANY)]


def rounded(weight, bits):
    return round_rows(weight.detach(), PlaneFormat.of_bits(bits)).values().to(weight.dtype)


def with_rounded_weights(model, bits, linears=None):
    """A float model whose weights are replaced by the packed values, by hand."""
    result = copy.deepcopy(model)
    ffns = find_ffn_layers(result)
    with torch.no_grad():
        for layer in ffns:
            for linear in (layer.gate, layer.up):
                linear.weight.copy_(rounded(linear.weight, bits))
            layer.down.weight.copy_(rounded(layer.down.weight.T, bits).T)
        if linears is not None:
            inside = {id(m) for layer in ffns for m in layer.mlp.modules()}
            for module in list(result.modules()):
                if isinstance(module, nn.Linear) and id(module) not in inside:
                    module.weight = nn.Parameter(rounded(module.weight, linears))
    return result


class TestLinear:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("tokens", "tolerance"), TOKENS)
    def test_computes_what_its_float_layer_does(self, bits, bias, tokens, tolerance):
        torch.manual_seed(0)
        linear = nn.Linear(100, 37, bias=bias)
        packed = PlaneLinear.from_linear(linear, PlaneFormat.of_bits(bits))
        x = torch.randn(1, tokens, 100)
        with torch.no_grad():
            expected = packed.to_linear()(x)
            assert expected.abs().mean() > 0.1
            torch.testing.assert_close(packed(x), expected, **tolerance)
            assert torch.equal(packed.to_linear().weight, rounded(linear.weight, bits))
            assert (packed.to_linear().bias is None) != bias

    def test_says_what_it_is(self):
        packed = PlaneLinear.from_linear(nn.Linear(64, 8, bias=False), PlaneFormat.of_bits(6))
        assert repr(packed) == "PlaneLinear(in_features=64, out_features=8, 6 bits (4 + 2))"
        packed = PlaneLinear.from_linear(nn.Linear(64, 8), PlaneFormat.of_bits(4))
        assert repr(packed) == "PlaneLinear(in_features=64, out_features=8, bias=True, 4 bits)"
        assert not packed.planes.requires_grad
        assert packed.planes.shape == (8, PlaneFormat.of_bits(4).linear_size(64))

    def test_casting_leaves_the_planes(self):
        packed = PlaneLinear.from_linear(nn.Linear(64, 8), PlaneFormat.of_bits(6))
        planes = packed.planes.clone()
        for cast, dtype in (
            (lambda m: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m: m.half(), torch.float16),
            (lambda m: m.float(), torch.float32),
        ):
            assert cast(packed) is packed
            assert packed.dtype == packed.bias.dtype == packed.to_linear().weight.dtype == dtype
            assert torch.equal(packed.planes, planes)
            with torch.no_grad():
                assert packed(torch.randn(1, 64, dtype=dtype)).dtype == dtype

    def test_statistics_count(self):
        torch.manual_seed(0)
        linear, form = nn.Linear(64, 32, bias=False), PlaneFormat.of_bits(4)
        counts = torch.ones(64)
        counts[:4] = 100
        plain = PlaneLinear.from_linear(linear, form).to_linear().weight
        by_them = InputStatistics.of(counts)
        counted = PlaneLinear.from_linear(linear, form, by_them).to_linear().weight
        errors = [(w - linear.weight).square()[:, :4].sum() for w in (plain, counted)]
        assert errors[1] < errors[0]

    def test_inference_only(self):
        packed = PlaneLinear.from_linear(nn.Linear(64, 8), PlaneFormat.of_bits(6))
        with pytest.raises(SparseRuntimeError, match=r"PlaneLinear is for inference.*no_grad"):
            packed(torch.randn(1, 64, requires_grad=True))
        with pytest.raises(ConfigError, match=r"inputs.*\[1, 60\]; expected \[\.\.\., 64\]"):
            packed(torch.randn(1, 60))

    def test_a_float_state_dict_is_refused(self):
        packed = PlaneLinear.from_linear(nn.Linear(64, 8), PlaneFormat.of_bits(6))
        state = packed.state_dict() | {"planes": packed.planes.float()}
        with pytest.raises(ModelError, match=r"planes is torch\.float32.*expected torch\.uint8"):
            packed.load_state_dict(state)

    def test_autocast(self):
        packed = PlaneLinear.from_linear(nn.Linear(64, 8), PlaneFormat.of_bits(6))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert packed(torch.randn(1, 64)).dtype == torch.bfloat16


class TestFFN:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
    @pytest.mark.parametrize(("tokens", "tolerance"), TOKENS)
    def test_computes_what_its_float_module_does(self, bits, activation, tokens, tolerance):
        (layer, *_) = find_ffn_layers(tiny("llama", hidden_act=activation))
        packed = PlaneFFN.from_mlp(layer, PlaneFormat.of_bits(bits))
        restored = packed.to_float()
        assert type(restored) is type(layer.mlp)
        assert restored.config is layer.mlp.config
        assert list(restored.state_dict()) == list(layer.mlp.state_dict())
        x = torch.randn(tokens, 1, 32)
        with torch.no_grad():
            expected = restored(x)
            assert expected.abs().mean() > 0.01
            torch.testing.assert_close(packed(x), expected, **tolerance)
            assert torch.equal(restored.up_proj.weight, rounded(layer.up.weight, bits))
            assert torch.equal(restored.down_proj.weight, rounded(layer.down.weight.T, bits).T)

    def test_state_dict(self):
        (layer, *_) = find_ffn_layers(tiny())
        with_residual = PlaneFFN.from_mlp(layer, PlaneFormat.of_bits(6))
        assert list(with_residual.state_dict()) == ["look", "count", "refine"]
        without = PlaneFFN.from_mlp(layer, PlaneFormat.of_bits(4))
        assert list(without.state_dict()) == ["look", "count"]
        assert without.planes.refine.shape == (44, 0)
        assert all(t.dtype == torch.uint8 for t in with_residual.state_dict().values())
        assert repr(with_residual) == (
            "PlaneFFN(hidden_size=32, intermediate_size=44, activation=silu, 6 bits (4 + 2))"
        )

    def test_the_original_keeps_its_projections(self):
        (layer, *_) = find_ffn_layers(tiny())
        before = {key: value.clone() for key, value in layer.mlp.state_dict().items()}
        PlaneFFN.from_mlp(layer, PlaneFormat.of_bits(6)).half().to_float()
        assert all(torch.equal(before[k], v) for k, v in layer.mlp.state_dict().items())

    def test_inference_only(self):
        packed = PlaneFFN.from_mlp(find_ffn_layers(tiny())[0], PlaneFormat.of_bits(6))
        with pytest.raises(SparseRuntimeError, match="PlaneFFN is for inference"):
            packed(torch.randn(1, 32, requires_grad=True))


class TestPackModel:
    @pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("linears", [None, 6])
    def test_generates_what_the_packed_values_generate(self, kind, tied, linears):
        model = tiny(kind, tie_word_embeddings=tied)
        expected = with_rounded_weights(model, 5, linears)
        difference = (logits(expected) - logits(model)).abs().max()
        assert pack_model(model, 5, linears=linears) is model
        ids = IDS.repeat(1, 2)
        torch.testing.assert_close(logits(model, ids), logits(expected, ids), **MANY)
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-2, atol=1e-2)
        assert difference > 0.1
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
        names = model.state_dict().keys()
        assert {f"model.layers.0.mlp.{s}" for s in ("look", "count", "refine")} <= names
        assert ("model.layers.2.self_attn.q_proj.planes" in names) == (linears is not None)
        assert ("lm_head.planes" in names) == (linears is not None)
        assert ("model.layers.2.self_attn.q_proj.bias" in names) == (kind == "qwen2")

    def test_a_tied_head_is_not_tied_again(self):
        model = tiny(tie_word_embeddings=True)
        embedding = model.model.embed_tokens.weight.clone()
        pack_model(model, 6, linears=8)
        before = logits(model)
        model.tie_weights()
        assert isinstance(model.lm_head, PlaneLinear)
        assert "lm_head.weight" not in model.state_dict()
        assert torch.equal(model.model.embed_tokens.weight, embedding)
        assert torch.equal(logits(model), before)

    def test_a_float_head_stays_tied(self):
        model = pack_model(tiny(tie_word_embeddings=True), 6)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings

    @pytest.mark.parametrize("tied", [False, True])
    def test_unpack(self, tied):
        model = tiny(tie_word_embeddings=tied)
        classes = {name: type(module) for name, module in model.named_modules()}
        expected = with_rounded_weights(model, 6, 8)
        pack_model(model, 6, linears=8)
        assert unpack_model(model) is model
        assert_same_state(model, expected)
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert torch.equal(logits(model), logits(expected))
        assert not hasattr(model.config, "quantization_config")
        assert not hasattr(model, "hf_quantizer")
        assert all(p.requires_grad for p in model.model.layers.parameters())
        with pytest.raises(NothingMatchedError, match="pack_model"):
            unpack_model(model)

    def test_copies(self):
        model = pack_model(tiny(), 6, linears=5)
        expected = logits(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_state(twin, model)
            assert torch.equal(logits(twin), expected)
            assert type(unpack_model(twin).model.layers[0].mlp).__name__ == "MistralMLP"
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = pack_model(tiny(initializer_range=0.1), 6, linears=5)
        assert not torch.equal(logits(other), expected)
        other.load_state_dict(torch.load(buffer))
        assert torch.equal(logits(other), expected)

    def test_casting(self):
        model = pack_model(tiny("qwen2"), 6, linears=8)
        planes = {k: v.clone() for k, v in model.state_dict().items() if v.dtype == torch.uint8}
        for cast, dtype in (
            (lambda m: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m: m.half(), torch.float16),
            (lambda m: m.float(), torch.float32),
        ):
            cast(model)
            state = model.state_dict()
            assert all(torch.equal(state[key], value) for key, value in planes.items())
            assert model.model.layers[0].self_attn.q_proj.bias.dtype == model.dtype == dtype
            assert model.model.layers[0].mlp.to_float().up_proj.weight.dtype == dtype
            assert logits(model).dtype == dtype

    def test_modules_to_not_convert(self):
        leave = ["layers.0", "lm_head", "v_proj", "layers.1.mlp.down_proj"]
        model = pack_model(tiny(), 6, linears=8, modules_to_not_convert=leave)
        packed = {
            name
            for name, module in model.named_modules()
            if isinstance(module, PlaneFFN | PlaneLinear)
        }
        attention = {f"model.layers.{i}.self_attn.{p}_proj" for i in (1, 2) for p in "qko"}
        assert packed == attention | {"model.layers.2.mlp"}
        with pytest.raises(NothingMatchedError, match=r"'layers\.7'.*no module"):
            pack_model(tiny(), modules_to_not_convert=["layers.7"])
        with pytest.raises(NothingMatchedError, match="nothing"):
            pack_model(tiny(), modules_to_not_convert=["model"])

    def test_statistics(self):
        counts = torch.ones(32)
        counts[0] = 1000
        model, plain = tiny(), pack_model(tiny(), 4, linears=6)
        attention = [f"self_attn.{part}_proj" for part in "qkvo"]
        names = [f"model.layers.{i}.{name}" for i in range(3) for name in (*attention, "mlp")]
        layer = model.model.layers[1].mlp

        class Given:
            def __init__(self):
                self.taken = []

            def expect(self, inputs):
                assert list(inputs) == [*names, "lm_head"]
                assert inputs[names[9]] == (layer, layer.down_proj)
                assert inputs["lm_head"] == (model.lm_head,)

            def take(self, name):
                for before in self.taken:
                    assert isinstance(model.get_submodule(before), PlaneFFN | PlaneLinear)
                assert not isinstance(model.get_submodule(name), PlaneFFN | PlaneLinear)
                self.taken.append(name)
                return [InputStatistics.of(counts.clone())] if name == names[9] else []

        given = Given()
        assert pack_model(model, 4, linears=6, statistics=given) is model
        assert given.taken == [*names, "lm_head"]
        a, b = plain.state_dict(), model.state_dict()
        assert [key for key in a if not torch.equal(a[key], b[key])] == [f"{names[9]}.look"]

    def test_statistics_of_other_inputs_are_refused(self):
        linear, statistics = nn.Linear(64, 8), InputStatistics.of(torch.ones(32))
        with pytest.raises(ConfigError, match=r"statistics are of 32 inputs; expected 64"):
            PlaneLinear.from_linear(linear, PlaneFormat.of_bits(4), statistics)
        layer = find_ffn_layers(tiny())[0]
        with pytest.raises(ConfigError, match=r"statistics are of 32 inputs; expected 44"):
            PlaneFFN.from_mlp(layer, PlaneFormat.of_bits(4), statistics, statistics)

    def test_down_is_compensated_over_all_neurons(self, monkeypatch):
        monkeypatch.setattr("sparse_runtime.ffn.plane_modules._BLOCK_ROWS", 16)
        (layer, *_) = find_ffn_layers(tiny())
        h = torch.randn(200, 44) @ torch.randn(44, 44)
        statistics = InputStatistics.of(h.T @ h / 200)
        form = PlaneFormat.of_bits(4)
        packed = PlaneFFN.from_mlp(layer, form, None, statistics)
        down_t = layer.down.weight.detach().T
        expected = round_down(down_t, form, statistics).values()
        assert torch.equal(packed.to_float().down_proj.weight.T, expected)
        assert not torch.equal(expected, round_rows(down_t, form).values())
        assert torch.equal(packed.look, PlaneFFN.from_mlp(layer, form).look)

    def test_formats(self):
        assert_same_state(pack_model(tiny(), PlaneFormat(4, 2)), pack_model(tiny(), 6))
        for bits, linears in (
            (2, None),
            (6, 9),
            (True, None),
            ("6", None),
            (PlaneFormat(3, 3), None),
        ):
            with pytest.raises(ConfigError, match=r"bits|linears"):
                pack_model(tiny(), bits, linears=linears)

    def test_after_fast_linear(self):
        model = pack_model(fast_linear(tiny()), 6, linears=8)
        assert_same_state(model, pack_model(tiny(), 6, linears=8))
        assert type(unpack_model(model).lm_head) is nn.Linear

    def test_compiles_as_one_graph(self):
        model = pack_model(tiny(), 6, linears=8)
        layer = model.model.layers[0].mlp
        x = torch.randn(1, 3, 32)
        with torch.no_grad():
            compiled = torch.compile(layer, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), layer(x))


MEMORY = """
import gc, resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
import sparse_runtime
from sparse_runtime.ffn.plane_packing import pack_model
def now():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def model(**sizes):
    config = LlamaConfig(num_attention_heads=4, vocab_size=64, **sizes)
    return LlamaForCausalLM(config)
pack_model(model(hidden_size=64, intermediate_size=64, num_hidden_layers=1), 6, linears=8)
base = now()
made = model(hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
gc.collect()
floats, before = now() - base, peak()
pack_model(made, 6, linears=8)
gc.collect()
print(base, floats, peak() - before, now() - base, sum(p.nbytes for p in made.parameters()) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_falls_along():
    """A model of 240 MB in float32, whose FFNs have 35 MB each."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    _, floats, peak, packed, size = map(float, result.stdout.split())
    assert floats > 200
    assert peak < 40, result.stdout
    assert packed < size + 60, result.stdout
