"""Connections within bounds: how many there are, how long one may be silent, how many bytes of headers it may send,
how fast it may send a body that is discarded, and how long it may take nothing.

Owns the limit of file descriptors and uvicorn's protocol with timers. Knows nothing of requests but whether one is
under way; the time for a body is `request_body.py`'s. Used by `serve.py`.
"""

import asyncio
import logging
import resource
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

logger = logging.getLogger(__name__)

HEAD_SECONDS = 30.0
"""From the first byte of a request, or the start of the connection, to the end of its headers."""
STALL_SECONDS = 60.0
"""How long a client may take nothing of what it is sent."""
HEAD_BYTES = 64 << 10
"""How long a request line with its headers may be, or what stands between the pieces of a body and after it. The
parser keeps them, and has no limit of its own; h11, which is used where httptools is missing, has."""
DISCARD_BYTES, DISCARD_SECONDS = 4 << 20, 1 / 16
"""A body whose request has been answered is discarded, and so much of it read in that time: clients come to read the
answer when they have sent all, and whoever sends without end takes little of everybody's time until HEAD_SECONDS are
over."""
MOST_DESCRIPTORS = 65_536
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
FULL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"


def raise_descriptor_limit() -> int:
    """Allow this process, and those that it starts, as many file descriptors as the system lets it. Returns that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def connections_within(descriptors: int) -> int:
    """How many connections leave enough descriptors for files, adapters and processes."""
    return max(1, descriptors - min(256, descriptors // 2))


if TYPE_CHECKING:
    _Protocol = asyncio.Protocol
else:
    _Protocol = AutoHTTPProtocol


_COUNTS_HEADS = hasattr(AutoHTTPProtocol, "on_headers_complete")


class BoundedProtocol(_Protocol):
    """A connection that is closed when it is one too many, silent, sends headers without end, or does not read."""

    max_connections: ClassVar[int]  # of the server; set by `bounded_protocol`

    transport: asyncio.Transport
    connections: set[Any]  # of the server
    cycle: Any  # uvicorn's object of a request; None before the first
    flow: Any  # uvicorn's word about pauses

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # read since the parser had a whole head, or a piece of a body
        self._discarded = 0  # bytes of a body whose request has been answered, since the last pause
        self._pause: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self.transport.write(FULL)
            self.transport.close()
        else:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting_for_head()
        self._stop_waiting_for_reader()
        if self._pause is not None:
            self._pause.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), HEAD_BYTES):  # more than that of a head is not parsed
            piece = data[start : start + HEAD_BYTES] if len(data) > HEAD_BYTES else data
            self._head_bytes += len(piece)
            super().data_received(piece)
            if self._head_bytes > HEAD_BYTES and _COUNTS_HEADS:
                self._refuse_head()
                return
            if self.transport.is_closing():
                return
        if self._between_requests:
            self._wait_for_head()
        else:
            self._stop_waiting_for_head()

    def on_headers_complete(self) -> None:
        """Called by the parser, as the next two."""
        self._head_bytes = self._discarded = 0
        super().on_headers_complete()  # type: ignore[misc]

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)  # type: ignore[misc]
        if self._between_requests:
            self._discarded += len(body)
            if self._discarded >= DISCARD_BYTES and self._pause is None and not self.transport.is_closing():
                self.transport.pause_reading()
                self._pause = asyncio.get_running_loop().call_later(DISCARD_SECONDS, self._read_on)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()  # type: ignore[misc]

    def _read_on(self) -> None:
        self._pause, self._discarded = None, 0
        if not (self.transport.is_closing() or self.flow.read_paused):  # uvicorn, too, may have paused it meanwhile
            self.transport.resume_reading()

    def _refuse_head(self) -> None:
        self._stop_waiting_for_head()
        if self.transport.is_closing():
            return
        if self._between_requests:
            self.transport.write(TOO_LARGE)
            self.transport.close()
        else:  # in the middle of a body, perhaps of an answer
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = asyncio.get_running_loop().call_later(STALL_SECONDS, self._stalled)

    def resume_writing(self) -> None:
        self._stop_waiting_for_reader()
        super().resume_writing()

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_head(self) -> None:
        """The time runs from the first byte; further ones do not prolong it."""
        if self._head is None and not self.transport.is_closing():
            self._head = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._silent)

    def _stop_waiting_for_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_waiting_for_reader(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _silent(self) -> None:
        self._head = None
        if self._between_requests and not self.transport.is_closing():
            self.transport.close()

    def _stalled(self) -> None:
        logger.info("a connection was ended: its client has taken nothing for %g s", STALL_SECONDS)
        self.transport.abort()


def bounded_protocol(max_connections: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol class, with the limits of this module."""
    return type("BoundedProtocol", (BoundedProtocol,), {"max_connections": max_connections})


class AbsoluteTargets:
    """ASGI middleware: a request target with scheme and host, as proxies may send it, means its path."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/"):
            _, found, rest = scope["path"].partition("://")
            if found:
                path = "/" + rest.partition("/")[2]
                scope = dict(scope, path=path, raw_path=path.encode())
        await self.app(scope, receive, send)
