"""What ``sparsify`` and ``fast_linear`` pack, alone and together, and the way back."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from helpers import IDS, assert_same_state, logits, needs_library, random_cluster_set
from helpers import make_tiny_model_of as tiny
from torch import nn
from transformers import AutoModelForCausalLM

from sparse_runtime import (
    PlaneConfig,
    SparseConfig,
    cost_report,
    dense,
    fast_linear,
    slow_linear,
    sparse_modules,
    sparsify,
    unsparsify,
)
from sparse_runtime.errors import (
    BackendUnavailableError,
    NothingMatchedError,
    UnsupportedArchitectureError,
)
from sparse_runtime.ffn.plane_modules import PlaneFFN, PlaneLinear
from sparse_runtime.ffn.plane_packing import pack_model, unpack_model
from sparse_runtime.kernels import backends
from sparse_runtime.kernels.linear import FastLinear

pytestmark = needs_library


@pytest.fixture
def clusters():
    return random_cluster_set(tiny(), 0.5)


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def quietly(call, *args):
    """A call that warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args)


class TestKeepFloat:
    @pytest.mark.parametrize("kind", ["mistral", "qwen2"])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(
        "options",
        [
            {"weights": 4},
            {"weights": 5, "linear_weights": 6},
            {"linear_weights": 6},
            {"weights": 4, "fast_linear": True},
            {"weights": 4, "linear_weights": 6, "fast_linear": True},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_gives_back_the_original(self, kind, tied, options):
        model = tiny(kind, tie_word_embeddings=tied)
        clusters = random_cluster_set(model, 0.5)
        before = copy.deepcopy(model)
        modules, expected = list(model.named_modules()), logits(model)
        pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
        sparsify(model, clusters, keep_float=True, prefill="sparse", **options)
        assert (logits(model) - expected).abs().max() > 1e-3
        assert count(model, PlaneFFN) == (3 if "weights" in options else 0)
        assert count(model, PlaneLinear) == (13 if "linear_weights" in options else 0)
        assert not any("float" in name for name in model.state_dict())
        quietly(unsparsify, model)
        assert_same_state(model, before)
        assert torch.equal(logits(model), expected)
        assert list(model.named_modules()) == modules
        assert model.config.to_dict() == before.config.to_dict()
        assert not hasattr(model, "hf_quantizer")
        if "weights" in options:  # nothing was copied
            assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.all_tied_weights_keys == before.all_tied_weights_keys

    def test_saving_it_afterwards(self, tmp_path):
        model = tiny(tie_word_embeddings=True)
        expected = copy.deepcopy(model)
        clusters = random_cluster_set(model, 0.5)
        unsparsify(sparsify(model, clusters, weights=6, linear_weights=8, keep_float=True))
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), expected)

    def test_a_copy_gives_back_its_own(self, clusters):
        model, expected = tiny(), tiny()
        sparsify(model, clusters, weights=4, linear_weights=6, keep_float=True)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            quietly(unsparsify, twin)
            assert_same_state(twin, expected)
            with torch.no_grad():
                twin.model.layers[0].mlp.up_proj.weight.zero_()
        quietly(unsparsify, model)
        assert_same_state(model, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_cast_meanwhile(self, clusters, dtype):
        model = sparsify(tiny(), clusters, weights=4, linear_weights=6, keep_float=True).to(dtype)
        unsparsify(model)
        assert_same_state(model, tiny().to(dtype))

    def test_twice(self, clusters):
        model = tiny()
        for bits in (4, 6):
            sparsify(model, clusters, weights=bits, keep_float=True)
            assert model.model.layers[0].mlp.format.bits == bits
            quietly(unsparsify, model)
        assert_same_state(model, tiny())

    def test_offload_is_refused(self, clusters):
        model = tiny()
        model.model.layers[1].mlp.to("meta")
        names = [name for name, _ in model.named_modules()]
        with (
            pytest.raises(
                UnsupportedArchitectureError, match=r"layers\.1\.mlp\.gate_proj.*offloaded"
            ),
            pytest.warns(UserWarning, match="stay dense"),
        ):
            sparsify(model, clusters, weights=6, keep_float=True)
        assert [name for name, _ in model.named_modules()] == names

    def test_packed_models_have_nothing_to_keep(self, clusters):
        model = pack_model(tiny(), 6)
        with pytest.raises(UnsupportedArchitectureError, match="no float weights to keep"):
            sparsify(model, clusters, weights=6, keep_float=True)
        assert not any(name.endswith("sparse_ffn") for name, _ in model.named_modules())

    def test_a_backend_that_cannot_run_leaves_all_as_it_was(self, clusters, monkeypatch):
        monkeypatch.setattr(backends, "load_cpu_library", lambda: False)
        model = tiny()
        with pytest.raises(BackendUnavailableError, match="cannot run"):
            sparsify(model, clusters, weights=6, linear_weights=6, strict=True)
        assert_same_state(model, tiny())


class TestLinearWeightsAlone:
    @pytest.mark.parametrize("tied", [False, True])
    def test_float_ffns_run_sparse(self, tied):
        model = tiny(tie_word_embeddings=tied)
        clusters = random_cluster_set(model, 0.5)
        floats = unpack_model(pack_model(tiny(tie_word_embeddings=tied), None, linears=6))
        expected = sparsify(floats, clusters, prefill="sparse")
        sparsify(model, clusters, linear_weights=6, prefill="sparse")
        assert count(model, PlaneLinear) == 13
        assert count(model, PlaneFFN) == 0
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-2, atol=1e-2)
        assert cost_report(model).dense_tokens == 0
        with pytest.warns(UserWarning, match="floats of the packed values"):
            unsparsify(model)
        assert_same_state(model, unsparsify(expected))

    def test_saved_while_sparse(self, clusters, tmp_path):
        model = sparsify(tiny(), clusters, linear_weights=6)
        model.save_pretrained(tmp_path)
        assert_same_state(
            AutoModelForCausalLM.from_pretrained(tmp_path), pack_model(tiny(), None, linears=6)
        )


