"""Tensors too large for memory, in files that the operating system pages in as needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from sparse_runtime.errors import OutputFolderError
from sparse_runtime.files import free_space


class Buffer:
    """A tensor on the CPU, in a file of its own where it would exceed a bound.

    Attributes:
        values: the tensor, uninitialized at first.

    Raises:
        OutputFolderError: the disk has no room for the file.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, *, memory_mib: int, spill_file: Path
    ) -> None:
        size = prod(shape)
        num_bytes = size * dtype.itemsize
        self._spill_file: Path | None = None
        if num_bytes <= memory_mib * 2**20:
            self.values = torch.empty(*shape, dtype=dtype)
        else:
            self._spill_file = spill_file
            _reserve(spill_file, num_bytes)
            self.values = torch.from_file(
                str(spill_file), shared=True, size=size, dtype=dtype
            ).view(*shape)

    def close(self) -> None:
        """Free the tensor and remove its file, if it has one."""
        self.values = torch.empty(0)
        if self._spill_file is not None:
            self._spill_file.unlink(missing_ok=True)


class Buffers:
    """Makes buffers, which go when the context ends.

    Args:
        memory_mib: bound on each buffer that is held in memory.
        folder: of its own, where the others go; a temporary one if None.
    """

    def __init__(self, memory_mib: int = 1024, folder: Path | None = None) -> None:
        self._memory_mib = memory_mib
        self._folder = folder
        self._made: list[Buffer] = []

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make an uninitialized tensor.

        Raises:
            OutputFolderError: the disk has no room for it.
        """
        if self._folder is None:
            self._folder = Path(mkdtemp())
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"buffer_{len(self._made)}.bin"
        self._made.append(Buffer(shape, dtype, memory_mib=self._memory_mib, spill_file=file))
        return self._made[-1].values

    def __enter__(self) -> Buffers:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self._made:
            buffer.close()
        self._made = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _reserve(file: Path, size: int) -> None:
    """Make a file of ``size`` bytes that the disk has room for.

    A mapped file without its space kills the process (SIGBUS) once the disk is full.
    """
    try:
        with open(file, "wb") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)
            else:
                _check_free(file, size)
                opened.truncate(size)
    except OSError as error:
        file.unlink(missing_ok=True)
        free = free_space(file.parent)
        raise OutputFolderError(
            f"{file} could not be made: it needs {size} bytes, and {free} are free ({error}). Free "
            "some space, choose another output folder, lower max_tokens, or raise memory_mib to keep "
            "it in memory"
        ) from error


def _check_free(file: Path, size: int) -> None:
    if free_space(file.parent) < size:
        raise OSError("no space left on the disk")
