"""Checks of what is read from an artifact's folder, which may come from anybody."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_runtime.artifact.format import (
    CLUSTERS_FILE,
    CONFIG_FILE,
    CONFIG_KEYS,
    CONFIG_KEYS_4,
    FILE_KEYS,
    FILES,
    FINGERPRINT_KEYS,
    FINGERPRINT_KEYS_1,
    FORMAT,
    FORMAT_VERSION,
    LAYER_KEYS,
    OBJECT,
    SHA256,
    TENSORS,
    Kind,
    TensorKey,
    sizes_of,
    whole,
)
from sparse_runtime.artifact.measured import MeasuredCuts
from sparse_runtime.errors import ArtifactError, ArtifactVersionError
from sparse_runtime.files import finite
from sparse_runtime.models.fingerprint import decode_weights
from sparse_runtime.printable import printable, shown
from sparse_runtime.version import __version__

_REMEDY = "Build the artifact again, or download it again"


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a file must hold.

    Attributes:
        key: its row of the table.
        layer: index of its layer.
        shape: by the layer's sizes.
        intermediate_size: I of the layer.
    """

    key: TensorKey
    layer: int
    shape: tuple[int, ...]
    intermediate_size: int


def read_config(folder: Path) -> dict[str, Any]:
    """Read an artifact's ``config.json`` and check it; older formats are given in today's form.

    ``measured`` is a ``MeasuredCuts`` or None.

    Raises:
        ArtifactVersionError: written in a newer format.
        ArtifactError: not there, no JSON, or with a wrong key.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if isinstance(config, dict) and "build" in config:
            config["build"] = finite(config["build"])
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} is not a cluster artifact: it has no {CONFIG_FILE}. If a build was interrupted "
            "there, run the same build command again to finish it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{file} cannot be read as JSON: {printable(str(error))}. {_REMEDY}"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ArtifactError(
            f"{file}: key 'format' is {shown(found)}, expected {FORMAT!r}: this folder is something "
            "else than a cluster artifact"
        )
    version: Any = config.get("format_version")
    if not whole(1, FORMAT_VERSION).accepts(version):
        writer = config.get("library_version")
        raise ArtifactVersionError(
            f"{file}: key 'format_version' is {shown(version)}; this sparse_runtime {__version__} "
            f"reads 1 to {FORMAT_VERSION}. It was written by sparse_runtime "
            f"{printable(writer) if isinstance(writer, str) else '(unknown)'}: install that version "
            "or a newer one"
        )
    check_config(file, config)
    if version == 1:
        _note_version_1(folder)
        config["fingerprint"] = _from_version_1(config["fingerprint"])
    config["budget"] = float(config["budget"])
    if version <= 4:
        config["measured"] = MeasuredCuts.from_excess(float(config.pop("excess")))
    elif config["measured"] is not None:
        config["measured"] = MeasuredCuts.from_record(config["measured"])
    return config


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check every key of a ``config.json``.

    Raises:
        ArtifactError: a key is missing, is not expected or has a value that cannot be.
    """
    version = config["format_version"]
    _check_keys(file, config, CONFIG_KEYS_4 if version <= 4 else CONFIG_KEYS, "")
    fingerprint = config["fingerprint"]
    if version == 1:
        _check_keys(file, fingerprint, FINGERPRINT_KEYS_1, "fingerprint.")
        indices: Any = range(fingerprint["num_layers"])
    else:
        _check_fingerprint(file, fingerprint)
        indices = fingerprint["layers"]
    keys = {name: key.kind for name, key in LAYER_KEYS.items() if key.since <= version}
    seen: set[int] = set()
    for number, entry in enumerate(config["layers"]):
        where = f"layers[{number}]."
        _check_keys(file, entry, {"index": whole(0), **keys}, where)
        index = entry["index"]
        if index in seen:
            _refuse(file, f"{where}index", index, "each layer once")
        if index not in indices:
            _refuse(file, f"{where}index", index, "a layer that the fingerprint names")
        experts = entry.get("experts")
        if experts is not None:
            neurons = fingerprint["intermediate_sizes"][fingerprint["layers"].index(index)]
            if neurons % experts:
                expected = f"a number that {neurons} neurons can be shared out to"
                _refuse(file, f"{where}experts", experts, expected)
        seen.add(index)
    for name in config["files"]:
        if name not in FILES or name == CONFIG_FILE:
            _refuse(file, "files", name, f"names out of {', '.join(FILES[1:])}")
    _check_keys(file, config["files"], {CLUSTERS_FILE: OBJECT}, "files.", others=True)
    for name, record in config["files"].items():
        _check_keys(file, record, FILE_KEYS, f"files.{name}.")


