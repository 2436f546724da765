"""Progress bars of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sparse_runtime.printable import markup
from sparse_runtime.progress import Advance


class RichProgress:
    """Draws one line per task on stderr, with elapsed and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console, self._open = console, 0
        self._bars = self._new()

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Open a bar of ``total`` units, below those that are open."""
        if not self._open:
            self._bars = self._new()
            self._bars.start()
        self._open += 1
        number = self._bars.add_task(markup(description), total=total)
        try:
            yield lambda units: self._bars.advance(number, units)
        finally:
            self._open -= 1
            self._close(number)

    def _close(self, number: TaskID) -> None:
        """Leave a line of what a bar came to, above the bars that are open."""
        if not self._open:
            self._bars.stop()
            return
        bar = next(task for task in self._bars.tasks if task.id == number)
        self._bars.remove_task(number)
        elapsed = timedelta(seconds=int(bar.elapsed or 0))
        self._console.print(f"{bar.description} {bar.completed:g}/{bar.total:g} {elapsed}")

    def _new(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
