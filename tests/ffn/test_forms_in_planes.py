"""FFNs without a gate, with one matrix for gate and up, and with biases: packed, saved, made sparse."""

import copy

import pytest
import torch
from helpers import (
    IDS,
    assert_same_state,
    logits,
    make_tiny_model_of,
    needs_library,
    random_cluster_set,
)
from model_types import tiny_model_of_type
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from sparse_runtime import PlaneConfig, cost_report, dense, reset_cost, sparsify, unsparsify
from sparse_runtime.api import sparse_modules
from sparse_runtime.clusters.plane_layers import base_error
from sparse_runtime.errors import ModelError
from sparse_runtime.ffn.plane_modules import PlaneFFN
from sparse_runtime.ffn.plane_packing import pack_model, unpack_model
from sparse_runtime.kernels.reference import activations
from sparse_runtime.models.ffn_layers import find_ffn_layers

#: Plain with biases, gated with biases, fused, plain.
KINDS = ["starcoder2", "biased", "phi3", "arcee"]
BIASED = ["starcoder2", "biased", "fused biased"]


def tiny(kind):
    if kind == "biased":
        return make_tiny_model_of("llama", mlp_bias=True)
    model = tiny_model_of_type("phi3" if kind == "fused biased" else kind)
    if kind == "fused biased":
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                linear = getattr(layer.mlp, name)
                linear.bias = nn.Parameter(torch.randn(linear.out_features) * 0.2)
    return model


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def biases(model):
    """Of gate, up and down of each layer."""
    layers = find_ffn_layers(model, packed=True)
    return [bias for layer in layers for bias in (*layer.biases, layer.down_bias)]


def assert_same_biases(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("kind", [*KINDS, "fused biased"])
class TestPacked:
    def test_computes_what_its_values_do(self, kind, bits):
        floats = tiny(kind)
        expected = unpack_model(pack_model(tiny(kind), bits))
        model = pack_model(tiny(kind), bits)
        # The last bits' worth of rounding apart; few tokens by kernels, many by unpacked rows.
        assert (logits(expected) - logits(floats)).abs().max() > 0.05
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=2e-3)
        ids = IDS.repeat(1, 3)
        torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))

    def test_biases_stay_floats(self, kind, bits):
        floats = tiny(kind)
        model = pack_model(tiny(kind), bits)
        assert_same_biases(biases(model), biases(floats))
        form = find_ffn_layers(floats)[0].form
        names = {"look", "count"} | ({"refine"} if bits == 6 else set())
        if kind in BIASED:
            names |= {"gate_bias", "down_bias"}
            names |= {"up_bias"} if form.matrices == 2 else set()
        ffn = next(module for module in model.modules() if isinstance(module, PlaneFFN))
        assert ffn.state_dict().keys() == names
        # 44 neurons of one group of 64: a base and a residual plane, and a scale.
        assert ffn.look.shape == (44, 34 * form.matrices)
        assert bits == 4 or ffn.refine.shape == (44, 16 * (form.matrices + 1))
        unpacked = unpack_model(model)
        assert_same_biases(biases(unpacked), biases(floats))
        assert unpacked.state_dict().keys() == floats.state_dict().keys()
        assert all(p.requires_grad for p in unpacked.parameters())


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_while_loading_and_from_a_packed_folder(kind, bits, dtype, tmp_path):
    tiny(kind).save_pretrained(tmp_path / "float", max_shard_size="20KB")
    options = {"quantization_config": PlaneConfig(bits, None), "dtype": dtype}
    loaded = load(tmp_path / "float", **options)
    expected = pack_model(load(tmp_path / "float", dtype=dtype), bits)
    assert_same_state(loaded, expected)
    fingerprint = loaded.config.quantization_config.fingerprint
    assert fingerprint == expected.config.quantization_config.fingerprint is not None
    assert torch.equal(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "once", max_shard_size="20KB")
    again = load(tmp_path / "once")
    assert_same_state(again, loaded)
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(loaded))


def staged(layer, x, module):
    """What an FFN in planes computes of its clusters' candidates, all refined, in float64."""
    gate, up, down_t = (None if part is None else part.double() for part in layer.rows())
    h = activations(x.double(), gate, up, layer.activation, *layer.biases)
    ids = module.cluster_ids(x)
    sets = module.tables.active_sets[ids]
    chosen = (sets[..., None] >> torch.arange(8) & 1).flatten(1)[:, : h.shape[1]]
    output = (h * chosen) @ down_t
    if layer.down_bias is not None:
        output += layer.down_bias
    own = module._clusters.cluster_bias
    return output if own is None else output + own[ids].double()


