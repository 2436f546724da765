"""The record of a build that an artifact carries: free-form JSON, which may be anybody's."""

from __future__ import annotations

import re
from typing import Any

# 1 to 128 hashes of 64 bits, see ``sparse_runtime.clusters.text.overlap.sketch``.
_SKETCH = re.compile(r"([0-9a-f]{16}){1,128}")


def within(record: Any, *keys: str) -> Any:
    """A value within a record that need not have it, nor be an object; None then."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def objects_within(record: Any, *keys: str) -> list[dict[str, Any]]:
    """The objects of a list within a record; none where there is no list."""
    found = within(record, *keys)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def recorded_sources(data: Any) -> list[dict[str, Any]]:
    """The text sources that a record of calibration text names.

    Args:
        data: ``data`` of a build record, or the record of a ``CalibrationText``.

    Returns:
        Its entries that are objects; none has a ``sketch`` that is not one.
    """
    sources = []
    for source in objects_within(data, "sources"):
        sketch = source.get("sketch")
        if not (isinstance(sketch, str) and _SKETCH.fullmatch(sketch)):
            source = {name: value for name, value in source.items() if name != "sketch"}
        sources.append(source)
    return sources
