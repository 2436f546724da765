"""Timing that the benchmarks share: tokens as they come, and calls that take turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

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


def wall_seconds(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, for work that is done when it returns."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turns(
    calls: Mapping[str, Callable[[int], Callable[[], Any]]],
    rounds: int,
    *,
    seconds: Callable[[Callable[[], Any]], float] = wall_seconds,
    before_round: Callable[[int], None] | None = None,
    slow_seconds: float = float("inf"),
) -> dict[str, float]:
    """Median seconds of calls that take turns, so that drift of the machine hits all of them.

    Args:
        calls: name -> a function of the round's number that gets ready, untimed, and returns the call.
        rounds: how many, after one that warms up.
        seconds: times a call.
        before_round: is told the number of each round, the first one's too.
        slow_seconds: a call that takes longer than this is timed three times only.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        if before_round is not None:
            before_round(number)
        for name, prepare in calls.items():
            if len(taken[name]) >= 4 and min(taken[name]) > slow_seconds:
                continue
            taken[name].append(seconds(prepare(number)))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}