def expected_tensors(config: Mapping[str, Any], name: str) -> dict[str, ExpectedTensor]:
    """What a file must hold.

    Args:
        config: checked, with a fingerprint of today's form.
        name: of the file.

    Returns:
        Key of the tensor -> what it must be.
    """
    fingerprint = config["fingerprint"]
    neurons = dict(zip(fingerprint["layers"], fingerprint["intermediate_sizes"], strict=True))
    expected = {}
    for entry in config["layers"]:
        index = entry["index"]
        sizes = sizes_of(entry, fingerprint["hidden_size"], neurons[index])
        for key in TENSORS:
            if key.file == name and (key.when is None or entry.get(key.when)):
                shape = tuple(sizes[letter] for letter in key.shape)
                expected[f"layers.{index}.{key.name}"] = ExpectedTensor(
                    key, index, shape, neurons[index]
                )
    return expected


def read_tensors(file: Path, expected: Mapping[str, ExpectedTensor]) -> dict[str, Tensor]:
    """Read a safetensors file and check keys, shapes, dtypes and values.

    Raises:
        ArtifactError: it is missing, damaged, or holds something else.
    """
    check_header(file, expected)
    with safe_open(file, framework="pt") as reader:
        tensors = {key: reader.get_tensor(key) for key in expected}
    check_values(file, tensors, expected)
    return tensors


def check_header(file: Path, expected: Mapping[str, ExpectedTensor]) -> None:
    """Check a safetensors file's keys, shapes and dtypes without reading its values.

    Raises:
        ArtifactError: it is missing, damaged, or holds something else.
    """
    if not file.is_file():
        raise ArtifactError(f"{file} is missing. {_REMEDY}")
    try:
        with safe_open(file, framework="pt") as reader:
            found = {key: reader.get_slice(key) for key in reader.keys()}  # noqa: SIM118
            shapes = {key: tuple(part.get_shape()) for key, part in found.items()}
            dtypes = {key: part.get_dtype() for key, part in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{file} is not a readable safetensors file, or is truncated: "
            f"{printable(str(error))}. {_REMEDY}"
        ) from error
    check_shapes(file, shapes, expected)
    _check_dtypes(file, dtypes, expected, _SAFETENSORS_NAMES)


def check_tensors(
    file: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, ExpectedTensor]
) -> None:
    """Check tensors that are to be written to a file as those of the file itself are checked.

    Raises:
        ArtifactError: a tensor is missing, not expected, or not what it must be.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    check_shapes(file, shapes, expected)
    _check_dtypes(file, dtypes, expected, {})
    check_values(file, tensors, expected)


def check_shapes(
    file: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, ExpectedTensor]
) -> None:
    """Check that all tensors are there and no others, in their shapes.

    Raises:
        ArtifactError: they are not.
    """
    missing, extra = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing:
        raise ArtifactError(
            f"{file}: key {missing[0]!r} is missing (one of {len(missing)}). {_REMEDY}"
        )
    if extra:
        raise ArtifactError(
            f"{file}: key {shown(extra[0])} is not expected (one of {len(extra)}). {_REMEDY}"
        )
    for name, tensor in expected.items():
        if shapes[name] != tensor.shape:
            raise ArtifactError(
                f"{file}: key {name!r} has shape {shapes[name]}, expected {tensor.shape}. {_REMEDY}"
            )


def check_values(
    file: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, ExpectedTensor]
) -> None:
    """Check that numbers are finite and in range, and that bitmaps name neurons there are.

    Raises:
        ArtifactError: they are not.
    """
    for name, tensor in tensors.items():
        key, neurons = expected[name].key, expected[name].intermediate_size
        if tensor.is_floating_point():
            if not tensor.isfinite().all():
                _refuse_values(file, name, "NaN or infinity", "finite numbers")
            if tensor.numel() and tensor.min() < key.least:
                _refuse_values(file, name, f"{tensor.min().item():g}", f"{key.least:g} or more")
        elif neurons % 8 and (tensor[..., -1] & (0xFF << neurons % 8 & 0xFF)).any():
            _refuse_values(file, name, f"a neuron index ≥ {neurons}", "indices below it")
        if key.name == "maybe_sets":
            sure = tensors[name.replace("maybe_sets", "active_sets")]
            if (tensor & sure).any():
                _refuse_values(file, name, "neurons of active_sets too", "each neuron in one band")


def file_record(file: Path) -> dict[str, Any]:
    """Size and hash of a file, as ``config.json`` keeps them.

    Raises:
        ArtifactError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error}. {_REMEDY}") from error