class TestFastLinear:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("bits", [4, 6, 8])
    def test_packs_attention_and_head(self, tied, bits):
        model = tiny(tie_word_embeddings=tied)
        embedding = model.model.embed_tokens.weight.clone()
        assert fast_linear(model, bits=bits) is model
        assert count(model, PlaneLinear) == 13
        assert {m.format.bits for m in model.modules() if isinstance(m, PlaneLinear)} == {bits}
        assert count(model, FastLinear) == 9  # of the dense FFNs
        expected = pack_model(tiny(tie_word_embeddings=tied), None, linears=bits)
        assert_same_state(model, expected)
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
        model.tie_weights()
        assert torch.equal(model.model.embed_tokens.weight, embedding)
        assert isinstance(model.lm_head, PlaneLinear)
        with pytest.warns(UserWarning, match="floats of the packed values"):
            slow_linear(model)
        assert_same_state(model, unpack_model(expected))
        assert count(model, FastLinear) == 0
        assert not hasattr(model.config, "quantization_config")

    def test_round_trip_through_a_folder(self, tmp_path):
        model = fast_linear(tiny(), bits=6)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same_state(loaded, model)
        # What was loaded packed is no work of fast_linear.
        quietly(slow_linear, fast_linear(loaded, bits=6))
        assert_same_state(loaded, model)

    @pytest.mark.parametrize("first", ["fast_linear", "sparsify"])
    @pytest.mark.parametrize("options", [{}, {"weights": 4}, {"weights": 4, "linear_weights": 6}])
    def test_with_sparsify_nothing_is_packed_twice(self, clusters, first, options, tmp_path):
        model = tiny()
        steps = [
            lambda: fast_linear(model, bits=6),
            lambda: sparsify(model, clusters, prefill="sparse", **options),
        ]
        for step in steps if first == "fast_linear" else reversed(steps):
            step()
        expected = sparsify(tiny(), clusters, prefill="sparse", **(options | {"linear_weights": 6}))
        assert_same_state(model, expected)
        assert torch.equal(logits(model), logits(expected))
        assert len(sparse_modules(model)) == 3
        model.save_pretrained(tmp_path)
        assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), expected)

    def test_each_undoes_its_own(self, clusters):
        model = fast_linear(sparsify(tiny(), clusters, weights=4), bits=6)
        with pytest.warns(UserWarning, match="floats of the packed values"):
            unsparsify(model)
        assert (count(model, PlaneFFN), count(model, PlaneLinear)) == (0, 13)
        config = model.config.quantization_config
        assert (config.bits, config.linear_bits) == (None, 6)
        sparsify(model, clusters, weights=4, keep_float=True, check_fingerprint=False)
        with pytest.warns(UserWarning, match="floats of the packed values"):
            slow_linear(model)
        assert (count(model, PlaneFFN), count(model, PlaneLinear)) == (3, 0)
        assert (config.bits, model.config.quantization_config.bits) == (None, 4)
        quietly(unsparsify, model)
        expected = unpack_model(pack_model(tiny(), 4, linears=6))
        assert_same_state(model, expected)

    def test_what_was_left_in_float_is_named_when_both_are_merged(self, tmp_path):
        model = pack_model(tiny(), 4, modules_to_not_convert=["layers.0"])
        pack_model(model, None, linears=6, modules_to_not_convert=["lm_head"])
        assert model.config.quantization_config.modules_to_not_convert == [
            "model.layers.0.mlp",
            "lm_head",
        ]
        model.save_pretrained(tmp_path)
        assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    def test_other_bits_than_there_are(self, clusters):
        model = sparsify(tiny(), clusters, linear_weights=6)
        with pytest.raises(UnsupportedArchitectureError, match="packed already, in 6 bits"):
            fast_linear(model, bits=8)
        model = fast_linear(tiny(), bits=6)
        with pytest.raises(UnsupportedArchitectureError, match="packed already, in 6 bits"):
            sparsify(model, clusters, weights=4, linear_weights=8)
        assert count(model, PlaneFFN) == 0

    def test_bits_out_of_range(self):
        with pytest.raises(ValueError, match="linear_bits is 2"):
            fast_linear(tiny(), bits=2)
        with pytest.raises(UnsupportedArchitectureError, match="has no config with a model_type"):
            fast_linear(nn.Linear(4, 4), bits=6)
        with pytest.raises(NothingMatchedError, match=r"no plain nn\.Linear"):
            fast_linear(nn.LayerNorm(4))


def test_the_packed_bits_asked_for_again(clusters):
    model = pack_model(tiny(), 6, linears=8)
    expected = copy.deepcopy(model)
    sparsify(model, clusters, config=SparseConfig(weights=6, linear_weights=8))
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3).shape == (1, 9)
    with dense(model):
        assert torch.equal(logits(model), logits(expected))
    quietly(unsparsify, model)
    assert_same_state(model, expected)
    assert model.config.quantization_config.to_dict() == PlaneConfig(6, 8).to_dict() | {
        "fingerprint": model.config.quantization_config.fingerprint
    }
