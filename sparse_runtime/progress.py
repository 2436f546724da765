"""Progress of long work: library code reports, the command line draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

#: Moves a bar on by a number of units.
Advance = Callable[[float], None]


class ProgressReporter(Protocol):
    """What long-running functions take as ``progress``."""

    def task(self, description: str, total: float) -> AbstractContextManager[Advance]:
        """Open a bar of ``total`` units; the context's value advances it."""
        ...


class SilentProgress:
    """Draws nothing; the default of library functions."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Open a bar that is not drawn."""
        yield lambda units: None
