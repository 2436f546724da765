"""The cluster artifact: active sets and routers of every layer, in memory, on disk and on the Hub.

docs/format.md lists every key, :mod:`sparse_runtime.artifact.format` spells them, and loading trusts
nothing (:mod:`sparse_runtime.artifact.checks`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from torch import Tensor, nn

from sparse_runtime.artifact.checks import (
    check_config,
    check_record,
    check_shapes,
    check_tensors,
    expected_tensors,
    file_record,
    read_config,
    read_tensors,
)
from sparse_runtime.artifact.folders import (
    check_output_folder,
    download,
    local_path,
    unchecked_config,
)
from sparse_runtime.artifact.format import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    CONFIG_FILE,
    FILES,
    FORMAT,
    FORMAT_VERSION,
    LAYER_KEYS,
)
from sparse_runtime.artifact.layer_clusters import (
    LayerClusters,
    layer_from_tensors,
    layer_tensors,
)
from sparse_runtime.artifact.measured import LossBudget, MeasuredCuts
from sparse_runtime.errors import (
    ArtifactError,
    ConfigError,
    FingerprintMismatchError,
    NothingMatchedError,
    OutputFolderError,
)
from sparse_runtime.files import (
    copy_file,
    finite,
    remove_leftovers,
    write_json,
    write_tensors,
)
from sparse_runtime.models.fingerprint import fingerprint_mismatch
from sparse_runtime.printable import printable, shown
from sparse_runtime.version import __version__

_KEEP_OR_DROP = (
    "Load it with ClusterSet.from_pretrained(…, centroids=True) to save them, or save with "
    "centroids=False to leave them out"
)


@dataclass(frozen=True)
class UnreadCentroids:
    """Centroids that an artifact has and that were not loaded.

    Attributes:
        file: where they lie, if they do (they are not downloaded to be left alone).
        record: of the file in ``config.json``.
        distilled: layers whose ``bias_shift`` is among them.
        active_sets: layer index -> sets [K, ⌈I/8⌉] uint8 of the clusters that they belong to.
    """

    file: Path
    record: dict[str, Any]
    distilled: frozenset[int]
    active_sets: dict[int, Tensor] = field(repr=False)

    def check(self, layers: dict[int, LayerClusters]) -> None:
        """Check that the file is there, and that its clusters are still these layers'.

        Raises:
            ArtifactError: it is not, or they are not.
        """
        if not self.file.is_file() or file_record(self.file) != self.record:
            raise ArtifactError(
                f"the artifact has centroids that were not loaded, and {self.file} is not there or has "
                f"changed since. {_KEEP_OR_DROP}"
            )
        if layers.keys() != self.active_sets.keys() or not all(
            torch.equal(layers[index].active_sets.cpu(), sets)
            for index, sets in self.active_sets.items()
        ):
            raise ArtifactError(
                f"the artifact has centroids that were not loaded, and its layers are not those of "
                f"{self.file} any more. {_KEEP_OR_DROP}"
            )


@dataclass(repr=False)
class ClusterSet:
    """All that ``sparsify`` needs beside the model.

    Attributes:
        layers: layer index -> clusters and router.
        fingerprint: of the model it was built for, see ``model_fingerprint``.
        budget: cost share that the sets were cut for.
        measured: what cuts for several budgets read and lost on held-out text of each domain;
            :func:`sparse_runtime.recut` aims by it. None where none was measured.
        build: how it was built: method and its settings, data with token counts, seed, budget and
            the figures reached. Free-form JSON; nothing at run time depends on it.
        unread_centroids: set by :meth:`from_pretrained` where it left centroids alone, so that saving
            keeps them.
    """

    layers: dict[int, LayerClusters]
    fingerprint: dict[str, Any]
    budget: float
    measured: MeasuredCuts | None = None
    build: dict[str, Any] = field(default_factory=dict)
    unread_centroids: UnreadCentroids | None = None

    def __repr__(self) -> str:
        parts = [f"{len(self.layers)} layers of {self.fingerprint.get('model_type')}"]
        parts.append(f"budget {self.budget}")
        if self.verified:
            parts.append("verified")
        if self.has_centroids:
            parts.append("centroids")
        return f"ClusterSet({', '.join(parts)})"

    @property
    def has_centroids(self) -> bool:
        """Whether sets for another budget can be cut from it."""
        return any(layer.centroids is not None for layer in self.layers.values())

    def intermediate_size(self, index: int) -> int:
        """Number of neurons I of a layer."""
        position = self.fingerprint["layers"].index(index)
        return int(self.fingerprint["intermediate_sizes"][position])

    @property
    def verified(self) -> bool:
        """Whether a layer has neurons that looks decide on."""
        return any(layer.maybe_sets is not None for layer in self.layers.values())

    def budget_for(self, max_loss: float, domain: str | None = None) -> LossBudget:
        """The least budget whose loss on held-out text was at most ``max_loss`` when it was built.

        See :meth:`MeasuredCuts.budget_for`, for what is raised too. Other text may lose more.
        """
        return (self.measured or MeasuredCuts((), ())).budget_for(max_loss, domain)

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

    def check_model(self, model: nn.Module, *, weights: bool = True) -> None:
        """Check that the artifact was built for this model.

        Args:
            model: a dense causal language model.
            weights: also check the weights. Model type, sizes, activation and layers always are.

        Raises:
            FingerprintMismatchError: it was built for another architecture or other weights.
            NothingMatchedError: it holds none of the model's layers.
            ArtifactError: a tensor does not have the shape that its layer needs.
        """
        difference = fingerprint_mismatch(model, self.fingerprint, weights=weights)
        if difference:
            raise FingerprintMismatchError(
                f"the clusters were built for another model: {difference} (built from "
                f"{shown(self.build.get('model', 'an unnamed model'))}). Build clusters for this "
                "model, or load the model they were built from"
            )
        layers = self.fingerprint["layers"]
        foreign = [index for index in self.layers if index not in layers]
        if foreign or not self.layers:
            matched = len(foreign) < len(self.layers)
            raise (FingerprintMismatchError if matched else NothingMatchedError)(
                f"the clusters hold layers {sorted(self.layers)}, this model has {layers[0]} to "
                f"{layers[-1]}; build clusters for this model"
            )
        config = {"fingerprint": self.fingerprint, "layers": self._entries(self.has_centroids)}
        for name in (CLUSTERS_FILE, CENTROIDS_FILE) if self.has_centroids else (CLUSTERS_FILE,):
            shapes = {key: tuple(tensor.shape) for key, _, tensor in self._tensors(name)}
            check_shapes(Path("the clusters"), shapes, expected_tensors(config, name))

    def save_pretrained(self, folder: str | os.PathLike[str], *, centroids: bool = True) -> None:
        """Write the artifact to a folder: ``config.json`` last, each file atomically and read back.

        Centroids that were left alone when the artifact was loaded stay in its folder, and are copied
        to any other. A crash leaves either the old artifact, or files that :meth:`from_pretrained`
        refuses because their hashes do not match ``config.json``.

        Args:
            folder: new, empty, or an artifact's.
            centroids: False leaves them out, and removes those of an artifact that is in the folder.

        Raises:
            OutputFolderError: the folder holds something else or could not be written, or centroids in
                it would be lost.
            ArtifactError: what is to be written could not be read again, or unread centroids are not
                to be had any more; nothing but whole files is left in the folder.
        """
        path = local_path(folder)
        check_output_folder(path)
        kept = self._kept_centroids(path) if centroids else None
        with_centroids = centroids and self.has_centroids
        config = self._config(with_centroids, kept)
        # All is checked before anything is written: a set that is wrong costs nobody an artifact.
        check_config(path / CONFIG_FILE, {**config, "files": {CLUSTERS_FILE: _NO_RECORD}})
        config["budget"] = float(config["budget"])
        files = {}
        for name in (CLUSTERS_FILE, CENTROIDS_FILE):
            if name == CLUSTERS_FILE or with_centroids:
                files[name] = {
                    key: tensor.detach().to("cpu", dtype).contiguous()
                    for key, dtype, tensor in self._tensors(name)
                }
                check_tensors(path / name, files[name], expected_tensors(config, name))
        if kept is not None and not _same_file(kept.file, path / CENTROIDS_FILE):
            copy_file(kept.file, path / CENTROIDS_FILE)
        for name, tensors in files.items():
            # One key of metadata: safetensors writes several in another order in every process.
            write_tensors(path / name, tensors, {"format": FORMAT})
            _read_back(path / name, tensors)
            config["files"][name] = file_record(path / name)
        if kept is not None:
            config["files"][CENTROIDS_FILE] = kept.record
            check_record(path / CENTROIDS_FILE, config)
        write_json(path / CONFIG_FILE, config)
        if CENTROIDS_FILE not in config["files"]:
            (path / CENTROIDS_FILE).unlink(missing_ok=True)
        remove_leftovers(path)

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
            folder_or_id: local folder, or Hub id ``owner/name``. A name that is no folder is asked of
                the Hub unless it is a path (:func:`sparse_runtime.hub.why_a_path` says when).
            revision: branch, tag or commit on the Hub.
            cache_dir, token, local_files_only: as in ``huggingface_hub``.
            centroids: load the centroids too, where the artifact has them; :func:`recut` needs them.
                They are not downloaded otherwise.

        Raises:
            ConfigError: a revision of a local folder.
            ArtifactVersionError: written in a newer format.
            ArtifactError: missing, truncated, or with a missing, extra, wrongly shaped, wrongly
                typed or out-of-range tensor; the message names file and key.
        """
        path = local_path(folder_or_id)
        if not path.is_dir():
            path = download(
                folder_or_id,
                FILES if centroids else (CONFIG_FILE, CLUSTERS_FILE),
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        elif revision is not None:
            raise ConfigError(
                f"revision is {revision!r}, but {os.fspath(folder_or_id)} is a local folder; expected "
                "a Hub id owner/name beside a revision"
            )
        config = read_config(path)
        names = [CLUSTERS_FILE]
        if centroids and CENTROIDS_FILE in config["files"]:
            names.append(CENTROIDS_FILE)
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= read_tensors(path / name, expected_tensors(config, name))
            check_record(path / name, config)
        layers = {entry["index"]: layer_from_tensors(tensors, entry) for entry in config["layers"]}
        unread = None
        if not centroids and CENTROIDS_FILE in config["files"]:
            unread = UnreadCentroids(
                path.absolute() / CENTROIDS_FILE,
                config["files"][CENTROIDS_FILE],
                frozenset(entry["index"] for entry in config["layers"] if entry["distilled"]),
                {index: layer.active_sets.clone() for index, layer in layers.items()},
            )
        return cls(
            layers=layers,
            fingerprint=config["fingerprint"],
            budget=config["budget"],
            measured=config["measured"],
            build=config["build"],
            unread_centroids=unread,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        centroids: bool = True,
        commit_message: str = "Upload sparse_runtime clusters",
    ) -> str:
        """Upload the artifact to a Hub repository, made if it does not exist; returns its URL.

        Args:
            repo_id: ``owner/name``.
            private, token, commit_message: as in ``huggingface_hub``.
            centroids: False leaves them out, and removes those that the repository has.

        Raises:
            OutputFolderError: the upload failed; the message gives the Hub's reason.
            ArtifactError: as :meth:`save_pretrained`.
        """
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, centroids=centroids)
            try:
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    delete_patterns=None if centroids else [CENTROIDS_FILE],
                )
            except Exception as error:
                raise OutputFolderError(
                    f"the artifact could not be uploaded to {repo_id!r}: {printable(str(error))}. "
                    "Check the id, your token (`hf auth login`) and the network; save_pretrained keeps "
                    "it locally"
                ) from error
        return str(url)

    def _kept_centroids(self, path: Path) -> UnreadCentroids | None:
        """Centroids that saving to a folder keeps or copies."""
        if self.has_centroids:
            return None
        if self.unread_centroids is not None:
            self.unread_centroids.check(self.layers)
            return self.unread_centroids
        if (path / CENTROIDS_FILE).is_file() and CENTROIDS_FILE in unchecked_config(path).get(
            "files", ()
        ):
            raise OutputFolderError(
                f"{path} holds an artifact with {CENTROIDS_FILE}, which saving an artifact without "
                "centroids would remove. Choose another folder, or save with centroids=False"
            )
        return None

    def _entries(
        self, with_centroids: bool, kept: UnreadCentroids | None = None
    ) -> list[dict[str, Any]]:
        entries = []
        for index, layer in sorted(self.layers.items()):
            entry = {"index": index, **{name: key.of(layer) for name, key in LAYER_KEYS.items()}}
            # It says what the file of centroids holds.
            if kept is not None:
                entry["distilled"] = index in kept.distilled
            elif not with_centroids or layer.centroids is None:
                entry["distilled"] = False
            entries.append(entry)
        return entries

    def _config(self, with_centroids: bool, kept: UnreadCentroids | None) -> dict[str, Any]:
        """``config.json`` as it will be read, with no files as yet."""
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "fingerprint": self.fingerprint,
            "budget": self.budget,
            "measured": None if self.measured is None else self.measured.record(),
            "layers": self._entries(with_centroids, kept),
            "files": {},
            "build": finite(self.build),
        }
        try:
            return dict(json.loads(json.dumps(config, default=float)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(
                f"the artifact cannot be written as JSON: {error}; expected nothing but JSON values in "
                "build and fingerprint, and numbers as budget and measured shares"
            ) from error

    def _tensors(self, name: str) -> Iterator[tuple[str, torch.dtype, Tensor]]:
        """Key, dtype on disk and tensor as it is, for all that a file holds."""
        for index, layer in sorted(self.layers.items()):
            for key, tensor in layer_tensors(layer):
                if key.file == name:
                    yield f"layers.{index}.{key.name}", key.dtype, tensor


_NO_RECORD = {"bytes": 0, "sha256": "0" * 64}


def _same_file(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


def _read_back(file: Path, tensors: dict[str, Tensor]) -> None:
    """Check that a file holds what was written to it."""
    with safe_open(file, framework="pt") as reader:
        for key, tensor in tensors.items():
            if not torch.equal(reader.get_tensor(key), tensor):
                raise ArtifactError(
                    f"{file}: key {key!r} was not written as it is in memory; check the disk, and save "
                    "again"
                )
