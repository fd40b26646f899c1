"""HTTP served by this process, beside engine and registry: the face of a server without --front-workers."""

import socket
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from starlette.types import ASGIApp

from multilora.config import Config
from multilora.server.uvicorn_setup import WRITE_SECONDS, QuietServer, uvicorn_config


class HttpFace(Protocol):
    """What serves HTTP for `serve.py`: this process, or several others (`workers/pool.py`)."""

    async def serve(self, ready: Callable[[], None]) -> None:
        """Serve until `drain`, and until what runs then has ended. `ready`: called once connections are taken."""

    def drain(self) -> None:
        """Take no further connections, and let what runs end."""

    def close_connections(self) -> None:
        """Wait for nobody: clients that do not read hold up nobody."""

    def reload_keys(self) -> None:
        """--auth-file has been read again."""


class OneProcess:
    """See `HttpFace`. The listener is bound, and listened to here."""

    def __init__(
        self, app: ASGIApp, listener: socket.socket, config: Config, tls: Mapping[str, Any], max_connections: int
    ):
        self._listener = listener
        settings = uvicorn_config(app, max_connections, config.drain_seconds + WRITE_SECONDS, tls)
        self._server = QuietServer(settings)

    async def serve(self, ready: Callable[[], None]) -> None:
        self._server.on_started = ready
        await self._server.serve(sockets=[self._listener])

    def drain(self) -> None:
        self._server.should_exit = True

    def close_connections(self) -> None:
        for task in self._server.server_state.tasks:
            task.cancel()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    def reload_keys(self) -> None:
        """The application's keys are the very ones that were read again."""
