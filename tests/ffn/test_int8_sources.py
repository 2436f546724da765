"""Models of int8 rows with scales, as torchao and bitsandbytes make them, packed into planes.

Stand-ins have the packages' names and attributes; where a package is installed it runs itself.
"""

import json

import pytest
import torch
from helpers import assert_same_state, logits, needs_library, random_cluster_set
from helpers import make_tiny_model_of as tiny
from torch import nn
from transformers import AutoModelForCausalLM

from sparse_runtime import cost_report, fast_linear, sparsify
from sparse_runtime.errors import FingerprintMismatchError, ModelError, UnsupportedArchitectureError
from sparse_runtime.ffn.plane_modules import PlaneFFN, PlaneLinear
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.models.int8_linears import float_linear, int8_problem, is_int8


class Int8Tensor(torch.Tensor):
    """torchao's, as far as its attributes go."""

    @staticmethod
    def __new__(cls, qdata, scale, block_size, dtype, zero_point=None, act_pre_scale=None):
        result = torch.Tensor._make_wrapper_subclass(
            cls, qdata.shape, dtype=dtype, device=qdata.device
        )
        result.qdata, result.scale, result.block_size = qdata, scale, block_size
        result.zero_point, result.act_pre_scale = zero_point, act_pre_scale
        return result

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            own = args[0]
            return cls(own.qdata, own.scale, own.block_size, own.dtype, own.zero_point)
        raise NotImplementedError(function)


class State:
    """bitsandbytes' MatmulLtState."""

    SCB = None


