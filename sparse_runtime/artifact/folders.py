"""Where an artifact lies: a folder that may be written to, or one of the Hub's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from sparse_runtime.artifact.format import CONFIG_FILE, FILES, FORMAT, WORK_FOLDER
from sparse_runtime.errors import ArtifactError, OutputFolderError
from sparse_runtime.files import is_temporary
from sparse_runtime.hub import hub_failure, why_a_path
from sparse_runtime.printable import printable


def local_path(name: str | os.PathLike[str]) -> Path:
    """A path of the user's, with ``~`` for the home folder."""
    return Path(os.path.expanduser(os.fspath(name)))


def check_output_folder(path: Path) -> None:
    """Check that an artifact may be written to ``path``.

    It may be new, empty, an artifact already, or hold nothing but a build's working folder and what a
    killed process left.

    Raises:
        OutputFolderError: it is a file, or holds something else.
    """
    if path.exists() and not path.is_dir():
        raise OutputFolderError(f"{path} is a file; expected a folder for the artifact")
    if not path.exists() or unchecked_config(path).get("format") == FORMAT:
        return
    known = (*FILES, WORK_FOLDER)
    foreign = sorted(p.name for p in path.iterdir() if not (p.name in known or is_temporary(p)))
    if foreign or (path / CONFIG_FILE).exists():
        found = foreign[0] if foreign else f"a {CONFIG_FILE} that is not an artifact's"
        raise OutputFolderError(
            f"{path} exists and is not a cluster artifact (it holds {found}); choose a new or empty "
            "folder"
        )


def unchecked_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a folder, unchecked; empty if it cannot be read."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def download(folder_or_id: str | os.PathLike[str], names: tuple[str, ...], **options: Any) -> Path:
    """Download files of an artifact, unless they are cached.

    Args:
        folder_or_id: as the user gave it; no folder has this name.
        names: of the files.
        options: as in ``huggingface_hub.snapshot_download``.

    Returns:
        The folder they lie in.

    Raises:
        ArtifactError: it is a path, or the Hub gave nothing.
    """
    name = os.fspath(folder_or_id)
    remedy = "Give a folder written by `sparse-runtime build -o FOLDER`, or a Hub id owner/name"
    if not isinstance(folder_or_id, str):
        reason: str | None = "which is given as a path"
    elif local_path(name).exists():
        reason = "which is a file"
    else:
        reason = why_a_path(name)
    if reason:
        raise ArtifactError(
            f"no cluster artifact at {name!r}, {reason}: there is no such folder. {remedy}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(names), **options))
    except Exception as error:
        lines = (line for line in str(error).splitlines() if line.strip())
        first_line = printable(next(lines, "no details"))
        detail = hub_failure(error) or f"the Hub gave none ({type(error).__name__}: {first_line})"
        raise ArtifactError(
            f"no cluster artifact at {name!r}: there is no such local folder, and {detail}. {remedy}"
        ) from error
