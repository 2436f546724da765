"""Identity of a model: what rounding makes of a checkpoint is the same model, all else another."""

import base64
import hashlib
import re

import pytest
import torch
from helpers import make_tiny_model

from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import (
    SAMPLES_PER_MATRIX,
    _positions,
    fingerprint_mismatch,
    model_fingerprint,
)

# Where 256 evenly spaced samples of the flattened matrix fall into one column: 256 · 32 = 16 · 512.
ONE_COLUMN = {"hidden_size": 32, "intermediate_size": 512, "num_hidden_layers": 2}
ROLES = ("gate_proj", "up_proj", "down_proj")


def matrices(model):
    return [getattr(layer.mlp, role) for layer in model.model.layers for role in ROLES]


def noticed(change, **fields):
    """Whether a change of a model's matrices in turn is noticed, for each of them."""
    model = make_tiny_model(**fields)
    fingerprint = model_fingerprint(model)
    results = []
    for linear in matrices(model):
        original = linear.weight.detach().clone()
        with torch.no_grad():
            change(linear.weight)
        results.append(fingerprint_mismatch(model, fingerprint) is not None)
        with torch.no_grad():
            linear.weight.copy_(original)
        assert fingerprint_mismatch(model, fingerprint) is None
    return results


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("fields", [{}, ONE_COLUMN], ids=["tiny", "one column"])
def test_every_other_row_or_column_of_any_matrix_is_noticed(first, dim, fields):
    """Missed with a probability of 2^-64 each."""

    def change(weight):
        weight[(slice(None),) * dim + (slice(first, None, 2),)] *= 1.05

    assert all(noticed(change, **fields))


@pytest.mark.parametrize("dim", [0, 1])
def test_single_rows_and_columns_are_noticed_at_the_stated_probability(dim):
    """1 - (1 - 1/n)^64: over 48 rows or columns of 6 matrices, within four standard deviations."""
    model = make_tiny_model(hidden_size=48, intermediate_size=48, num_hidden_layers=2)
    fingerprint = model_fingerprint(model)
    results = []
    for linear in matrices(model):
        for line in range(48):
            part = linear.weight.data.select(dim, line)
            original = part.clone()
            part.neg_()
            results.append(fingerprint_mismatch(model, fingerprint) is not None)
            part.copy_(original)
    expected = 1 - (1 - 1 / 48) ** SAMPLES_PER_MATRIX
    deviation = (expected * (1 - expected) / len(results)) ** 0.5
    # Bands make the samples more even than chance: more is noticed, not less.
    assert sum(results) / len(results) > expected - 4 * deviation


def test_matrices_are_sampled_at_places_of_their_own():
    """A neuron changed in gate and up of two layers: 1 - (1 - 64/200)^4 = 0.79 of 200, not 0.32."""
    model = make_tiny_model(intermediate_size=200, num_hidden_layers=2)
    fingerprint = model_fingerprint(model)
    weights = [linear.weight.data for linear in matrices(model) if linear.out_features == 200]
    results = []
    for row in range(200):
        for weight in weights:
            weight[row].neg_()
        results.append(fingerprint_mismatch(model, fingerprint) is not None)
        for weight in weights:
            weight[row].neg_()
    assert 0.65 < sum(results) / len(results) < 0.95


