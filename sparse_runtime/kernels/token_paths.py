"""Which path is fastest for a call of n tokens: measured where it runs, once, and remembered.

Sparse tokens read the union of their sets, so the more tokens a call has, the less is skipped; and a
machine with matrix units favors dense calls earlier than one without. Nobody can tell the switch-over
point from the shapes, but a few timed calls can.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from sparse_runtime.atomic import write_json
from sparse_runtime.errors import OutputFolderError
from sparse_runtime.user_cache import cache_folder

#: ``sparse``: rows of the tokens' clusters. ``rows``: all rows, by the same kernels. ``torch``: the
#: original module.
PATHS = ("sparse", "rows", "torch")
#: Calls of more tokens than this are dense unless everything is asked to be sparse.
MAX_SPARSE_TOKENS = 64
# Any larger call is judged by a call of this size.
_MANY_TOKENS = 256
_ROUNDS = 5
# Calls so short that noise is as long as they are get more rounds, up to this many or so long.
_MOST_ROUNDS = 40
_ENOUGH_SECONDS = 0.05
# A path that takes longer than this needs no more rounds to be told from the others.
_SLOW_SECONDS = 0.2
_FLUSHED_BYTES = 64 * 2**20
_FILE = "token_paths.json"


class PathTable:
    """The fastest path by number of tokens, for FFNs of one shape on this machine.

    Args:
        key: everything that the answer depends on; answers are kept under it in the user's cache
            folder, where that can be written.
    """

    def __init__(self, key: Sequence[Any]) -> None:
        self._key = json.dumps(key)
        self._paths: dict[int, str] | None = None

    def path(
        self, num_tokens: int, candidates: Callable[[int], dict[str, Callable[[], Any]]]
    ) -> str:
        """Return the fastest path for a call of ``num_tokens`` tokens.

        Args:
            num_tokens: in the call; rounded up to a power of two.
            candidates: number of tokens -> path -> a call of such tokens, timed if nothing is known.
        """
        size = bucket(num_tokens)
        if self._paths is None:
            self._paths = {int(n): path for n, path in _read().get(self._key, {}).items()}
        if size not in self._paths:
            self._paths[size] = fastest(candidates(size))
            self._remember()
        return self._paths[size]

    def _remember(self) -> None:
        entries = _read()
        entries[self._key] = {str(n): path for n, path in sorted((self._paths or {}).items())}
        with suppress(OutputFolderError):  # where it cannot be kept it is measured again
            write_json(cache_folder() / _FILE, entries)


def bucket(num_tokens: int) -> int:
    """Round a number of tokens up to the size that stands for it: a power of two, or 256."""
    if num_tokens > MAX_SPARSE_TOKENS:
        return _MANY_TOKENS
    return 1 << (num_tokens - 1).bit_length()


def fastest(candidates: Mapping[str, Callable[[], Any]]) -> str:
    """Time calls in turns, each with cold caches, and return the name of the fastest."""
    buffer = torch.zeros(_FLUSHED_BYTES // 8, dtype=torch.int64)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for number in range(_MOST_ROUNDS):
            if number >= _ROUNDS and max(map(sum, seconds.values())) > _ENOUGH_SECONDS:
                break
            for name, call in candidates.items():
                taken = seconds[name]
                if taken and min(taken) > _SLOW_SECONDS:
                    continue
                buffer.add_(1)  # the weights of a model do not stay in the caches between calls
                started = time.perf_counter()
                call()
                taken.append(time.perf_counter() - started)
    return min(seconds, key=lambda name: statistics.median(seconds[name]))


def _read() -> dict[str, dict[str, str]]:
    try:
        entries = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        key: paths
        for key, paths in entries.items()
        if isinstance(paths, dict)
        and all(n.isdecimal() and path in PATHS for n, path in paths.items())
    }
