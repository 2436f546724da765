"""Progress bars of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sparse_runtime.printable import markup
from sparse_runtime.progress import Advance


class RichProgress:
    """Draws one line per task on stderr, with elapsed and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Open a bar of ``total`` units."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        ) as bars:
            bar = bars.add_task(markup(description), total=total)
            yield lambda units: bars.advance(bar, units)
