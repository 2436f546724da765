"""What commands write for machines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparse_runtime.atomic import write_json


def write_figures(json_file: Path | None, value: dict[str, Any]) -> None:
    """Write a command's figures where ``--json`` asks for them."""
    if json_file is not None:
        write_json(json_file, value)


def peak_memory_mib() -> float:
    """Most memory that this process has held, in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 2**20
