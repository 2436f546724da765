"""The cache of the last sequence: a chat that goes on from there is not prefilled again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache


@dataclass(frozen=True)
class KeptSequence:
    """Tokens of a prompt and its answer, and the cache that they left.

    Attributes:
        tokens: ids of both; the cache holds all but the last, or fewer.
        prompt_length: how many of them are the prompt.
        cache: as ``generate`` gave it back; handed to it again as it is.
    """

    tokens: Sequence[int]
    prompt_length: int
    cache: Any

    def fit(self, prompt: Sequence[int]) -> int:
        """Make the cache hold what a prompt has in common with it: so many tokens; 0 for no use.

        It is used where the prompt goes on from the answer. Prompts that merely begin alike, or are the
        same, are computed from their first token, so that an answer hangs on its request alone and not
        on who came before.
        """
        held = self.cache.get_seq_length() if isinstance(self.cache, DynamicCache) else 0
        most = min(held, len(prompt) - 1)  # the last token is computed for what follows it
        common = common_length(self.tokens[:most], prompt)
        if common <= self.prompt_length:
            return 0
        if common < held:
            try:
                self.cache.crop(common - held)
            except RuntimeError:  # a sliding window has passed what would be needed
                return 0
        return common


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two sequences have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
