"""Tell models apart: the sizes of their FFNs, and FFN weights sampled all over."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_runtime.errors import ModelError
from sparse_runtime.models.experts import ExpertRows
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.onloading import onloaded

#: Weights sampled of each gate, up and down matrix: one from each of so many equal bands of rows and
#: of columns. A change in a share p of a matrix's weights is missed with probability (1 - p)^64:
#: 5e-20 for every other column, 0.23 for one row of 44, 0.996 for one row of 14,336.
SAMPLES_PER_MATRIX = 64
# Shuffles the bands of columns against those of rows; odd, so it shares no factor with 64.
_COLUMN_STEP = 27
# A checkpoint's weight w reaches us rounded to bfloat16 (8 significant bits: at most 2^-8 of |w| off),
# to float16 (2^-11 of |w|; 2^-25 below its normal range, twice where it was float16 on the way, too),
# or to both. Two such roundings differ by no more than twice that.
_ROUNDING = 2**-8 + 2**-11
_RELATIVE_TOLERANCE = 2 * _ROUNDING / (1 - _ROUNDING)
_ABSOLUTE_TOLERANCE = 4 * 2**-25
# Of a packed model every so many of them are kept: of 32 layers 1,536, or 4 KB in its config.json.
_KEPT_STEP = 4
# Format 1: evenly spaced in the flattened matrix, hashed.
_SAMPLES_IN_FORMAT_1 = 256


_KEPT_FIELD = "quantization_config.fingerprint of the model's config.json"
_KEPT_REMEDY = "Download or pack the model again, or put null there: clusters are not compared then"


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Fingerprint a model by its FFN architecture and a sample of its FFN weights.

    Returns:
        As JSON: ``model_type``, ``hidden_size`` (H), ``activation``, ``layers`` (the index of each
        FFN), ``intermediate_sizes`` (the I of each) and ``weights``: the samples as base64 of
        little-endian bfloat16, by layer, then gate, up (if there is one), down.

    Raises:
        ModelError: weights are on the meta device, and nobody knows where else.
        UnsupportedArchitectureError, NothingMatchedError: the model holds no supported FFN.
    """
    layers = find_ffn_layers(model)
    samples = []
    for first, layer in zip(first_matrices(layers), layers, strict=False):
        with onloaded(layer.holder):
            matrices = _matrices([layer])
            assert matrices is not None, "float weights, and in memory"
            samples += [_sampled(matrix, number) for number, matrix in enumerate(matrices, first)]
    return {**structure(model, layers), "weights": _encoded(torch.stack(samples))}


def fingerprint_mismatch(
    model: nn.Module, expected: dict[str, Any], *, weights: bool = True
) -> str | None:
    """Say in what a model differs from a fingerprint.

    Weights may differ by what loading one checkpoint in bfloat16, float16 and float32 makes of it:
    0.9 % of a value. Of a fine-tune that moved each matrix by 0.1 % of its norm, every value is beyond
    that with a probability of 7 %, so it is told apart; scaling all weights by less than 0.9 % is not.

    Args:
        model: a dense causal language model, in float or packed.
        expected: as :func:`model_fingerprint` gives it, or with ``weights_sha256`` in place of
            ``weights``, as an artifact of format 1 has it.
        weights: also compare the weights, where neither side lacks them: offloaded and int8 ones are
            not compared. For packed ones stand samples of the floats (:func:`kept_fingerprint`).

    Returns:
        What is found and what was expected; None if nothing differs.

    Raises:
        UnsupportedArchitectureError, NothingMatchedError: the model holds no supported FFN.
    """
    layers = find_ffn_layers(model, packed=True, int8=True)
    found = structure(model, layers)
    for name in ("model_type", "hidden_size", "activation"):
        if found[name] != expected[name]:
            return f"{name} is {found[name]!r} in this model, {expected[name]!r} in the artifact"
    if found["layers"] != expected["layers"]:
        return (
            f"this model has {_listed(found['layers'])}, the artifact was built for "
            f"{_listed(expected['layers'])}"
        )
    sizes = zip(
        found["layers"], found["intermediate_sizes"], expected["intermediate_sizes"], strict=True
    )
    for index, size, expected_size in sizes:
        if size != expected_size:
            return (
                f"intermediate_size of layer {index} is {size} in this model, {expected_size} in the "
                "artifact"
            )
    return _weight_mismatch(model, layers, expected) if weights else None


