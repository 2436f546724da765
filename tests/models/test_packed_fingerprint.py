"""Identity of a packed model: by samples of the float weights that it was packed from."""

import base64
import json
import warnings

import pytest
import torch
from helpers import make_tiny_model_of as tiny
from helpers import needs_library, random_cluster_set
from transformers import AutoModelForCausalLM

from sparse_runtime import PlaneConfig, sparsify, unsparsify
from sparse_runtime.errors import ConfigError, FingerprintMismatchError, ModelError
from sparse_runtime.ffn.plane_packing import pack_model, unpack_model
from sparse_runtime.models.fingerprint import fingerprint_mismatch, model_fingerprint


def other(relative=None):
    """Another model of the same shape; with ``relative`` a fine-tune of the tiny one."""
    if relative is None:
        return tiny(initializer_range=0.1)
    model = tiny()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.weight += torch.randn_like(linear.weight) * linear.weight.std() * relative
    return model


def packed(how, model, folder, bits=3, leave=()):
    """A model packed in one of the ways there are."""
    if how == "pack_model":
        return pack_model(model, bits, linears=8, modules_to_not_convert=leave)
    model.save_pretrained(folder / "float", max_shard_size="20KB")
    config = PlaneConfig(bits, 8, list(leave))
    loaded = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
    if how == "while loading":
        return loaded
    loaded.save_pretrained(folder / "packed")
    return AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.bfloat16)


WAYS = ("pack_model", "while loading", "saved and loaded")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("leave", [(), ("layers.1",)])
def test_clusters_of_the_model_it_was_packed_from(how, leave, tmp_path):
    model = packed(how, tiny(), tmp_path, leave=leave)
    assert model.config.quantization_config.fingerprint is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fingerprint_mismatch(model, model_fingerprint(tiny().to(dtype))) is None


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("relative", [None, 1e-2])
def test_clusters_of_another_model_of_the_same_shape(how, relative, tmp_path):
    model = packed(how, tiny(), tmp_path)
    expected = model_fingerprint(other(relative))
    found = fingerprint_mismatch(model, expected)
    assert "of 144 sampled FFN weights differ by more than rounding" in found
    assert fingerprint_mismatch(model, expected, weights=False) is None


def test_one_changed_layer_is_named():
    model = tiny()
    fingerprint = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    found = fingerprint_mismatch(pack_model(model, 6), fingerprint)
    assert "16 of 144 sampled" in found
    assert "up projection of layer 1" in found


@needs_library
def test_sparsify_refuses_and_accepts():
    clusters = random_cluster_set(tiny(), 0.5)
    with pytest.raises(FingerprintMismatchError, match="built for another model"):
        sparsify(pack_model(other(), 6), clusters)
    sparsify(pack_model(other(), 6), clusters, check_fingerprint=False)
    model = sparsify(pack_model(tiny(), 6), clusters)
    unsparsify(model)
    sparsify(model, clusters, linear_weights=8)  # packed later than the FFNs
    assert fingerprint_mismatch(model, clusters.fingerprint) is None


def test_floats_of_the_packed_values_are_another_model():
    model = unpack_model(pack_model(tiny(), 3))
    assert "differ" in fingerprint_mismatch(model, model_fingerprint(tiny()))


def test_folders_without_samples_are_compared_by_structure(tmp_path):
    packed("saved and loaded", tiny(), tmp_path)
    config = edited(tmp_path, fingerprint=None)
    assert config["quantization_config"]["fingerprint"] is None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert fingerprint_mismatch(model, model_fingerprint(other())) is None
    assert fingerprint_mismatch(model, model_fingerprint(tiny(hidden_size=40))) is not None


@pytest.mark.parametrize("text", ["!", "AA==", base64.b64encode(bytes(32)).decode()])
def test_damaged_samples_are_named(tmp_path, text):
    packed("saved and loaded", tiny(), tmp_path)
    edited(tmp_path, fingerprint=text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(
        ModelError, match=r"quantization_config\.fingerprint .*pack the model again"
    ):
        fingerprint_mismatch(model, model_fingerprint(tiny()))


def test_samples_that_are_no_text(tmp_path):
    packed("saved and loaded", tiny(), tmp_path)
    edited(tmp_path, fingerprint=[1])
    with pytest.raises(ConfigError, match=r"fingerprint is \[1\]; expected a string"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def edited(folder, **fields):
    file = folder / "packed" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= fields
    file.write_text(json.dumps(config))
    return config


def test_samples_take_16_values_of_a_matrix():
    text = pack_model(tiny(), 6).config.quantization_config.fingerprint
    assert len(base64.b64decode(text)) == 3 * 3 * 16 * 2
    assert pack_model(tiny(), None, linears=6).config.quantization_config.fingerprint is None


@needs_library
@pytest.mark.parametrize("tuned", [4, 6, None])
def test_clusters_tuned_for_other_bits_say_so(tuned):
    clusters = random_cluster_set(tiny(), 0.5)
    clusters.build["config"] = {"weights": tuned}
    if tuned == 4:
        with pytest.warns(UserWarning, match="tuned for weights of 4 bits, and the FFNs have 6"):
            sparsify(pack_model(tiny(), 6), clusters)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparsify(pack_model(tiny(), 6), clusters)
