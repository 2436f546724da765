"""What the sparse FFNs of one model share; nothing that a call computes depends on earlier calls."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# Long calls in a row after which somebody is scoring text rather than generating it: a prompt, even one
# in two chunks, is followed by decode steps.
_SCORING_CALLS = 3


class DenseSwitch(threading.local):
    """Whether the current thread runs a model's original FFNs; each thread sees its own state.

    A ``threading.local`` and not a ``ContextVar``, because torch.compile guards on the former and
    cannot trace the latter: a compiled call follows the same switch. It guards on what ``__init__``
    sets, but not on a class attribute (torch 2.13).

    Attributes:
        depth: contexts that this thread is inside of; the original FFNs run where it is not 0.
        reason: why, by the name that is counted.
        rows: of the batch that runs, the sequences for which alone the guard asks for all neurons;
            None where all are treated alike.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.reason = "dense()"
        self.rows: Sequence[bool] | None = None

    def __reduce__(self) -> tuple[type[DenseSwitch], tuple[()]]:
        # What threads are doing is not copied with a model.
        return type(self), ()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Run the original FFNs in this thread, inside the context."""
        # Those of the thread that enters: a generator may be closed in another one.
        own = self.__dict__
        own["depth"] += 1
        try:
            yield
        finally:
            # Counted, not restored: contexts may end in any order.
            own["depth"] -= 1

    @contextmanager
    def by_guard(self, rows: Sequence[bool] | None) -> Iterator[None]:
        """Run the original FFNs for the guard: for some sequences of a batch, or for all (None)."""
        before = self.reason, self.rows
        self.reason, self.rows = "guard", rows
        try:
            if rows is None:
                with self.on():
                    yield
            else:
                yield
        finally:
            self.reason, self.rows = before

    @contextmanager
    def sparse(self) -> Iterator[None]:
        """Run the sparse FFNs for the sequences that the guard leaves sparse."""
        before, self.rows = self.rows, None
        try:
            yield
        finally:
            self.rows = before


@dataclass(eq=False)
class ModelState:
    """Shared by the FFNs that one ``sparsify`` patched.

    Attributes:
        switch: see :class:`DenseSwitch`.
        fast_linears: linear layers that this ``sparsify`` made fast, for ``unsparsify`` to undo.
        packing: what this ``sparsify`` packed in planes (``ffn/plane_restoring.py``), likewise; None
            if nothing.
        guard: audits prompts; None without.
    """

    switch: DenseSwitch = field(default_factory=DenseSwitch)
    fast_linears: list[nn.Linear] = field(default_factory=list)
    packing: Any = None
    guard: Any = None
    _warned: set[str] = field(default_factory=set)
    _long_calls: int = 0

    def warn_once(self, topic: str, message: str) -> None:
        """Warn about a topic, the first time in this model's life."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=2)

    def expect_long_calls(self) -> None:
        """Do not warn of text that runs dense: it is meant to."""
        self._warned.add("scoring")

    def note_call(self, num_tokens: int, *, long: bool) -> None:
        """Notice that text is being scored by the dense model, and say so once."""
        self._long_calls = self._long_calls + 1 if long else 0
        if self._long_calls == _SCORING_CALLS:
            self.warn_once(
                "scoring",
                f"{_SCORING_CALLS} calls in a row, the last of {num_tokens} tokens, ran dense: long "
                "calls do, as print(model) says. To score text with the sparse model, as in an "
                'evaluation, sparsify with prefill="sparse"',
            )
