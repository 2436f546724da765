"""Dense formats: their values against packing by hand, their bits, and a float model left as it was."""

import builtins
import copy

import pytest
import torch
from helpers import assert_same_state, logits, make_tiny_model

from sparse_runtime.clusters.calibrated_packing import pack_calibrated
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.baselines import dense_formats
from sparse_runtime.eval.baselines.dense_formats import (
    DENSE_BITS,
    FORMATS,
    GGUF_NAMES,
    DensePlanes,
    GgufBlocks,
    stored_in_four_bits,
)
from sparse_runtime.eval.baselines.registry import BASELINES, named_baselines
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.kernels.rounding import InputStatistics, round_rows

IDS = torch.randint(0, 250, (128,), generator=torch.Generator().manual_seed(0))
WINDOWS = torch.randint(0, 250, (16, 32), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def model():
    """Whole groups of 64 and whole blocks of 32."""
    return make_tiny_model(**SIZES)


def names_of(*names):
    return [form.name for form in named_baselines(names)[1]]


class TestNames:
    def test_groups(self):
        assert names_of("dense") == [f"dense-{bits}" for bits in DENSE_BITS]
        assert names_of("dense-gptq") == [f"dense-{bits}-gptq" for bits in DENSE_BITS]
        assert names_of("gguf") == ["q8_0", "q5_0", "q4_0"]
        assert names_of("dense-4", "dense", "dense-3-mse") == [
            "dense-4", "dense-8", "dense-6", "dense-5", "dense-3", "dense-3-mse",
        ]  # fmt: skip
        methods, formats = named_baselines(["teal", "q4_0", "teal"])
        assert [method.name for method in methods] == ["teal"]
        assert [form.name for form in formats] == ["q4_0"]

    def test_all_is_every_method_and_all_formats_but_those_of_mean_squares(self):
        methods, formats = named_baselines(["all"])
        assert [method.name for method in methods] == list(BASELINES)
        assert {form.name for form in formats} == {n for n in FORMATS if not n.endswith("-mse")}

    @pytest.mark.parametrize("name", ["dense-7", "dense-6-awq", "q6_k", "dense6", ""])
    def test_others_are_refused(self, name):
        with pytest.raises(ConfigError, match=f"baseline is '{name}'; expected all, or some of"):
            named_baselines(["teal", name])

    def test_other_roundings_are_refused(self):
        with pytest.raises(
            ConfigError, match="rounding is 'awq'; expected one of plain, mse, gptq"
        ):
            DensePlanes(6, "awq")
        with pytest.raises(ConfigError, match="weights of 9 bits"):
            DensePlanes(9)

    def test_without_gguf(self, monkeypatch, model):
        real = builtins.__import__

        def without(name, *arguments, **options):
            if name.partition(".")[0] == "gguf":
                raise ImportError("No module named 'gguf'")
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ConfigError, match=r"q5_0 is written by the package gguf.*pip install"):
            named_baselines(["q5_0"])
        # Asked for by nobody in particular, they are left out, with the reason.
        _, formats = named_baselines(["all"])
        reasons = {form.name: form.obstacle(model) for form in formats}
        assert "cannot be imported" in reasons["q8_0"]
        assert reasons["dense-8"] is None


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("dense-8", 8.25),
        ("dense-6", 6.25),
        ("dense-5-mse", 5.25),
        ("dense-4-gptq", 4.25),
        ("dense-3", 3.25),
        ("q8_0", 8.5),
        ("q5_0", 5.5),
        ("q4_0", 4.5),
    ],
)
def test_bits_that_are_read(model, name, bits):
    if name in GGUF_NAMES:
        pytest.importorskip("gguf")
    assert FORMATS[name].bits_per_weight(model) == bits
    # A group of 64 holds 32 weights of the other model.
    if name not in GGUF_NAMES:
        assert FORMATS[name].bits_per_weight(make_tiny_model()) == pytest.approx(2 * bits)