def decode_weights(text: str, columns: int = SAMPLES_PER_MATRIX) -> Tensor:
    """Samples [matrices, columns] bfloat16 of a fingerprint's ``weights``.

    Raises:
        ValueError: not base64, or not a whole number of matrices.
    """
    values = np.frombuffer(base64.b64decode(text, validate=True), "<i2").astype(np.int16)
    return torch.from_numpy(values.reshape(-1, columns)).view(torch.bfloat16)


def first_matrices(layers: Sequence[FFNLayer]) -> list[int]:
    """Of each FFN of a model, how many matrices those before it have; and of all at the end."""
    return [0, *accumulate(layer.form.matrices + 1 for layer in layers)]


def kept_samples(first: int, *matrices: Tensor | ExpertRows) -> Tensor:
    """Samples of an FFN that is about to be packed, for :func:`kept_fingerprint`.

    Args:
        first: of its matrices, as of :func:`first_matrices`.
        matrices: gate, up (if there is one) [I, H] and down [H, I], float.

    Returns:
        [matrices, 16] bfloat16.
    """
    numbered = enumerate(matrices, first)
    return torch.stack([_sampled(matrix, number)[::_KEPT_STEP] for number, matrix in numbered])


def kept_fingerprint(
    layers: Sequence[FFNLayer], taken: Mapping[str, Tensor] | None = None
) -> str | None:
    """What a packed model keeps of its float weights, to be told apart by: a base64 text.

    Args:
        layers: all of the model's.
        taken: samples of some of them by name, taken before they were packed; the others are float.

    Returns:
        :func:`kept_samples` of all layers; None where some cannot be read.
    """
    taken = taken or {}
    rows = []
    for first, layer in zip(first_matrices(layers), layers, strict=False):
        samples = taken.get(layer.name)
        if samples is None:
            matrices = _matrices([layer])
            if matrices is None:
                return None
            samples = kept_samples(first, *matrices)
        rows.append(samples)
    return _encoded(torch.cat(rows))


def structure(model: nn.Module, layers: Sequence[FFNLayer]) -> dict[str, Any]:
    """What a fingerprint says beside weights."""
    return {
        "model_type": model.config.model_type,  # type: ignore[union-attr]
        "hidden_size": layers[0].hidden_size,
        "activation": layers[0].activation,
        "layers": [layer.index for layer in layers],
        "intermediate_sizes": [layer.intermediate_size for layer in layers],
    }


def _listed(indices: Sequence[int]) -> str:
    if not indices:
        return "no FFN layers"
    return f"{len(indices)} FFN layers ({indices[0]} to {indices[-1]})"


def _matrices(layers: Sequence[FFNLayer]) -> list[Tensor | ExpertRows] | None:
    if any(layer.packed or layer.int8 for layer in layers):
        return None
    matrices = [
        linear if isinstance(linear, ExpertRows) else linear.weight.detach()
        for layer in layers
        for linear in (layer.gate, layer.up, layer.down)
        if linear is not None
    ]
    return None if any(matrix.device.type == "meta" for matrix in matrices) else matrices