class Linear8bitLt(nn.Linear):
    """bitsandbytes', as far as its attributes go."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}SCB"] = self.weight.SCB
        destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)


def to_torchao(linear, columns=None, zero_point=False):
    """A linear layer with an Int8Tensor of one scale for each row, or each block of columns."""
    weight = linear.weight.detach().float()
    blocks = weight.view(len(weight), -1, columns or weight.shape[1])
    scale = blocks.abs().amax(-1) / 127
    shift = torch.full(scale.shape, 3 if zero_point else 0)
    codes = (blocks / scale[..., None]).round() * 0.9 + shift[..., None]
    codes = codes.round().clamp(-128, 127).to(torch.int8).view(weight.shape)
    tensor = Int8Tensor(
        codes, scale, [1, blocks.shape[2]], linear.weight.dtype, shift.to(torch.int8)
    )
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    expected = (codes.float().view(blocks.shape) - shift[..., None]) * scale[..., None]
    return expected.view(weight.shape).to(linear.weight.dtype)


def to_bitsandbytes(linear, in_state=False):
    """A Linear8bitLt in place of a linear layer."""
    dtype = linear.weight.dtype
    weight = linear.weight.detach().float()
    largest = weight.abs().amax(-1)
    codes = (weight * (127 / largest)[:, None]).round().to(torch.int8)
    linear.__class__, linear.state = Linear8bitLt, State()
    linear.weight = nn.Parameter(codes, requires_grad=False)
    linear.weight.SCB = None if in_state else largest
    linear.state.SCB = largest if in_state else None
    return (codes.float() * (largest / 127)[:, None]).to(dtype)


def quantized(how, model, linears=True):
    """A model whose FFNs (and attention) are int8, and the float model of its values."""
    expected = type(model)(model.config).eval().to(model.dtype)
    expected.load_state_dict(model.state_dict())
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head" and (linears or ".mlp." in name):
            values = how(module)
            with torch.no_grad():
                expected.get_submodule(name).weight.copy_(values)
    return model, expected


BOTH = pytest.mark.parametrize("how", [to_torchao, to_bitsandbytes])


class TestFloatLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("how", "options"),
        [
            (to_torchao, {}),
            (to_torchao, {"columns": 16}),
            (to_torchao, {"zero_point": True}),
            (to_bitsandbytes, {}),
            (to_bitsandbytes, {"in_state": True}),
        ],
    )
    def test_has_the_values(self, how, options, dtype):
        torch.manual_seed(0)
        linear = nn.Linear(48, 20).to(dtype)
        weight, bias = linear.weight.detach().clone(), linear.bias
        expected = how(linear, **options)
        assert (expected - weight).abs().max() < 0.2 * weight.abs().max()
        assert is_int8(linear)
        assert int8_problem(linear) is None
        floats = float_linear(linear, dtype)
        assert type(floats) is nn.Linear
        assert torch.equal(floats.weight, expected)
        assert floats.bias is bias

    def test_plain_layers_are_not_int8(self):
        assert not is_int8(nn.Linear(4, 4))
        assert not is_int8(nn.LayerNorm(4))
        assert not is_int8(nn.ReLU())


@BOTH
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_gives_what_packing_its_values_gives(how, kind, tied, dtype):
    biases = {"mlp_bias": True} if kind == "llama" else {}
    model, expected = quantized(how, tiny(kind, tie_word_embeddings=tied, **biases).to(dtype))
    pack_model(model, 8, linears=8)
    assert_same_state(model, pack_model(expected, 8, linears=8))
    assert torch.equal(logits(model), logits(expected))
    assert model.model.layers[0].mlp.dtype == dtype


@BOTH
def test_the_config_of_the_other_method_is_gone(how, tmp_path):
    model, _ = quantized(how, tiny())
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model.is_loaded_in_8bit = True
    pack_model(model, 6, linears=8).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (fields["quant_method"], fields["bits"], fields["fingerprint"]) == ("planes", 6, None)
    assert not hasattr(model, "is_loaded_in_8bit")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@needs_library
@BOTH
def test_sparsify(how):
    clusters = random_cluster_set(tiny(), 0.5)
    model, expected = quantized(how, tiny())
    names = [name for name, _ in model.named_modules()]
    refusals = {
        "sparsify.…, weights=8.*load the model unquantized": {},
        r"self_attn\.q_proj is int8 and would stay so": {"weights": 8},
        "keep_float keeps float weights, and .* is int8": {
            "weights": 8,
            "linear_weights": 8,
            "keep_float": True,
        },
    }
    for words, options in refusals.items():
        with pytest.raises(UnsupportedArchitectureError, match=words):
            sparsify(model, clusters, **options)
        assert [name for name, _ in model.named_modules()] == names
    options = {"weights": 6, "linear_weights": 8, "prefill": "sparse"}
    sparsify(model, clusters, **options)
    sparsify(expected, clusters, check_fingerprint=False, **options)
    assert torch.equal(logits(model), logits(expected))
    assert cost_report(model).dense_tokens == 0


@BOTH
def test_ffns_alone_may_be_int8(how):
    model, expected = quantized(how, tiny(), linears=False)
    pack_model(model, 5)
    assert_same_state(model, pack_model(expected, 5))
    model, _ = quantized(how, tiny(), linears=False)
    with pytest.raises(UnsupportedArchitectureError, match=r"gate_proj is int8 and would stay so"):
        fast_linear(model, bits=6)
    assert sum(isinstance(m, PlaneFFN | PlaneLinear) for m in model.modules()) == 0


@needs_library
@BOTH
def test_structure_is_compared(how):
    clusters = random_cluster_set(tiny(intermediate_size=48), 0.5)
    with pytest.raises(FingerprintMismatchError, match="intermediate_size"):
        sparsify(quantized(how, tiny())[0], clusters, weights=8, linear_weights=8)


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.k_proj"])
@pytest.mark.parametrize(
    ("how", "spoil", "words"),
    [
        (to_torchao, lambda w: setattr(w, "act_pre_scale", torch.ones(1)), "act_pre_scale"),
        (
            to_torchao,
            lambda w: setattr(w, "qdata", w.qdata[None]),
            r"Int8Tensor of torch\.int8 \[1,",
        ),
        (to_bitsandbytes, lambda w: setattr(w, "SCB", None), "Linear8bitLt without SCB"),
        (
            to_bitsandbytes,
            lambda w: setattr(w, "data", w.data.half()),
            "is torch.float16; expected int8",
        ),
    ],
)
def test_what_cannot_be_read_is_named(name, how, spoil, words):
    model, _ = quantized(how, tiny())
    weight = model.model.layers[1].get_submodule(name).weight
    spoil(weight.data if how is to_torchao and hasattr(weight.data, "qdata") else weight)
    if how is to_torchao:  # a Parameter may be another object than its data
        spoil(weight)
    with pytest.raises(UnsupportedArchitectureError, match=rf"layers\.1\..*{words}"):
        pack_model(model, 8, linears=8)


def test_scales_that_are_not_numbers():
    model, _ = quantized(to_bitsandbytes, tiny())
    model.model.layers[1].mlp.up_proj.weight.SCB[3] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        pack_model(model, 8, linears=8)


@pytest.mark.parametrize(
    ("name", "module"), [("Linear4bit", "bitsandbytes.nn"), ("WQLinear_GEMM", "awq.modules")]
)
def test_other_packed_layers_are_refused_by_name(name, module):
    other = type(name, (nn.Linear,), {"__module__": module})
    for place, options in (("mlp.up_proj", {}), ("self_attn.k_proj", {"linears": 8})):
        model = tiny()
        model.model.layers[1].get_submodule(place).__class__ = other
        with pytest.raises(UnsupportedArchitectureError, match=rf"{module}\.{name}"):
            pack_model(model, 8, **options)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int8])
def test_codes_without_scales_are_refused(dtype):
    model = tiny()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(
        UnsupportedArchitectureError, match=rf"has {dtype} weights|{str(dtype)[6:]}"
    ):
        pack_model(model, 8)


class TestTheRealThing:
    """Where the packages are installed, as they are not for these tests."""

    @pytest.mark.parametrize(
        "kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
    )
    def test_torchao(self, kind, tmp_path):
        quantization = pytest.importorskip("torchao.quantization")
        model = tiny()
        quantization.quantize_(model, getattr(quantization, kind)())
        self.agrees(model, tmp_path, lambda linear: linear.weight.dequantize())

    def test_torchao_int4_is_refused(self):
        quantization = pytest.importorskip("torchao.quantization")
        model = tiny(hidden_size=64, intermediate_size=96)
        try:
            quantization.quantize_(model, quantization.Int4WeightOnlyConfig(group_size=32))
        except Exception as error:
            pytest.skip(f"this torchao has no int4 here ({error})")
        with pytest.raises(UnsupportedArchitectureError, match="Int4"):
            pack_model(model, 8, linears=8)

    def test_bitsandbytes(self, tmp_path):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        model = tiny()
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                parent, _, attribute = name.rpartition(".")
                rounded = bitsandbytes.nn.Linear8bitLt(
                    module.in_features, module.out_features, bias=False, has_fp16_weights=False
                )
                rounded.load_state_dict(module.state_dict())
                setattr(model.get_submodule(parent), attribute, rounded.to("cpu"))
        dequantized = bitsandbytes.functional.int8_vectorwise_dequant
        self.agrees(
            model, tmp_path, lambda linear: dequantized(linear.weight.data, linear.weight.SCB)
        )

    def agrees(self, model, folder, dequantize):
        expected = tiny()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and is_int8(module):
                values = dequantize(module)
                torch.testing.assert_close(float_linear(module, torch.float32).weight, values)
                with torch.no_grad():
                    expected.get_submodule(name).weight.copy_(
                        float_linear(module, torch.float32).weight
                    )
        assert (
            expected.model.layers[0].mlp.up_proj.weight - tiny().model.layers[0].mlp.up_proj.weight
        ).abs().max() > 0
        ids = torch.arange(60)[None] % 200
        close = logits(model, ids)
        pack_model(model, 8, linears=8)
        assert_same_state(model, pack_model(expected, 8, linears=8))
        assert (logits(model, ids) - close).abs().mean() < 0.05 * close.abs().mean()
        model.save_pretrained(folder)
        assert_same_state(AutoModelForCausalLM.from_pretrained(folder), model)
