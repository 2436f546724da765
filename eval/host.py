"""What a measurement ran on, to stand beside its figures."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparse_runtime.hardware import cpu_name

_PACKAGES = ("sparse-runtime", "torch", "transformers", "accelerate", "safetensors")


def host_record(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Hardware, threads, versions, commit, date and command, as JSON."""
    device = torch.device(device)
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
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


def read_bandwidth_gbps(
    device: torch.device | str = "cpu", *, mib: int = 512, repeats: int = 5
) -> float:
    """Read bandwidth in GB/s (10⁹ bytes): median time of summing a buffer far beyond the caches."""
    buffer = torch.ones(mib * 2**20 // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(repeats + 1):
        _synchronize(device)
        started = time.perf_counter()
        buffer.sum()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return buffer.numel() * 4 / statistics.median(seconds[1:]) / 1e9


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this code runs from; None when installed elsewhere."""
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
