"""The cache of the last sequence: what the next prompt begins with is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Of every prompt at least so many tokens are run, so that its end runs as it does without a cache:
# calls of one or two tokens are sparse by the CPU's rule (ffn/rule.py), as decode steps are.
_ALWAYS_RUN = 3


@dataclass(frozen=True)
class KeptSequence:
    """Tokens of a sequence, and the cache that they left.

    Attributes:
        tokens: ids, of a prompt and its answer; the cache holds all but the last, or fewer.
        cache: as ``generate`` gave it back; handed to it again as it is.
        least: it is of use to prompts that share more tokens than so many with it: 0 for any, the
            prompt's length for those alone that go on from the answer.
    """

    tokens: Sequence[int]
    cache: Any
    least: int = 0

    def fit(self, prompt: Sequence[int]) -> int:
        """Make the cache hold what a prompt has in common with it: so many tokens; 0 for no use."""
        # Others cannot be cut back to a common beginning.
        if type(self.cache) is not DynamicCache:
            return 0
        held = min(int(self.cache.get_seq_length()), len(self.tokens))
        most = max(min(held, len(prompt) - _ALWAYS_RUN), 0)
        common = common_length(self.tokens[:most], prompt)
        surplus = int(self.cache.get_seq_length()) - common
        if common <= self.least or (surplus and not _can_be_cut(self.cache)):
            return 0
        if surplus:
            self.cache.crop(-surplus)
        return common


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two sequences have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _can_be_cut(cache: DynamicCache) -> bool:
    """Whether tokens can be dropped at a cache's end as if they had never come."""
    return all(
        type(layer) is DynamicLayer
        or (
            type(layer) is DynamicSlidingWindowLayer
            and layer.get_seq_length() < layer.sliding_window
        )
        for layer in cache.layers
    )
