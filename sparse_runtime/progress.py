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


class TqdmProgress:
    """Draws with transformers' bars, which know notebooks and ``disable_progress_bar()``."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Open a bar of ``total`` units."""
        from transformers.utils.logging import tqdm

        with tqdm(total=total, desc=description) as bar:
            yield bar.update


class SilentProgress:
    """Draws nothing; the default of most library functions."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Open a bar that is not drawn."""
        yield lambda units: None
