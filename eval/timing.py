"""Timing that the benchmarks share: tokens as they come, and calls that take turns."""

from __future__ import annotations

import itertools
import time
from typing import Protocol

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class _Printer(Protocol):
    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class TokenClock(BaseStreamer):
    """A streamer that notes when the prompt and each token arrive.

    Args:
        printer: another streamer that the tokens are handed on to.
    """

    def __init__(self, printer: _Printer | None = None) -> None:
        self._printer = printer
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by ``generate`` with the prompt, then with each new token."""
        self._times.append(time.perf_counter())
        if self._printer is not None:
            self._printer.put(value)

    def end(self) -> None:
        """Called when generation ends."""
        if self._printer is not None:
            self._printer.end()

    @property
    def prompt_seconds(self) -> float:
        """From the start of generation to the first new token, which the prompt's run gives."""
        return self._times[1] - self._times[0]

    @property
    def steps(self) -> list[float]:
        """Seconds of each decode step: one for every new token but the first."""
        tokens = self._times[1:]
        return [b - a for a, b in itertools.pairwise(tokens)]
