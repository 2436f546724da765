"""Requests that fail, in OpenAI's words."""

from __future__ import annotations

from typing import Any


class RequestFailure(Exception):
    """A request that gets no answer, or no whole one.

    Args:
        message: what was found, what was expected.
        status: of HTTP.
        kind: OpenAI's ``type``.
        param: the field that it is about.
        code: OpenAI's ``code``.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def too_long(message: str, param: str = "messages") -> RequestFailure:
    """A prompt, or a length that is asked for, beyond a limit."""
    return RequestFailure(message, param=param, code="context_length_exceeded")


def stopping() -> RequestFailure:
    """The server is being ended."""
    return RequestFailure("the server is stopping", status=503, kind="server_error")
