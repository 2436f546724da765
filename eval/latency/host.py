"""What a measurement ran on, to stand beside its figures."""

from __future__ import annotations

import functools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparse_runtime.kernels import load_cpu_library

# Of this project's own pyproject.toml.
_PROJECT = 'name = "sparse-runtime"'
_PACKAGES = ("sparse-runtime", "torch", "transformers", "accelerate", "safetensors")


@functools.cache
def cpu_name() -> str:
    """Name of the processor, as it calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def host_record(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Hardware, threads, versions, commit, date and command, as JSON."""
    device = torch.device(device)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
    return record


class ReadBandwidth:
    """Measures read bandwidth by summing a buffer far beyond the caches.

    On a CPU with the C++ library it is read by that library's fastest reading loop, on the threads
    that the kernels use: the limit that any of them can reach.

    Args:
        device: whose memory.
        mib: size of the buffer.
    """

    def __init__(self, device: torch.device | str = "cpu", *, mib: int = 512) -> None:
        self._device = device
        self._buffer = torch.ones(mib * 2**17, dtype=torch.int64, device=device)
        self._read: Callable[[torch.Tensor], object] = torch.sum
        if torch.device(device).type == "cpu" and load_cpu_library():
            self._read = torch.ops.sparse_runtime.cpu_read
        self()  # the first call touches the pages

    def __call__(self, repeats: int = 3) -> float:
        """GB/s (10⁹ bytes), median of a few readings."""
        seconds = []
        for _ in range(repeats):
            _synchronize(self._device)
            started = time.perf_counter()
            self._read(self._buffer)
            _synchronize(self._device)
            seconds.append(time.perf_counter() - started)
        return self._buffer.numel() * 8 / statistics.median(seconds) / 1e9


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this code runs from; None when installed elsewhere.

    An environment inside somebody else's repository has that one's commit, which says nothing here.
    """
    folder = Path(__file__).resolve().parent
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    try:
        project = (Path(top) / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    return _git(folder, "describe", "--always", "--dirty") if _PROJECT in project else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
