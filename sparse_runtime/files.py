"""Files that are either whole or not there (temporary file, fsync, rename), and the cache folder."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from safetensors.torch import save_file
from torch import Tensor

from sparse_runtime.errors import OutputFolderError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
# Seconds since its last change after which a temporary file is taken for a killed process's.
_STALE_AFTER = 3600.0


def cache_folder() -> Path:
    """The user's cache folder for this package, by the platform's rules; need not exist.

    On Linux ``$XDG_CACHE_HOME/sparse_runtime``, by default ``~/.cache/sparse_runtime``.
    """
    return user_cache_path("sparse_runtime", appauthor=False)


def free_space(path: Path) -> int:
    """Bytes free where a path is, or is to be."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path``; on leaving, flush it to disk and rename it to ``path``.

    If anything is raised inside, the temporary file is removed and ``path`` stays as it was. Any number
    of threads and processes may write one path: it is always one of theirs, whole. The file's mode
    follows the umask.

    Raises:
        OutputFolderError: the file could not be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _create(temporary)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # not there, or its folder is none
            temporary.unlink()
        if _is_io_failure(error):
            raise OutputFolderError(_explain(path, error)) from error
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; on leaving, flush its files and rename it to ``path``.

    If anything is raised inside, the temporary folder is removed and ``path`` stays as it was. Modes
    follow the umask.

    Args:
        path: new, or an empty folder.

    Raises:
        OutputFolderError: ``path`` is a file or holds something, or nothing could be written.
    """
    check_new_folder(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as stream:
                    os.fsync(stream.fileno())
                os.chmod(file, mode)
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_io_failure(error):
            raise OutputFolderError(_explain(path, error)) from error
        raise


def check_new_folder(path: Path) -> None:
    """Check that there is nothing at ``path``, or an empty folder.

    Raises:
        OutputFolderError: it is a file, or holds something.
    """
    if path.exists() and not path.is_dir():
        raise OutputFolderError(f"{path} is a file; expected a new or empty folder")
    if path.is_dir() and (found := min((p.name for p in path.iterdir()), default=None)):
        raise OutputFolderError(
            f"{path} exists and holds {found}; choose a new or empty folder, or delete it"
        )


def is_temporary(path: Path) -> bool:
    """Whether a file is one of :func:`atomic_path`'s, being written or left by a killed process."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files in a folder that nobody has written to for an hour."""
    for path in folder.iterdir():
        with suppress(OSError):  # another process was first
            if is_temporary(path) and time.time() - path.stat().st_mtime > _STALE_AFTER:
                path.unlink()


def copy_file(source: Path, path: Path) -> None:
    """Copy a file, atomically. Raises OutputFolderError like :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, atomically. Raises OutputFolderError like :func:`atomic_path`."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """A value as JSON, see :func:`finite`."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A JSON value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically. Raises OutputFolderError like :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_output(path: Path, text: str) -> None:
    """Write text where a user asks for it.

    A pipe, a device, or what this process prints to (``/dev/stdout``) is written to as it is. All else
    is written atomically; of a symlink, the file that it leads to.

    Raises:
        OutputFolderError: it could not be written.
    """
    if not is_stream(path):
        write_text(Path(os.path.realpath(path)), text)
        return
    try:
        with open(_descriptor(path), "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise OutputFolderError(_explain(path, error)) from error


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device, or leads to what this process prints to."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _printed_to(path) is not None


def _descriptor(path: Path) -> int:
    """A descriptor to write a stream with; of what is printed to, one that goes on where it is."""
    printed_to = _printed_to(path)
    if printed_to is None:
        return os.open(path, os.O_WRONLY)
    sys.stdout.flush()
    return os.dup(printed_to)


def _printed_to(path: Path) -> int | None:
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
    return None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors to a file, atomically. Raises OutputFolderError like :func:`atomic_path`.

    Args:
        path: the file.
        tensors: contiguous, on the CPU.
        metadata: one key at most: safetensors writes several in another order in every process.
    """
    assert len(metadata) <= 1, f"metadata keys {sorted(metadata)} would be written in random order"
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _create(path: Path) -> int:
    """Create an empty file and return its mode.

    The kernel takes the umask off the mode: reading it would mean setting it, for all threads. Writers
    such as safetensors put a file of their own, for nobody else to read, in this one's place.
    """
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(file).st_mode)
    finally:
        os.close(file)


def _is_io_failure(error: BaseException) -> bool:
    # safetensors reports failed writes as its own error type, with the operating system's words.
    return isinstance(error, OSError) or "I/O error" in str(error) or "os error" in str(error)


def _explain(path: Path, error: BaseException) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        free = free_space(path.parent)
        return (
            f"{path} could not be written: the disk is full ({free / 2**20:.0f} MiB free). Free some "
            "space or choose another output folder, then run the same command again"
        )
    return f"{path} could not be written: {error}. Choose another output folder"
