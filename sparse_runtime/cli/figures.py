"""What commands write for machines: whether it can be written is found out before the work."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparse_runtime.errors import OutputFolderError
from sparse_runtime.files import is_stream, json_text, write_output


def check_output_file(path: Path | None) -> Path | None:
    """Find out whether a file can be written; for ``typer.Option(callback=…)``.

    Nothing stays behind: missing folders are made when the file is written.

    Raises:
        OutputFolderError: it is a folder, or its folder cannot be made or written to.
    """
    if path is not None:
        if path.is_dir():
            raise OutputFolderError(f"{path} is a folder; expected the name of a file to write")
        if not is_stream(path):
            _check_writable(path, Path(os.path.realpath(path)).parent)
        elif not os.access(path, os.W_OK):
            raise OutputFolderError(
                f"{path} cannot be written: no permission. Choose another place"
            )
    return path


def check_output_folder(path: Path) -> Path:
    """Find out whether a folder can be made or written to; for ``typer.Option(callback=…)``.

    Raises:
        OutputFolderError: it cannot.
    """
    _check_writable(path, path.absolute())
    return path


def _check_writable(path: Path, folder: Path) -> None:
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputFolderError(
            f"{path} cannot be written: {reason} ({folder}). Choose another place"
        ) from error


def write_figures(json_file: Path | None, value: dict[str, Any]) -> None:
    """Write a command's figures where ``--json`` asks for them."""
    if json_file is not None:
        write_output(json_file, json_text(value))


def peak_memory_mib() -> float | None:
    """Most memory that this process has held, in MiB; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 2**20