def check_record(file: Path, config: Mapping[str, Any]) -> None:
    """Check that a file is the one that ``config.json`` was written with.

    Raises:
        ArtifactError: it is another.
    """
    found, expected = file_record(file), config["files"][file.name]
    for key in FILE_KEYS:
        if found[key] != expected[key]:
            raise ArtifactError(
                f"{file} does not belong to {CONFIG_FILE}: key 'files.{file.name}.{key}' is "
                f"{expected[key]!r}, but the file's is {found[key]!r}. A write was interrupted or the "
                "file was changed; build the artifact again"
            )


_SAFETENSORS_NAMES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {shown(twice)} is there twice")
    return mapping


@cache
def _note_version_1(folder: Path) -> None:
    warn(
        f"{folder} is an artifact of format 1, which tells models apart by few of their weights. Write "
        f"it with save_pretrained to have format {FORMAT_VERSION}; build it again for its new "
        "fingerprint",
        stacklevel=4,
    )


def _from_version_1(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    count, digest = fingerprint["num_layers"], fingerprint["weights_sha256"]
    return {
        "model_type": fingerprint["model_type"],
        "hidden_size": fingerprint["hidden_size"],
        "activation": fingerprint["activation"],
        "layers": list(range(count)),
        "intermediate_sizes": [fingerprint["intermediate_size"]] * count,
        "weights": None,
        **({"weights_sha256": digest} if digest is not None else {}),
    }


def _check_fingerprint(file: Path, fingerprint: dict[str, Any]) -> None:
    keys = dict(FINGERPRINT_KEYS)
    if "weights_sha256" in fingerprint:
        keys["weights_sha256"] = SHA256
    _check_keys(file, fingerprint, keys, "fingerprint.")
    layers, sizes = fingerprint["layers"], fingerprint["intermediate_sizes"]
    if len(set(layers)) < len(layers):
        _refuse(file, "fingerprint.layers", layers, "each layer once")
    if len(sizes) != len(layers):
        _refuse(file, "fingerprint.intermediate_sizes", sizes, f"{len(layers)} sizes, as of layers")
    if fingerprint["weights"] is not None:
        try:
            matrices = len(decode_weights(fingerprint["weights"]))
        except (ValueError, RuntimeError):
            matrices = 0
        if matrices not in (2 * len(layers), 3 * len(layers)):
            _refuse(
                file,
                "fingerprint.weights",
                fingerprint["weights"],
                f"base64 of the samples of {3 * len(layers)} matrices, or without gates of "
                f"{2 * len(layers)}",
            )


def _check_keys(
    file: Path, mapping: Any, keys: Mapping[str, Kind], where: str, *, others: bool = False
) -> None:
    if not isinstance(mapping, dict):
        _refuse(file, where.removesuffix("."), mapping, OBJECT.expected)
    for name, kind in keys.items():
        if name not in mapping:
            raise ArtifactError(
                f"{file}: key '{where}{name}' is missing, expected {kind.expected}. {_REMEDY}"
            )
        if not kind.accepts(mapping[name]):
            _refuse(file, f"{where}{name}", mapping[name], kind.expected)
    extra = sorted(set(mapping) - set(keys))
    if extra and not others:
        raise ArtifactError(
            f"{file}: key '{where}{printable(extra[0])}' is not expected; expected "
            f"{', '.join(keys)}. {_REMEDY}"
        )


def _refuse(file: Path, key: str, found: Any, expected: str) -> None:
    raise ArtifactError(f"{file}: key '{key}' is {shown(found)}, expected {expected}. {_REMEDY}")


def _refuse_values(file: Path, key: str, found: str, expected: str) -> None:
    raise ArtifactError(f"{file}: key {key!r} holds {found}, expected {expected}. {_REMEDY}")


def _check_dtypes(
    file: Path,
    dtypes: Mapping[str, Any],
    expected: Mapping[str, ExpectedTensor],
    names: Mapping[torch.dtype, str],
) -> None:
    for name, tensor in expected.items():
        dtype = names.get(tensor.key.dtype, tensor.key.dtype)
        if dtypes[name] != dtype:
            raise ArtifactError(
                f"{file}: key {name!r} is {dtypes[name]}, expected {dtype}. {_REMEDY}"
            )