def _weight_mismatch(
    model: nn.Module, layers: Sequence[FFNLayer], expected: dict[str, Any]
) -> str | None:
    if expected.get("weights_sha256") is not None:
        digest = _weights_sha256(layers)
        if digest in (None, expected["weights_sha256"]):
            return None
        return "the sampled FFN weights have another sha256 than the artifact says"
    packed = any(layer.packed for layer in layers)
    samples = _kept(model, first_matrices(layers)[-1]) if packed else _samples(layers)
    if samples is None or expected.get("weights") is None:
        return None
    stored = decode_weights(expected["weights"])
    if packed:
        stored = stored[:, ::_KEPT_STEP]
    if stored.shape != samples.shape:
        return f"the artifact samples {len(stored)} matrices, this model has {len(samples)}"
    same = torch.isclose(
        samples.float(),
        stored.float(),
        rtol=_RELATIVE_TOLERANCE,
        atol=_ABSOLUTE_TOLERANCE,
        equal_nan=True,
    )
    if same.all():
        return None
    position = int((~same).any(-1).nonzero()[0])
    names = ("gate", "up", "down") if layers[0].form.matrices == 2 else ("up", "down")
    number, part = divmod(position, len(names))
    matrix = f"{names[part]} projection of layer {layers[number].index}"
    return (
        f"{int((~same).sum())} of {same.numel()} sampled FFN weights differ by more than rounding "
        f"does, the first in the {matrix}"
    )


def _samples(layers: Sequence[FFNLayer]) -> Tensor | None:
    """Sampled weights [matrices, 64] bfloat16, None where some are offloaded."""
    matrices = _matrices(layers)
    if matrices is None:
        return None
    return torch.stack([_sampled(matrix, number) for number, matrix in enumerate(matrices)])


def _sampled(matrix: Tensor | ExpertRows, number: int) -> Tensor:
    """Samples [64] bfloat16 of the matrix of a number."""
    index = torch.tensor(_positions(*_shape(matrix), seed=number), device=matrix.device)
    return _values(matrix, *index).to(torch.bfloat16).cpu()


def _shape(matrix: Tensor | ExpertRows) -> tuple[int, int]:
    if isinstance(matrix, ExpertRows):
        return matrix.out_features, matrix.in_features
    return matrix.shape[0], matrix.shape[1]


def _values(matrix: Tensor | ExpertRows, rows: Tensor, columns: Tensor) -> Tensor:
    if isinstance(matrix, ExpertRows):
        return matrix.at(rows, columns)
    return matrix.detach()[rows, columns]


def _encoded(samples: Tensor) -> str:
    raw = samples.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    return base64.b64encode(raw).decode("ascii")


def _kept(model: nn.Module, matrices: int) -> Tensor | None:
    """What a packed model says of its float weights [matrices, 16] bfloat16; None if nothing."""
    config = getattr(model.config, "quantization_config", None)
    text = getattr(config, "fingerprint", None)
    if text is None:
        return None
    try:
        samples = decode_weights(text, SAMPLES_PER_MATRIX // _KEPT_STEP)
    except ValueError as error:
        raise ModelError(
            f"{_KEPT_FIELD} is no base64 of samples ({error}). {_KEPT_REMEDY}"
        ) from error
    if len(samples) != matrices:
        raise ModelError(
            f"{_KEPT_FIELD} samples {len(samples)} matrices; expected {matrices}. {_KEPT_REMEDY}"
        )
    return samples


def _positions(rows: int, columns: int, *, seed: int) -> tuple[list[int], list[int]]:
    # Of the generators at hand, only this one's random() is promised to stay the same for a seed.
    uniform = random.Random(seed).random
    count = SAMPLES_PER_MATRIX

    def spread(size: int, bands: Sequence[int]) -> list[int]:
        return [min(int((band + uniform()) * size / count), size - 1) for band in bands]

    return (
        spread(rows, range(count)),
        spread(columns, [_COLUMN_STEP * band % count for band in range(count)]),
    )


def _weights_sha256(layers: Sequence[FFNLayer]) -> str | None:
    """The rule of format 1, which for many shapes samples one column only."""
    matrices = _matrices(layers)
    if matrices is None:
        return None
    digest = hashlib.sha256()
    for matrix in matrices:
        rows, columns = _shape(matrix)
        count = min(_SAMPLES_IN_FORMAT_1, rows * columns)
        flat = torch.arange(count, device=matrix.device) * (rows * columns // count)
        values = _values(matrix, flat // columns, flat % columns)
        digest.update(values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
