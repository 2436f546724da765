"""What an artifact's files hold, spelled once: writing, reading and checking follow these tables.

docs/format.md explains the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from sparse_runtime.artifact.measured import MeasuredCuts
from sparse_runtime.cost import packed_size
from sparse_runtime.kernels.planes import PLANE_BITS

FORMAT = "sparse_runtime.clusters"
#: Written; versions from 1 on are read.
FORMAT_VERSION = 5
CONFIG_FILE = "config.json"
CLUSTERS_FILE = "clusters.safetensors"
CENTROIDS_FILE = "centroids.safetensors"
FILES = (CONFIG_FILE, CLUSTERS_FILE, CENTROIDS_FILE)
#: Where a build keeps what it needs to go on after an interruption; gone once it has ended.
WORK_FOLDER = ".build"


@dataclass(frozen=True)
class Kind:
    """Values that a key of ``config.json`` may have.

    Attributes:
        expected: in words.
        accepts: whether a value read from JSON is one.
    """

    expected: str
    accepts: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def whole(least: int, most: int = 2**31 - 1) -> Kind:
    """Integers from ``least`` to ``most``."""
    return Kind(
        f"a whole number from {least} to {most}",
        lambda value: _is_whole(value) and least <= value <= most,
    )


def list_of(kind: Kind) -> Kind:
    """Lists of one value or more, each of a kind."""
    return Kind(
        f"a list of one or more, each {kind.expected}",
        lambda value: isinstance(value, list) and bool(value) and all(map(kind.accepts, value)),
    )


def optional(kind: Kind) -> Kind:
    """A kind, or null."""
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.accepts(value))


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
SHA256 = Kind(
    "a sha256 of 64 hexadecimal digits",
    lambda value: (
        isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    ),
)
BUDGET = Kind(
    "a cost share above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1
)
LEFT_OUT = Kind(
    "a share above 0 and at most 1, or null",
    lambda value: value is None or (_is_number(value) and 0 < value <= 1),
)
EXCESS = Kind(
    "a cost share between -1 and 1",
    lambda value: _is_number(value) and -1 < value < 1,
)

BITS = Kind(
    f"bits of weights in planes, {PLANE_BITS[0]} to {PLANE_BITS[-1]}, or null",
    lambda value: value is None or (_is_whole(value) and value in PLANE_BITS),
)
ERROR = Kind(
    "a share from 0 to 1, or null",
    lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
)
TAU = Kind(
    "a number of 1 or more, or null",
    lambda value: value is None or (_is_number(value) and 1 <= value < math.inf),
)

MEASURED = Kind(
    "an object of domains, their tokens and the cuts measured on them, or null",
    lambda value: value is None or MeasuredCuts.is_record(value),
)

CONFIG_KEYS: dict[str, Kind] = {
    "format": TEXT,
    "format_version": whole(1),
    "library_version": TEXT,
    "fingerprint": OBJECT,
    "budget": BUDGET,
    "measured": MEASURED,
    "layers": list_of(OBJECT),
    "files": OBJECT,
    "build": OBJECT,
}
#: Of versions 1 to 4.
CONFIG_KEYS_4 = {name: kind for name, kind in CONFIG_KEYS.items() if name != "measured"} | {
    "excess": EXCESS
}

_MODEL_KEYS: dict[str, Kind] = {
    "model_type": TEXT,
    "hidden_size": whole(1),
    "activation": TEXT,
}
#: ``weights_sha256`` is written for artifacts that came from version 1, in place of ``weights``.
FINGERPRINT_KEYS: dict[str, Kind] = {
    **_MODEL_KEYS,
    "layers": list_of(whole(0)),
    "intermediate_sizes": list_of(whole(1)),
    "weights": optional(TEXT),
}
FINGERPRINT_KEYS_1: dict[str, Kind] = {
    **_MODEL_KEYS,
    "intermediate_size": whole(1),
    "num_layers": whole(1, 10_000),
    "weights_sha256": optional(SHA256),
}

FILE_KEYS: dict[str, Kind] = {"bytes": whole(0, 2**63), "sha256": SHA256}


@dataclass(frozen=True)
class LayerKey:
    """A key of an entry of ``layers``.

    Attributes:
        kind: of its values.
        of: gives the value of a ``LayerClusters``.
        since: version of the format that has it first.
    """

    kind: Kind
    of: Callable[[Any], Any]
    since: int = 1


def _has(attribute: str) -> Callable[[Any], bool]:
    return lambda layer: getattr(layer, attribute) is not None


LAYER_KEYS: dict[str, LayerKey] = {
    "num_clusters": LayerKey(whole(1), attrgetter("num_clusters")),
    "router_rank": LayerKey(optional(whole(1)), attrgetter("router_rank")),
    "cluster_bias": LayerKey(FLAG, _has("cluster_bias")),
    "correction_rank": LayerKey(whole(0), attrgetter("correction_rank")),
    "verified": LayerKey(FLAG, _has("maybe_sets")),
    "weighted": LayerKey(FLAG, _has("cluster_weights"), since=3),
    "distilled": LayerKey(FLAG, _has("bias_shift")),
    "left_out": LayerKey(LEFT_OUT, attrgetter("left_out"), since=2),
    "weights": LayerKey(BITS, attrgetter("weights"), since=3),
    "base_error": LayerKey(ERROR, attrgetter("base_error"), since=3),
    "tau": LayerKey(TAU, attrgetter("tau"), since=3),
    "experts": LayerKey(optional(whole(1)), attrgetter("experts"), since=4),
}
#: Those that are attributes of a ``LayerClusters`` of their own, and not told by its tensors.
LAYER_VALUES = ("left_out", "weights", "base_error", "tau", "experts")


@dataclass(frozen=True)
class TensorKey:
    """A tensor of each layer, ``layers.{index}.{name}`` in its file.

    Attributes:
        name: in the file.
        attribute: of ``LayerClusters``; behind ``centroids.``, of its ``LayerCentroids``.
        shape: a letter for each dimension: K clusters, I neurons, B = ⌈I/8⌉ bytes of a bitmap, H hidden
            size, R rank of the router, W what its second matrix takes (R, or H for a linear router), C
            rank of the correction, E experts.
        dtype: on disk.
        file: that holds it.
        when: key of the layer's entry that must be set for it to be there; None for always.
        least: smallest value it may hold.
    """

    name: str
    attribute: str
    shape: str
    dtype: torch.dtype
    file: str = CLUSTERS_FILE
    when: str | None = None
    least: float = -math.inf


_BITS, _HALF, _FLOAT = torch.uint8, torch.bfloat16, torch.float32

TENSORS: tuple[TensorKey, ...] = (
    TensorKey("active_sets", "active_sets", "KB", _BITS),
    TensorKey("static_set", "static_set", "B", _BITS),
    TensorKey("router.down", "router_down", "RH", _HALF, when="router_rank"),
    TensorKey("router.up", "router_up", "KW", _HALF),
    TensorKey("router.bias", "router_bias", "K", _HALF),
    TensorKey("cluster_bias", "cluster_bias", "KH", _HALF, when="cluster_bias"),
    TensorKey("correction.down", "correction_down", "CH", _HALF, when="correction_rank"),
    TensorKey("correction.up", "correction_up", "CH", _HALF, when="correction_rank"),
    TensorKey("maybe_sets", "maybe_sets", "KB", _BITS, when="verified"),
    TensorKey("factors", "factors", "I", _FLOAT, when="verified", least=0),
    TensorKey("cluster_weights", "cluster_weights", "K", _FLOAT, when="weighted", least=0),
    *(
        TensorKey(name, f"centroids.{name}", shape, dtype, file=CENTROIDS_FILE, least=least)
        for name, shape, dtype, least in (
            ("mean_squares", "KI", _HALF, 0),
            ("mean_magnitudes", "KI", _HALF, 0),
            ("mean_activations", "KI", _HALF, -math.inf),
            ("shares", "K", _FLOAT, 0),
            ("neuron_weights", "I", _FLOAT, 0),
        )
    ),
    TensorKey(
        "expert_shares",
        "centroids.expert_shares",
        "KE",
        _FLOAT,
        file=CENTROIDS_FILE,
        when="experts",
        least=0,
    ),
    TensorKey("bias_shift", "bias_shift", "KH", _HALF, file=CENTROIDS_FILE, when="distilled"),
)


def sizes_of(entry: dict[str, Any], hidden_size: int, intermediate_size: int) -> dict[str, int]:
    """The letters of ``TensorKey.shape`` for a layer.

    Args:
        entry: its entry of ``layers``.
        hidden_size: H.
        intermediate_size: I.
    """
    rank = entry["router_rank"]
    return {
        "K": entry["num_clusters"],
        "I": intermediate_size,
        "B": packed_size(intermediate_size),
        "H": hidden_size,
        "R": rank or 0,
        "W": hidden_size if rank is None else rank,
        "C": entry["correction_rank"],
        "E": entry.get("experts") or 0,
    }
