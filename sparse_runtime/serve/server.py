"""The process side: a port of its own, and an end that open streams hear of."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from sparse_runtime.errors import SparseRuntimeError

#: Seconds for clients to take what is left of their answers when the server ends.
_GRACE = 5


def claim_port(host: str, port: int) -> socket.socket:
    """Bind an address; nothing is accepted there before the server runs.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        SparseRuntimeError: it is taken, or not one of this machine.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        if bound is not None:
            bound.close()
        reason = getattr(error, "strerror", None) or error
        raise SparseRuntimeError(
            f"{host}:{port} cannot be served: {reason}. Choose another --port (0: any that is free), "
            "or end what listens there"
        ) from error
    return bound


class Server(uvicorn.Server):
    """uvicorn's, which tells the app as soon as it is asked to end.

    uvicorn itself waits for open answers to come to their end, then cuts them off.

    Args:
        app: the application.
        started: called once connections are accepted.
        stop: called at every signal that asks for the end.
    """

    def __init__(self, app: Any, *, started: Callable[[], None], stop: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE
            )
        )
        self._tell_started = started
        self._stop = stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        self._tell_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of SIGINT and SIGTERM."""
        self._stop()
        super().handle_exit(sig, frame)