@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (44, 32), (3, 5), (1, 1)])
def test_samples_are_spread_over_rows_and_columns(shape):
    rows, columns = _positions(*shape, seed=7)
    assert len(rows) == len(columns) == 64
    assert len(set(zip(rows, columns, strict=True))) >= min(64, shape[0] * shape[1]) * 0.4
    for positions, size in ((rows, shape[0]), (columns, shape[1])):
        assert min(positions) >= 0
        assert max(positions) < size
        assert len({64 * position // size for position in positions}) >= min(64, 0.9 * size)
        if size >= 64:
            assert 20 < sum(position % 2 for position in positions) < 44
    if min(shape) >= 64:  # independent of each other
        pairs = torch.tensor([rows, columns]).double()
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.35
        assert _positions(*shape, seed=8) != (rows, columns)


@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("built", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("checkpoint", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["usual", "below float16's normal range"])
def test_a_checkpoint_is_one_model_in_any_dtype(checkpoint, built, loaded, scale):
    model = make_tiny_model()
    with torch.no_grad():
        for linear in matrices(model):
            linear.weight.mul_(scale)
    state = {name: tensor.to(checkpoint) for name, tensor in model.state_dict().items()}

    def load(dtype):
        model = make_tiny_model().to(dtype)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
        return model

    fingerprint = model_fingerprint(load(built))
    assert fingerprint_mismatch(load(loaded), fingerprint) is None
    # Converted once more on the way, as published copies are.
    assert fingerprint_mismatch(load(torch.float16).to(torch.bfloat16), fingerprint) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("relative", [1e-2, 1e-3])
def test_a_fine_tune_is_another_model(relative, dtype):
    model = make_tiny_model()
    fingerprint = model_fingerprint(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for linear in matrices(model):
            linear.weight += torch.randn_like(linear.weight) * linear.weight.std() * relative
    found = fingerprint_mismatch(model.to(dtype), fingerprint)
    assert "sampled FFN weights differ by more than rounding" in found
    assert fingerprint_mismatch(model, fingerprint, weights=False) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 40}, "hidden_size is 40 in this model, 32"),
        ({"intermediate_size": 46}, "intermediate_size of layer 0 is 46 in this model, 44"),
        ({"num_hidden_layers": 2}, r"this model has 2 FFN layers \(0 to 1\).*3 FFN layers"),
        ({"hidden_act": "gelu"}, "activation is 'gelu' in this model, 'silu'"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_structure_is_always_compared(tiny_model, fields, message, weights):
    fingerprint = model_fingerprint(tiny_model)
    other = make_tiny_model(**fields)
    assert re.search(message, fingerprint_mismatch(other, fingerprint, weights=weights))


def test_offloaded_weights_are_not_compared(tiny_model):
    fingerprint = model_fingerprint(tiny_model)
    tiny_model.model.layers[1].mlp.up_proj.to("meta")
    assert fingerprint_mismatch(tiny_model, fingerprint) is None
    del tiny_model.model.layers[2]
    assert "2 FFN layers" in fingerprint_mismatch(tiny_model, fingerprint)


def test_fingerprint_is_compact_and_the_same_everywhere(tiny_model):
    weights = model_fingerprint(tiny_model)["weights"]
    assert len(base64.b64decode(weights)) == 3 * 3 * 64 * 2
    # Positions must not depend on versions of Python, numpy or torch.
    rows, columns = _positions(14336, 4096, seed=5)
    digest = hashlib.sha256(repr((rows, columns)).encode()).hexdigest()
    assert digest[:16] == "4ca0c86dd5623d4a"


def test_weights_of_format_1_are_compared_by_its_rule(tiny_model):
    layers = find_ffn_layers(tiny_model)
    digest = hashlib.sha256()
    for layer in layers:
        for linear in (layer.gate, layer.up, layer.down):
            flat = linear.weight.detach().flatten()
            samples = flat[:: flat.numel() // 256][:256].bfloat16()
            digest.update(samples.view(torch.int16).numpy().tobytes())
    expected = model_fingerprint(tiny_model) | {
        "weights": None,
        "weights_sha256": digest.hexdigest(),
    }
    assert fingerprint_mismatch(tiny_model, expected) is None
    assert fingerprint_mismatch(tiny_model.bfloat16(), expected) is None
    layers[1].up.weight.data.mul_(1.5)
    assert "sha256" in fingerprint_mismatch(tiny_model, expected)
    assert fingerprint_mismatch(tiny_model, expected, weights=False) is None