@needs_library
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("cluster_bias", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "fused biased"])
class TestSparse:
    def test_candidates_alone(self, kind, cluster_bias, backend):
        """And the bias of down, once, beside the clusters' own."""
        if backend == "triton":
            triton_ffn = pytest.importorskip("sparse_runtime.kernels.triton.ffn")
            if not triton_ffn.INTERPRETED:
                pytest.skip("TRITON_INTERPRET was not set")
        model = tiny(kind)
        clusters = random_cluster_set(model, 0.5)
        for layer in clusters.layers.values():
            layer.cluster_bias = torch.randn(6, 32) if cluster_bias else None
        sparsify(model, clusters, weights=6, backend=backend, prefill="sparse", strict=True)
        layer, module = find_ffn_layers(model, packed=True)[1], list(sparse_modules(model))[1]
        x = torch.randn(5, 32)
        with torch.inference_mode():
            found, expected = layer.mlp(x), staged(layer, x, module)
            whole = module.all_rows(x)
            torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=2e-3)
            assert (whole - expected).abs().max() > 0.1
            with dense(model):
                assert torch.equal(layer.mlp(x), whole)
        packed = pack_model(tiny(kind), 6)
        with torch.inference_mode():
            own = find_ffn_layers(packed, packed=True)[1].mlp(x)
        torch.testing.assert_close(whole, own, rtol=1e-3, atol=2e-3)


@needs_library
@pytest.mark.parametrize("kind", BIASED)
def test_biases_that_are_written_to(kind):
    """What was copied of them is made anew, by a loaded state dict too."""
    model = tiny(kind)
    clusters = random_cluster_set(model, 0.5)
    sparsify(model, clusters, weights=6, prefill="sparse")
    before = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ffn = find_ffn_layers(model, packed=True)[0].mlp
    for name in ffn.own_biases():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            find_ffn_layers(changed, packed=True)[0].mlp.own_biases()[name][:7].add_(0.5)
        other = logits(changed)
        assert (other - before).abs().max() > 0.02, name
        changed.load_state_dict(state)
        assert torch.equal(logits(changed), before)
    model.half().float()
    assert (logits(model) - before).abs().max() < 0.05


@needs_library
def test_bytes_of_a_neuron_without_a_gate():
    model = tiny("starcoder2")
    sparsify(model, random_cluster_set(model, 0.5), weights=6)
    reset_cost(model)
    model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    report = cost_report(model)
    assert report.sparse_tokens == 2 * 2
    # One group of 64: look 34 bytes, count 34, refine 2 · 16; a router of rank 4 for 6 clusters, in
    # float32, and a bitmap of 6 bytes. 22 of 44 neurons are candidates, and refined.
    cost = next(iter(sparse_modules(model))).cost
    extras = 4 * cost.extra_elements + 6
    assert cost.dense_bytes == 44 * 2 * 32 * 4
    assert cost.whole_bytes == 44 * 100
    assert report.sparse_bytes / 4 == pytest.approx(22 * 100 + extras, rel=0.15)


@needs_library
def test_sparsify_and_back():
    model = tiny("starcoder2")
    clusters, before = random_cluster_set(model, 0.5), logits(model)
    sparsify(model, clusters, weights=6, keep_float=True)
    unsparsify(model)
    assert torch.equal(logits(model), before)
    assert_same_state(model, tiny("starcoder2"))


@pytest.mark.parametrize("kind", ["starcoder2", "biased"])
def test_the_error_of_base_planes_counts_biases(kind):
    """Large biases leave of gate's and up's errors what these are beside them."""
    errors = []
    for size in (0.0, 20.0):
        model = tiny(kind)
        layer = find_ffn_layers(model)[0]
        with torch.no_grad():
            for bias in layer.biases:
                if bias is not None:
                    bias.fill_(size)
        pack_model(model, 6)
        x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
        errors.append(base_error(find_ffn_layers(model, packed=True)[0], x, None))
    assert 0 < errors[1] < 0.8 * errors[0]


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        pack_model(tiny("starcoder2"), 6).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda t: t.pop("model.layers.1.mlp.gate_bias"),
             r"layers\.1\.mlp\.gate_bias is missing.*expected F16, BF16 or F32 \[44\]"),
            (lambda t: t.update({"model.layers.0.mlp.down_bias": torch.zeros(31)}),
             r"down_bias is F32 \[31\].*expected.*\[32\]"),
            (lambda t: t.update({"model.layers.0.mlp.down_bias": torch.zeros(32, dtype=torch.int8)}),
             r"down_bias is I8"),
            (lambda t: t.update({"model.layers.0.mlp.up_bias": torch.zeros(44)}),
             r"up_bias is F32 \[44\].*there is no such tensor"),
            (lambda t: t.update({"model.layers.0.mlp.look": torch.zeros(44, 26, dtype=torch.uint8)}),
             r"look is U8 \[44, 26\] \(the size for 3 or 5 bits\).*\[44, 34\]"),
        ],
    )  # fmt: skip
    def test_of_a_packed_folder(self, folder, change, text):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=text):
            load(folder)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "is missing in the checkpoint"),
            (torch.zeros(43), r"\[43\].*expected a float \[44\]"),
        ],
    )
    def test_of_a_float_checkpoint(self, tmp_path, value, text):
        model = tiny("starcoder2")
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        name = "model.layers.1.mlp.c_fc.bias"
        del state[name]
        if value is not None:
            state[name] = value
        model.save_pretrained(tmp_path, state_dict=state)
        with pytest.raises(ModelError, match=rf"c_fc\.bias.*{text}"):
            load(tmp_path, quantization_config=PlaneConfig())
