"""A stream's frames written to the connection on the spot, past ASGI's `send`, which is a chain of coroutines.

Only where the server is uvicorn with httptools; elsewhere there is no `ChunkWriter`, and streams send as usual. Knows
uvicorn's object of a request (its transport, its flow control), nothing of what is written.
"""

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

KEY = "multilora.chunk_writer"

try:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
except ImportError:  # no httptools
    RequestResponseCycle = None  # type: ignore[assignment,misc]


class ChunkWriter:
    """Writes the body of one answer whose head has been sent, without a length: each piece is one chunk.

    What is written while the connection is not `ready` stays in memory, so `ready` is asked first.
    """

    def __init__(self, cycle: Any):
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    @staticmethod
    def of(scope: Scope) -> "ChunkWriter | None":
        """The one that `OffersChunkWriter` has put there."""
        writer: ChunkWriter | None = scope.get(KEY)
        return writer

    def ready(self) -> bool:
        """Whether the client is there, reads what it is sent, and is being sent chunks."""
        cycle = self._cycle
        sending = cycle.chunked_encoding and not cycle.response_complete
        return sending and not self._flow.write_paused and not cycle.disconnected

    def write(self, data: bytes) -> None:
        """Send some bytes, at least one: an empty chunk would be the end."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class OffersChunkWriter:
    """ASGI middleware, the outermost: sees whose `send` it is, and puts a ChunkWriter for it into the scope."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        if RequestResponseCycle is not None and isinstance(cycle, RequestResponseCycle):
            scope[KEY] = ChunkWriter(cycle)
        await self.app(scope, receive, send)
