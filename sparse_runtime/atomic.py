"""Files that are either whole or not there: temporary file, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sparse_runtime.errors import OutputFolderError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on leaving, flush it to disk and rename it to ``path``.

    If anything is raised inside, the temporary file is removed and ``path`` stays as it was.

    Raises:
        OutputFolderError: the file could not be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # not there, or its folder is none
            temporary.unlink()
        if _is_io_failure(error):
            raise OutputFolderError(_explain(path, error)) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, atomically. Raises OutputFolderError like :func:`atomic_path`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically. Raises OutputFolderError like :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors to a file, atomically. Raises OutputFolderError like :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _is_io_failure(error: BaseException) -> bool:
    # safetensors reports failed writes as its own error type, with the operating system's words.
    return isinstance(error, OSError) or "I/O error" in str(error) or "os error" in str(error)


def _explain(path: Path, error: BaseException) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        folder = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        return (
            f"{path} could not be written: the disk is full ({free / 2**20:.0f} MiB free). Free some "
            "space or choose another output folder, then run the same command again"
        )
    return f"{path} could not be written: {error}. Choose another output folder"
