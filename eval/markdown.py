"""Markdown that the reports share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are text already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def records_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A table of records by the names of their fields; a dash stands for None."""
    return markdown_table(
        [column.replace("_", " ") for column in columns],
        (
            [
                "–" if row[name] is None else f"{row[name]:.3f}" if isinstance(row[name], float)
                else str(row[name])
                for name in columns
            ]
            for row in rows
        ),
    )  # fmt: skip


def run_line(host: dict[str, Any]) -> str:
    """When and where figures were made, and by which command, from a ``host_record``."""
    return (
        f"{host['date']}, {host['cpu']}, {host['threads']} threads, torch "
        f"{host['versions']['torch']}, commit {host['commit']}.\n\n    {host['command']}\n"
    )