@pytest.mark.parametrize("rounding", ["plain", "mse", "gptq"])
def test_planes_are_those_of_packing(model, rounding):
    before = copy.deepcopy(model)
    if rounding == "plain":
        expected = logits(pack_model(copy.deepcopy(model), 4))
    else:
        expected = logits(
            pack_calibrated(copy.deepcopy(model), WINDOWS, 4, compensate=rounding == "gptq")
        )
    floats = logits(model)
    with DensePlanes(4, rounding).stored(model, WINDOWS) as stored:
        assert torch.equal(logits(stored), expected)
        # What is not packed is there once.
        assert stored.lm_head.weight is model.lm_head.weight
        assert stored.model.layers[0].self_attn.q_proj.weight.data_ptr() == (
            model.model.layers[0].self_attn.q_proj.weight.data_ptr()
        )
        assert torch.equal(logits(model), floats)
    assert not torch.equal(expected, floats)
    assert_same_state(model, before)
    assert torch.equal(logits(model), floats)


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_blocks_are_those_of_the_package(model, name):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    by_hand, before = copy.deepcopy(model), copy.deepcopy(model)
    for layer in by_hand.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            data = gguf.quants.quantize(linear.weight.detach().numpy(), kind)
            linear.weight.data = torch.from_numpy(gguf.quants.dequantize(data, kind))
    floats = logits(model)
    with GgufBlocks(name).stored(model, None) as stored:
        found = logits(stored)
    assert torch.equal(found, logits(by_hand))
    assert not torch.equal(found, floats)
    assert torch.equal(logits(model), floats)
    assert_same_state(model, before)


@pytest.mark.parametrize("name", ["dense-6", "dense-5-mse", "dense-4-gptq", "q4_0"])
def test_the_model_is_what_it_was_after_an_exception(model, name):
    if name in GGUF_NAMES:
        pytest.importorskip("gguf")
    before, floats = copy.deepcopy(model), logits(model)

    class Interrupted(Exception):
        pass

    def interrupted():
        with FORMATS[name].stored(model, WINDOWS) as stored:
            assert not torch.equal(logits(stored), floats)
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert_same_state(model, before)
    assert torch.equal(logits(model), floats)
    assert type(model.model.layers[0].mlp) is type(before.model.layers[0].mlp)
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert vars(model.config).keys() == vars(before.config).keys()


def test_packing_that_fails_half_way_leaves_the_model(model, monkeypatch):
    before, floats = copy.deepcopy(model), logits(model)

    def fails(model, *arguments, **options):
        pack_model(model, *arguments)
        raise MemoryError

    monkeypatch.setattr(dense_formats, "pack_model", fails)
    with pytest.raises(MemoryError), DensePlanes(6).stored(model, None):
        pass
    assert_same_state(model, before)
    assert torch.equal(logits(model), floats)


def test_text_is_asked_for(model):
    with (
        pytest.raises(ConfigError, match="dense-4-gptq is fitted on text, and there is none"),
        FORMATS["dense-4-gptq"].stored(model, None),
    ):
        pass


def test_distances_order_formats(model):
    """More bits are nearer; so are roundings that know the inputs, on inputs that go together."""
    # Inputs of one layer after another are correlated: a rank of 6 of 64.
    basis = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    coordinates = torch.randn(260, 6, generator=torch.Generator().manual_seed(3))
    model.model.embed_tokens.weight.data = coordinates @ basis
    reference = score_text(model, IDS, window=32, keep=True)

    def kl(name):
        with FORMATS[name].stored(model, WINDOWS) as stored:
            return score_text(stored, IDS, window=32, reference=reference).kl

    plain = [kl(f"dense-{bits}") for bits in DENSE_BITS]
    assert plain == sorted(plain)
    assert 0 < 20 * plain[0] < plain[3]
    for bits, of_plain in zip(DENSE_BITS[2:], plain[2:], strict=True):
        assert kl(f"dense-{bits}-gptq") < of_plain
    if pytest.importorskip("gguf"):
        gguf = [kl(name) for name in GGUF_NAMES]
        assert gguf == sorted(gguf)
        assert gguf[0] > 0


def test_a_single_row_of_float32_is_not_written_to():
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    round_rows(weight, PlaneFormat(3), InputStatistics.of(x.T @ x / 256))
    assert torch.equal(weight, before)


def test_weights_out_of_four_bits_are_known(model, tiny_model):
    gguf = pytest.importorskip("gguf")
    assert not stored_in_four_bits(model)
    assert not stored_in_four_bits(tiny_model)
    layer = model.model.layers[0].mlp
    layer.gate_proj.weight.data = layer.gate_proj.weight.data.bfloat16().float()
    assert not stored_in_four_bits(model)
    for name, expected in (("Q5_0", False), ("Q4_1", True)):
        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quants.quantize(layer.gate_proj.weight.detach().numpy(), kind)
        weight = torch.from_numpy(gguf.quants.dequantize(data, kind))
        layer.gate_proj.weight.data = weight
        assert stored_in_four_bits(model) == expected
    assert stored_in_four_bits(model.bfloat16())
    layer.gate_proj.weight.data.zero_()
    assert not stored_in_four_bits(model)
