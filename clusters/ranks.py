"""Several processes that build one artifact together, on ``torch.distributed``.

Text is read by the first; windows and layers are split. What one process has found and others need is
gathered, so that all come to the same decisions; the first writes. They share the working folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes, and which one this is.

    Attributes:
        rank: number of this one.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of the process group that is initialized, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of items, every ``count``-th."""
        return [*items[self.rank :: self.count]]

    def rows(self, number: int) -> range:
        """This process's share of so many rows, neighbors together."""
        return range(number * self.rank // self.count, number * (self.rank + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """What all processes have, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count > 1:
            value = value.contiguous()
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()

    def by_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all; what it raises is raised by all."""
        if self.count == 1:
            return make()
        sent: list[Any] = [_outcome(make) if self.first else None]
        dist.broadcast_object_list(sent)
        value, failure = sent[0]
        if failure is not None:
            raise failure
        made: T = value
        return made

    def together(self, work: Callable[[], T]) -> list[T]:
        """What each process makes; where one fails, all raise its error rather than wait for it."""
        if self.count == 1:
            return [work()]
        results = self.gather(_outcome(work))
        for _, failure in results:
            if failure is not None:
                raise failure
        values: list[Any] = [value for value, _ in results]
        return values


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a function gives, or raises."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """Items that :meth:`Ranks.mine` has split, back in their order."""
    count, total = len(parts), sum(map(len, parts))
    return [parts[number % count][number // count] for number in range(total)]


def joined(parts: Sequence[Sequence[T]]) -> list[T]:
    """Items that :meth:`Ranks.rows` has split, back in their order."""
    return [item for part in parts for item in part]
