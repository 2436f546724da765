"""Text as its tokens come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparse_runtime.errors import ConfigError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Tokens of the prompt that a continuation is decoded behind: some tokenizers drop the space in front of
# a text's first word.
_CONTEXT = 8
# Bytes of a character at most, and so the tokens that one may be spread over.
_LONGEST_CHARACTER = 4


class StopStrings:
    """Cuts a growing text in front of the first of some strings.

    Args:
        strings: none of them empty.

    Attributes:
        strings: the same.
        found: the string that ended the text; None as long as it goes on.

    Raises:
        ConfigError: one is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise ConfigError("a stop string is empty, which every text has; expected some text")
        self.strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What is certain to come before a stop string, of all that was fed and not given back yet."""
        if self.found is not None:
            return ""
        self._held += text
        places = {stop: self._held.find(stop) for stop in self.strings}
        hits = [(place, -len(stop), stop) for stop, place in places.items() if place >= 0]
        if hits:
            place, _, self.found = min(hits)
            return self._give(place)
        return self._give(len(self._held) - max(map(self._begun, self.strings), default=0))

    def rest(self) -> str:
        """What was held back, where the text ended without the stop string that it began."""
        return "" if self.found is not None else self._give(len(self._held))

    def _begun(self, stop: str) -> int:
        """Characters at the end of the held text that a stop string begins with."""
        longest = min(len(stop) - 1, len(self._held))
        lengths = range(longest, 0, -1)
        return next((size for size in lengths if self._held.endswith(stop[:size])), 0)

    def _give(self, size: int) -> str:
        given, self._held = self._held[:size], self._held[size:]
        return given


class TextStream:
    """Decodes tokens one by one and hands on the text.

    Args:
        tokenizer: of the model.
        show: is told each piece of text, and never an empty one.
        stop: the text ends in front of the first of these.
        context: token ids in front of the text, which is the continuation of theirs.

    Attributes:
        text: all that was shown.

    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Any,
        show: Callable[[str], object] | None = None,
        *,
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._stop = StopStrings(stop)
        # The tokens of a window are decoded together: a word may look different on its own.
        self._window = list(context[-_CONTEXT:])
        self._known = self._decode(self._window)
        self._fresh = 0
        self.text = ""

    @property
    def stopped(self) -> bool:
        """A stop string came."""
        return self._stop.found is not None

    def put(self, token: int) -> None:
        """The next token."""
        self._window.append(token)
        self._fresh += 1
        text = self._decode(self._window)
        if text.endswith(_UNFINISHED) and self._fresh < _LONGEST_CHARACTER:
            return  # bytes of a character whose others are still to come
        self._give(self._stop.feed(text[len(self._known) :]))
        self._window = self._window[-self._fresh :]
        self._known = self._decode(self._window)
        self._fresh = 0

    def end(self) -> None:
        """No token follows: show what was held back."""
        if self._fresh:
            self._give(self._stop.feed(self._decode(self._window)[len(self._known) :]))
        self._give(self._stop.rest())

    def _give(self, text: str) -> None:
        self.text += text
        if text and self._show is not None:
            self._show(text)

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
