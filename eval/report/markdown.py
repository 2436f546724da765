"""Markdown that the reports share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# What Markdown or the HTML inside it would read as a sign; underscores inside words are none.
_SIGNS = str.maketrans({sign: f"\\{sign}" for sign in "\\`*[]|~#"} | {"<": "&lt;", "&": "&amp;"})


def escaped(text: str) -> str:
    """Text out of a file of figures, to stand in Markdown as it is; also in a table's cell."""
    return " ".join(text.translate(_SIGNS).split())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def records_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A table of records by the names of their fields; a dash stands for None."""
    return markdown_table(
        [column.replace("_", " ") for column in columns],
        ([cell(row[name]) for name in columns] for row in rows),
    )


def cell(value: Any) -> str:
    """A figure or text of a table; a dash stands for None."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else escaped(str(value))


def run_line(host: dict[str, Any]) -> str:
    """When and where figures were made, and by which command, from a ``host_record``."""
    machine = f"{host['date']}, {host['cpu']}, {host['threads']} threads, torch "
    machine += f"{host['versions']['torch']}, commit {host['commit'] or 'unknown'}."
    return f"{escaped(machine)}\n\n{command_block(host)}"


def command_block(host: dict[str, Any]) -> str:
    """The command of a ``host_record``, indented as code, where no sign has a meaning."""
    return f"    {' '.join(host['command'].split())}\n"
