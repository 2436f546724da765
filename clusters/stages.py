"""The stages of a build: what each took, and how far along the whole of them is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sparse_runtime.clusters.memory import is_out_of_memory
from sparse_runtime.errors import NotEnoughMemoryError
from sparse_runtime.progress import Advance, ProgressReporter

# Bounds on how much slower than expected a machine is taken to be, from the stages that are done.
_PACES = (0.5, 4.0)


class Stages:
    """A reporter of progress that times stages, and draws a bar over all of them.

    The bar's units are the seconds that were expected. Within a stage it moves with time, and no
    further than to the stage's end.

    Args:
        reporter: draws the bars.
        seconds: filled with what each stage took.
        expected: stage -> seconds, in order; without it there is no bar over all.
    """

    def __init__(
        self,
        reporter: ProgressReporter,
        seconds: dict[str, float],
        expected: Mapping[str, float] | None = None,
    ) -> None:
        self._reporter, self.seconds, self._expected = reporter, seconds, dict(expected or {})
        self._whole: Advance | None = None
        self._drawn = self._done = self._spent = 0.0
        self._stage: tuple[float, float] | None = None

    @contextmanager
    def all(self) -> Iterator[None]:
        """Draw the bar over all stages inside the context."""
        total = sum(self._expected.values())
        if not total:
            yield
            return
        with self._reporter.task("build", round(total, 1)) as self._whole:
            yield
            self._draw(total)
        self._whole = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the block for a stage.

        Raises:
            NotEnoughMemoryError: it ran out of memory.
        """
        started, expected = time.perf_counter(), self._expected.get(name, 0.0)
        self._stage = started, expected
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise NotEnoughMemoryError(
                f"the stage {name!r} ran out of memory ({reason}); lower memory_mib, the bound on "
                "buffers, or window, or have the model's layers left on the disk (--offload). What was "
                "worked out before is kept: the same build goes on from there"
            ) from error
        self._stage = None
        self.seconds[name] = time.perf_counter() - started
        self._done += expected
        self._spent += self.seconds[name]
        self._draw(self._done)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Advance]:
        """Open a bar for a part of a stage."""
        with self._reporter.task(description, total) as advance:

            def both(units: float) -> None:
                advance(units)
                self._move()

            yield both

    def _move(self) -> None:
        if self._stage is None:
            return
        started, expected = self._stage
        least, most = _PACES
        pace = min(max(self._spent / self._done, least), most) if self._done else 1.0
        self._draw(self._done + min(expected, (time.perf_counter() - started) / pace))

    def _draw(self, done: float) -> None:
        if self._whole is not None and done > self._drawn:
            self._whole(done - self._drawn)
            self._drawn = done
