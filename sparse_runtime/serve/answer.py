"""One answer while it is generated: tokens in, pieces of text out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import StoppingCriteria

from sparse_runtime.serve.parts import AnswerParser, Piece


class Cut:
    """Passes text on up to the first of some strings, and holds back what may become one.

    Args:
        stops: the strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Take some text; return what can be shown by now."""
        if self.found:
            return ""
        self._held += text
        starts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        keep = max(map(self._open, self._stops), default=0)
        shown = len(self._held) - keep
        text, self._held = self._held[:shown], self._held[shown:]
        return text

    def end(self) -> str:
        """What was held back and did not become one."""
        return "" if self.found else self._held

    def _open(self, stop: str) -> int:
        """Characters at the end of the held text that begin a string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class Answer(StoppingCriteria):
    """Follows one answer as the stopping criterion of its ``generate``.

    As a streamer it would see a token after the decision whether to stop; so it sees it before, and a
    stop string or a client that has left ends the answer at that very token.

    Args:
        tokenizer: of the model, a fast one.
        emit: called with every piece, in the thread that generates.
        end_tokens: that end an answer.
        stops: strings that do; they are not part of it.
        parser: of the model's answers.

    Attributes:
        tokens: new token ids so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        emit: Callable[[Piece], None],
        *,
        end_tokens: Collection[int] = (),
        stops: Sequence[str] = (),
        parser: AnswerParser | None = None,
    ) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._emit = emit
        self._end_tokens = end_tokens
        self._parser = parser
        # A parser knows a model's special tokens for what they are.
        self._stream = DecodeStream(skip_special_tokens=parser is None)
        self._cut = Cut(stops)
        self._cancelled = threading.Event()
        self._times: list[float] = []
        self._calls = False
        self._seen = ""
        self.tokens: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Take the newest of the token ids [1, n]; whether the answer ends here, as [1] bool."""
        self._times.append(time.perf_counter())
        token = int(input_ids[0, -1])
        self.tokens.append(token)
        if not self._is_hidden(token):
            self._read(self._stream.step(self._tokenizer, token) or "")
        ended = self._cut.found or self.cancelled
        return torch.tensor([ended], device=input_ids.device)

    def end(self) -> None:
        """Pass on what was held back; call it once, after the last token."""
        # The stream waits for whole characters; these are the bytes of one that never came.
        ids = [token for token in self.tokens if not self._is_hidden(token)]
        whole = self._tokenizer.decode(ids, skip_special_tokens=self._parser is None)
        if whole.startswith(self._seen):
            self._read(whole[len(self._seen) :])
        if self._parser is not None:
            self._pass_on(self._parser.end())
        if rest := self._cut.end():
            self._emit(Piece(rest))

    def cancel(self) -> None:
        """Ask for the end of the answer, from any thread; it comes with the next token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for its end."""
        return self._cancelled.is_set()

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for why it ended."""
        if self._calls:
            return "tool_calls"
        ended = self._cut.found or (bool(self.tokens) and self.tokens[-1] in self._end_tokens)
        return "stop" if ended else "length"

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there is none."""
        if len(self._times) < 2:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    def _is_hidden(self, token: int) -> bool:
        """Whether it ends the answer without a part in it; a parser wants to see it."""
        return self._parser is None and token in self._end_tokens

    def _read(self, text: str) -> None:
        self._seen += text
        if text:
            self._pass_on([Piece(text)] if self._parser is None else self._parser.feed(text))

    def _pass_on(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._calls = self._calls or piece.tool_call is not None
            if not piece.text:
                self._emit(piece)
            elif text := self._cut.feed(piece.text):
                self._emit(Piece(text))
