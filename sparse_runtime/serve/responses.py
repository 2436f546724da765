"""OpenAI's response objects."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from sparse_runtime.serve.parts import Piece
from sparse_runtime.serve.served_model import Figures

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def usage(figures: Figures) -> dict[str, Any]:
    """OpenAI's usage; beside it ``cost_share`` and ``dense_share`` as ``/metrics`` has them."""
    return {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.new_tokens,
        "total_tokens": figures.prompt_tokens + figures.new_tokens,
        "prompt_tokens_details": {"cached_tokens": figures.reused_tokens},
        "cost_share": round(figures.cost.cost_share, 6),
        "dense_share": round(1 - figures.cost.sparse_share_of_tokens, 6),
    }


class Responses:
    """The objects of one answer, which share its id.

    Args:
        model: its name.
    """

    prefix: str
    whole: str
    part: str

    def __init__(self, model: str) -> None:
        self._calls = 0
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def response(self, pieces: Sequence[Piece], reason: str, figures: Figures) -> dict[str, Any]:
        """The whole answer."""
        choice = {
            **self._content(pieces),
            "index": 0,
            "logprobs": None,
            "finish_reason": reason,
        }
        return {**self._head, "object": self.whole, "choices": [choice], "usage": usage(figures)}

    def chunk(self, piece: Piece | None, reason: str | None = None) -> dict[str, Any]:
        """A part of a stream; the last one has the reason of the end, and no piece."""
        choice = {
            **self._delta(piece),
            "index": 0,
            "logprobs": None,
            "finish_reason": reason,
        }
        return {**self._head, "object": self.part, "choices": [choice]}

    def usage_chunk(self, figures: Figures) -> dict[str, Any]:
        """The part of a stream that has the usage, and nothing else."""
        return {**self._head, "object": self.part, "choices": [], "usage": usage(figures)}

    def opening(self) -> list[dict[str, Any]]:
        """Parts of a stream before the first piece."""
        return []

    def _content(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, piece: Piece | None) -> dict[str, Any]:
        raise NotImplementedError


class TextResponses(Responses):
    """Of ``/v1/completions``."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def _content(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"text": "".join(piece.text for piece in pieces)}

    def _delta(self, piece: Piece | None) -> dict[str, Any]:
        return {"text": piece.text if piece else ""}


class ChatResponses(Responses):
    """Of ``/v1/chat/completions``."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """A part with the role."""
        chunk = self.chunk(None)
        chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return [chunk]

    def _content(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        calls = [call for piece in pieces for call in self._call(piece)]
        text = "".join(piece.text for piece in pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        if reasoning := "".join(piece.reasoning for piece in pieces):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _delta(self, piece: Piece | None) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece and piece.text:
            delta["content"] = piece.text
        if piece and piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece and (calls := self._call(piece)):
            delta["tool_calls"] = [{"index": self._calls - 1, **call} for call in calls]
        return {"delta": delta}

    def _call(self, piece: Piece) -> list[dict[str, Any]]:
        if piece.tool_call is None:
            return []
        self._calls += 1
        ident = f"call_{self._head['id'][-12:]}_{self._calls - 1}"
        return [{"id": ident, "type": "function", "function": piece.tool_call}]
