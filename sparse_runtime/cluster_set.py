"""The cluster artifact: active sets and routers of every layer, on disk and in memory.

docs/format.md lists every key. Loading trusts nothing: it checks the format version, each key, shape,
dtype and value range, and that the files belong together.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparse_runtime.atomic import write_json, write_tensors
from sparse_runtime.bands import LayerCentroids
from sparse_runtime.bitmaps import packed_size, set_sizes
from sparse_runtime.cost import router_parameter_count
from sparse_runtime.errors import (
    ArtifactError,
    ArtifactVersionError,
    FingerprintMismatchError,
    OutputFolderError,
)
from sparse_runtime.fingerprint import model_fingerprint
from sparse_runtime.version import __version__

FORMAT = "sparse_runtime.clusters"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
CLUSTERS_FILE = "clusters.safetensors"
CENTROIDS_FILE = "centroids.safetensors"
#: Where a build keeps what it needs to go on after an interruption; gone once it has ended.
WORK_FOLDER = ".build"
_FILES = (CONFIG_FILE, CLUSTERS_FILE, CENTROIDS_FILE)
# The fields of LayerCentroids on disk: shape and dtype.
_CENTROIDS: dict[str, tuple[str, torch.dtype]] = {
    "mean_squares": ("KI", torch.bfloat16),
    "mean_magnitudes": ("KI", torch.bfloat16),
    "mean_activations": ("KI", torch.bfloat16),
    "shares": ("K", torch.float32),
    "neuron_weights": ("I", torch.float32),
}
# Further tensors that recut needs, of layers that were distilled.
_BIAS_SHIFT = "bias_shift"


@dataclass
class LayerClusters:
    """Clusters and router of one layer.

    Attributes:
        active_sets: neurons computed for each cluster, bitmaps [K, ⌈I/8⌉] uint8.
        static_set: the best one set for all tokens, of the clusters' mean size, bitmap [⌈I/8⌉]
            uint8; what a router must beat.
        router_down: first matrix of a low-rank router [r, H], or None for a linear router.
        router_up: [K, r], or [K, H] for a linear router.
        router_bias: [K].
        cluster_bias: added to the output of a cluster's tokens, the mean of what their sets leave out
            [K, H], or None.
        correction_down: with ``correction_up``, both [c, H], adds correction_upᵀ·(correction_down·x) to
            the output; None without a correction.
        correction_up: see ``correction_down``.
        bias_shift: part of ``cluster_bias`` that distillation found [K, H]; None if it was not
            distilled, or loaded without centroids.
        left_out: share of the importance Σ e² that the sets are expected to leave out, which
            ``bias_shift`` and ``correction_up`` go with when sets are cut for another budget; None
            where sets were not cut at a price.
        maybe_sets: neurons of each cluster that low-bit copies decide on, bitmaps [K, ⌈I/8⌉] uint8, or
            None.
        factors: such a neuron is computed where |h̃|·factor > 1, with h̃ from its low-bit copy
            [I]; None without ``maybe_sets``.
        centroids: what other sets can be cut from (:func:`sparse_runtime.recut`), or None.
    """

    active_sets: Tensor
    static_set: Tensor
    router_up: Tensor
    router_bias: Tensor
    router_down: Tensor | None = None
    cluster_bias: Tensor | None = None
    correction_down: Tensor | None = None
    correction_up: Tensor | None = None
    bias_shift: Tensor | None = None
    left_out: float | None = None
    maybe_sets: Tensor | None = None
    factors: Tensor | None = None
    centroids: LayerCentroids | None = None

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.active_sets.shape[0]

    @property
    def router_rank(self) -> int | None:
        """r of a low-rank router, None for a linear one."""
        return None if self.router_down is None else self.router_down.shape[0]

    @property
    def correction_rank(self) -> int:
        """c of the low-rank correction, 0 if there is none."""
        return 0 if self.correction_down is None else self.correction_down.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return (self.router_up if self.router_down is None else self.router_down).shape[1]

    @property
    def extra_elements(self) -> int:
        """Elements read per token besides the neurons: router, one bias vector and correction."""
        router = router_parameter_count(self.hidden_size, self.num_clusters, self.router_rank)
        vectors = 2 * self.correction_rank + (self.cluster_bias is not None)
        return router + vectors * self.hidden_size

    def collapsed(self, num_neurons: int) -> LayerClusters:
        """One cluster and nearly nothing beside it, if every set holds all neurons; else itself."""
        if not bool((set_sizes(self.active_sets) == num_neurons).all()):
            return self
        return LayerClusters(
            active_sets=self.active_sets[:1],
            static_set=self.static_set,
            router_up=torch.zeros(1, self.hidden_size),
            router_bias=torch.zeros(1),
        )


@dataclass
class ClusterSet:
    """All that ``sparsify`` needs beside the model.

    Attributes:
        layers: layer index -> clusters and router.
        fingerprint: of the model it was built for, see ``model_fingerprint``.
        budget: mean cost share that the sets were cut for.
        excess: cost share that held-out text was found to read beyond what a cut expects;
            :func:`sparse_runtime.recut` aims so much lower.
        build: how it was built: method and its settings, data with token counts, seed, budget and
            the figures reached. Free-form JSON; nothing at run time depends on it.
    """

    layers: dict[int, LayerClusters]
    fingerprint: dict[str, Any]
    budget: float
    excess: float = 0.0
    build: dict[str, Any] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether a layer has neurons that low-bit copies decide on."""
        return any(layer.maybe_sets is not None for layer in self.layers.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors in memory."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers.values()
            for part in (layer, layer.centroids)
            if part is not None
            for tensor in vars(part).values()
            if isinstance(tensor, Tensor)
        )

    def check_model(self, model: nn.Module) -> None:
        """Check that the artifact was built for this model.

        Raises:
            FingerprintMismatchError: it was built for another architecture or other weights.
        """
        found = model_fingerprint(model)
        for name, expected in self.fingerprint.items():
            if name == "weights_sha256" and (found.get(name) is None or expected is None):
                continue
            if found.get(name) != expected:
                raise FingerprintMismatchError(
                    f"the clusters were built for another model: {name} is {found.get(name)!r} in "
                    f"this model, {expected!r} in the artifact (built from "
                    f"{self.build.get('model', 'an unnamed model')!r}). Build clusters for this "
                    "model, or load the model they were built from"
                )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the artifact to a folder: ``config.json`` last, each file atomically.

        A crash leaves either the old artifact, or files that :meth:`from_pretrained` refuses because
        their hashes do not match ``config.json``.

        Raises:
            OutputFolderError: the folder holds something else, or could not be written.
        """
        path = Path(folder)
        check_output_folder(path)
        clusters, centroids = self._tensors()
        metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
        files = {}
        for name, tensors in ((CLUSTERS_FILE, clusters), (CENTROIDS_FILE, centroids)):
            if tensors:
                write_tensors(path / name, tensors, metadata)
                files[name] = _file_record(path / name)
            else:
                (path / name).unlink(missing_ok=True)
        write_json(path / CONFIG_FILE, self._config(files))

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        centroids: bool = False,
    ) -> ClusterSet:
        """Load an artifact from a folder or a Hub repository.

        Args:
            folder_or_id: local folder, or Hub id ``owner/name``.
            revision, cache_dir, token, local_files_only: as in ``huggingface_hub``.
            centroids: load the centroids too, where the artifact has them; :func:`recut` needs them.

        Raises:
            ArtifactVersionError: written in a newer format.
            ArtifactError: missing, truncated, or with a missing, extra, wrongly shaped, wrongly
                typed or out-of-range tensor; the message names file and key.
        """
        path = Path(folder_or_id)
        if not path.is_dir():
            path = _download(
                folder_or_id,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        config = _read_config(path)
        tensors = _read_tensors(path / CLUSTERS_FILE, _expected_clusters(config))
        _check_values(path / CLUSTERS_FILE, tensors, config)
        _check_record(path / CLUSTERS_FILE, config)
        centroid_tensors: dict[str, Tensor] = {}
        if centroids and CENTROIDS_FILE in config["files"]:
            centroid_tensors = _read_tensors(path / CENTROIDS_FILE, _expected_centroids(config))
            _check_values(path / CENTROIDS_FILE, centroid_tensors, config)
            _check_record(path / CENTROIDS_FILE, config)
        layers = {}
        for entry in config["layers"]:
            prefix = f"layers.{entry['index']}."
            layers[entry["index"]] = LayerClusters(
                active_sets=tensors[f"{prefix}active_sets"],
                static_set=tensors[f"{prefix}static_set"],
                router_down=tensors.get(f"{prefix}router.down"),
                router_up=tensors[f"{prefix}router.up"],
                router_bias=tensors[f"{prefix}router.bias"],
                cluster_bias=tensors.get(f"{prefix}cluster_bias"),
                correction_down=tensors.get(f"{prefix}correction.down"),
                correction_up=tensors.get(f"{prefix}correction.up"),
                bias_shift=centroid_tensors.get(f"{prefix}{_BIAS_SHIFT}"),
                left_out=entry["left_out"],
                maybe_sets=tensors.get(f"{prefix}maybe_sets"),
                factors=tensors.get(f"{prefix}factors"),
                centroids=_layer_centroids(centroid_tensors, prefix),
            )
        return cls(
            layers=layers,
            fingerprint=config["fingerprint"],
            budget=config["budget"],
            excess=config["excess"],
            build=config["build"],
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload sparse_runtime clusters",
    ) -> str:
        """Upload the artifact to a Hub repository, made if it does not exist; returns its URL.

        Raises:
            OutputFolderError: the upload failed; the message gives the Hub's reason.
        """
        from tempfile import TemporaryDirectory

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message
                )
            except Exception as error:
                raise OutputFolderError(
                    f"the artifact could not be uploaded to {repo_id!r}: {error}. Check the id, your "
                    "token (`hf auth login`) and the network; save_pretrained keeps it locally"
                ) from error
        return str(url)

    def _config(self, files: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "fingerprint": self.fingerprint,
            "budget": self.budget,
            "excess": self.excess,
            "layers": [
                {
                    "index": index,
                    "num_clusters": layer.num_clusters,
                    "router_rank": layer.router_rank,
                    "cluster_bias": layer.cluster_bias is not None,
                    "correction_rank": layer.correction_rank,
                    "distilled": layer.bias_shift is not None,
                    "left_out": layer.left_out,
                    "verified": layer.maybe_sets is not None,
                }
                for index, layer in sorted(self.layers.items())
            ],
            "files": files,
            "build": self.build,
        }

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        clusters: dict[str, Tensor] = {}
        centroids: dict[str, Tensor] = {}
        for index, layer in sorted(self.layers.items()):
            prefix = f"layers.{index}."
            clusters[f"{prefix}active_sets"] = layer.active_sets
            clusters[f"{prefix}static_set"] = layer.static_set
            if layer.router_down is not None:
                clusters[f"{prefix}router.down"] = layer.router_down.to(torch.bfloat16)
            clusters[f"{prefix}router.up"] = layer.router_up.to(torch.bfloat16)
            clusters[f"{prefix}router.bias"] = layer.router_bias.to(torch.bfloat16)
            if layer.cluster_bias is not None:
                clusters[f"{prefix}cluster_bias"] = layer.cluster_bias.to(torch.bfloat16)
            if layer.correction_down is not None and layer.correction_up is not None:
                clusters[f"{prefix}correction.down"] = layer.correction_down.to(torch.bfloat16)
                clusters[f"{prefix}correction.up"] = layer.correction_up.to(torch.bfloat16)
            if layer.maybe_sets is not None and layer.factors is not None:
                clusters[f"{prefix}maybe_sets"] = layer.maybe_sets
                clusters[f"{prefix}factors"] = layer.factors.float()
            if layer.centroids is not None:
                for name, (_, dtype) in _CENTROIDS.items():
                    centroids[prefix + name] = getattr(layer.centroids, name).to(dtype)
                if layer.bias_shift is not None:
                    centroids[prefix + _BIAS_SHIFT] = layer.bias_shift.to(torch.bfloat16)
        return (
            {key: tensor.contiguous().cpu() for key, tensor in clusters.items()},
            {key: tensor.contiguous().cpu() for key, tensor in centroids.items()},
        )


def check_output_folder(path: Path) -> None:
    """Check that an artifact may be written to ``path``.

    It may be new, empty, an artifact already, or hold nothing but a build's working folder.

    Raises:
        OutputFolderError: it is a file, or holds something else.
    """
    if path.exists() and not path.is_dir():
        raise OutputFolderError(f"{path} is a file; expected a folder for the artifact")
    if not path.exists() or _is_artifact(path):
        return
    known = (*_FILES, WORK_FOLDER)
    foreign = sorted(p.name for p in path.iterdir() if p.name not in known)
    if foreign or (path / CONFIG_FILE).exists():
        found = foreign[0] if foreign else f"a {CONFIG_FILE} that is not an artifact's"
        raise OutputFolderError(
            f"{path} exists and is not a cluster artifact (it holds {found}); choose a new or empty "
            "folder"
        )


def _is_artifact(path: Path) -> bool:
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def _download(folder_or_id: str | os.PathLike[str], **options: Any) -> Path:
    name = os.fspath(folder_or_id)
    remedy = "Give a folder written by `sparse-runtime build -o FOLDER`, or a Hub id owner/name"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ArtifactError(f"no cluster artifact at {name!r}: there is no such folder. {remedy}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES), **options))
    except Exception as error:
        raise ArtifactError(
            f"no cluster artifact at {name!r}: there is no such local folder, and the Hub gave none "
            f"({type(error).__name__}: {_first_line(error)}). {remedy}"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no details")


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is not a cluster artifact: it has no {CONFIG_FILE}. If a build was interrupted "
            "there, run the same build command again to finish it"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read as JSON: {error}. Build it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ArtifactError(
            f"{file}: key 'format' is {found!r}, expected {FORMAT!r}: this folder is something else "
            "than a cluster artifact"
        )
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION or version < 1:
        raise ArtifactVersionError(
            f"{file}: key 'format_version' is {version!r}; this sparse_runtime {__version__} reads 1 "
            f"to {FORMAT_VERSION}. It was written by sparse_runtime "
            f"{config.get('library_version', '(unknown)')}: install that version or a newer one"
        )
    _check_config(file, config)
    return config


_FINGERPRINT_TYPES: dict[str, type | tuple[type, ...]] = {
    "model_type": str,
    "hidden_size": int,
    "intermediate_size": int,
    "num_layers": int,
    "activation": str,
    "weights_sha256": (str, type(None)),
}


def _check_config(file: Path, config: dict[str, Any]) -> None:
    def require(mapping: Any, key: str, kind: Any, where: str) -> Any:
        value = mapping.get(key, "nothing") if isinstance(mapping, dict) else mapping
        if not isinstance(mapping, dict) or key not in mapping or not isinstance(value, kind):
            names = kind if isinstance(kind, tuple) else (kind,)
            raise ArtifactError(
                f"{file}: key '{where}{key}' is {value!r}, expected "
                f"{' or '.join(name.__name__ for name in names)}. Build the artifact again"
            )
        return value

    fingerprint = require(config, "fingerprint", dict, "")
    for key, kind in _FINGERPRINT_TYPES.items():
        require(fingerprint, key, kind, "fingerprint.")
    require(config, "budget", float, "")
    require(config, "excess", float, "")
    require(config, "build", dict, "")
    files = require(config, "files", dict, "")
    require(files, CLUSTERS_FILE, dict, "files.")
    for name, record in files.items():
        require(record, "sha256", str, f"files.{name}.")
    for number, entry in enumerate(require(config, "layers", list, "")):
        for key, kind in (
            ("index", int),
            ("num_clusters", int),
            ("router_rank", (int, type(None))),
            ("cluster_bias", bool),
            ("correction_rank", int),
            ("distilled", bool),
            ("left_out", (float, type(None))),
            ("verified", bool),
        ):
            require(entry, key, kind, f"layers[{number}].")


_Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _expected_clusters(config: dict[str, Any]) -> _Expected:
    hidden_size = config["fingerprint"]["hidden_size"]
    neurons = config["fingerprint"]["intermediate_size"]
    bitmap = packed_size(neurons)
    expected: _Expected = {}
    for entry in config["layers"]:
        prefix = f"layers.{entry['index']}."
        clusters, rank = entry["num_clusters"], entry["router_rank"]
        expected[f"{prefix}active_sets"] = ((clusters, bitmap), torch.uint8)
        expected[f"{prefix}static_set"] = ((bitmap,), torch.uint8)
        if rank is not None:
            expected[f"{prefix}router.down"] = ((rank, hidden_size), torch.bfloat16)
        width = hidden_size if rank is None else rank
        expected[f"{prefix}router.up"] = ((clusters, width), torch.bfloat16)
        expected[f"{prefix}router.bias"] = ((clusters,), torch.bfloat16)
        if entry["cluster_bias"]:
            expected[f"{prefix}cluster_bias"] = ((clusters, hidden_size), torch.bfloat16)
        if entry["correction_rank"]:
            for name in ("correction.down", "correction.up"):
                shape = (entry["correction_rank"], hidden_size)
                expected[prefix + name] = (shape, torch.bfloat16)
        if entry["verified"]:
            expected[f"{prefix}maybe_sets"] = ((clusters, bitmap), torch.uint8)
            expected[f"{prefix}factors"] = ((neurons,), torch.float32)
    return expected


def _expected_centroids(config: dict[str, Any]) -> _Expected:
    sizes = {"I": config["fingerprint"]["intermediate_size"]}
    sizes["H"] = config["fingerprint"]["hidden_size"]
    expected: _Expected = {}
    for entry in config["layers"]:
        sizes["K"] = entry["num_clusters"]
        tensors = dict(_CENTROIDS)
        if entry["distilled"]:
            tensors[_BIAS_SHIFT] = ("KH", torch.bfloat16)
        for name, (shape, dtype) in tensors.items():
            key = f"layers.{entry['index']}.{name}"
            expected[key] = (tuple(sizes[letter] for letter in shape), dtype)
    return expected


def _layer_centroids(tensors: dict[str, Tensor], prefix: str) -> LayerCentroids | None:
    if not tensors:
        return None
    return LayerCentroids(**{name: tensors[prefix + name] for name in _CENTROIDS})


def _read_tensors(file: Path, expected: _Expected) -> dict[str, Tensor]:
    remedy = "Build the artifact again, or download it again"
    if not file.is_file():
        raise ArtifactError(f"{file} is missing. {remedy}")
    try:
        with safe_open(file, framework="pt") as reader:
            found = set(reader.keys())
            missing, extra = sorted(set(expected) - found), sorted(found - set(expected))
            if missing:
                raise ArtifactError(
                    f"{file}: key {missing[0]!r} is missing (one of {len(missing)}). {remedy}"
                )
            if extra:
                raise ArtifactError(
                    f"{file}: key {extra[0]!r} is not expected (one of {len(extra)}). {remedy}"
                )
            tensors = {key: reader.get_tensor(key) for key in expected}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file} is not a readable safetensors file, or is truncated: {error}. {remedy}"
        ) from error
    for key, (shape, dtype) in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ArtifactError(
                f"{file}: key {key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} "
                f"{shape}. {remedy}"
            )
    return tensors


def _check_values(file: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    neurons = config["fingerprint"]["intermediate_size"]
    padding = 0xFF << (neurons % 8) & 0xFF if neurons % 8 else 0
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            if not tensor.isfinite().all():
                raise ArtifactError(
                    f"{file}: key {key!r} holds NaN or infinity, expected finite numbers. Build the "
                    "artifact again"
                )
        elif padding and (tensor[..., -1] & padding).any():
            raise ArtifactError(
                f"{file}: key {key!r} holds a neuron index ≥ {neurons}, expected indices below it. "
                "Build the artifact again"
            )


def _file_record(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _check_record(file: Path, config: dict[str, Any]) -> None:
    found, expected = _file_record(file)["sha256"], config["files"][file.name]["sha256"]
    if found != expected:
        raise ArtifactError(
            f"{file} does not belong to {CONFIG_FILE}: its sha256 is {found[:12]}…, expected "
            f"{expected[:12]}…. A write was interrupted or the file was changed; build the artifact "
            "again"
        )
