"""ASGI over a Unix socket: a worker hands a request that is not its own to the supervisor's application.

One connection for each request. It carries frames, a length and msgpack: the request's head, then parts of its body,
and the other way the answer's head and parts of its body. Each side writes no faster than the other reads. The worker
ends the connection, when it has the whole answer or its client has hung up, so a load whose client leaves ends as
without workers. The supervisor waits for that: were it to close first, a part of the body that is still to be written
would find no reader, and with this error the worker would lose an answer that it has not read yet.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multilora.errors import EngineDead
from multilora.server.errors import error_response

logger = logging.getLogger(__name__)

HEAD_FIELDS = ("method", "path", "raw_path", "query_string", "headers", "client", "server", "scheme", "http_version")
LENGTH_BYTES = 4
SKIPPED_BYTES = 1 << 16
"""At a time, of what comes after the answer."""
BACKLOG = 4096
"""Connections that wait for the supervisor to take them, where the system allows so many;"""
FULL_SECONDS = 0.01
"""where it does not, one that found no room tries again after so long,"""
PATIENCE_SECONDS = 10.0
"""for so long."""


class Forwarder:
    """ASGI application that answers with what the supervisor's answers. path: of its socket."""

    def __init__(self, path: str):
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(sock=await self._connect())
        except OSError:
            await _unreachable(scope, receive, send)
            return
        body: asyncio.Task[None] | None = None
        try:
            with contextlib.suppress(ConnectionError):  # there is no answer then, which is said below
                await _write(writer, {name: scope.get(name) for name in HEAD_FIELDS})
            body = asyncio.create_task(_send_body(receive, writer))
            if not await _copy_answer(reader, send):
                await _unreachable(scope, receive, send)
        except OSError:
            logger.debug("a forwarded request has ended on one of its sides")
        finally:
            if body is not None:
                body.cancel()
                await asyncio.gather(body, return_exceptions=True)
            writer.close()

    async def _connect(self) -> socket.socket:
        """Event loops take a full backlog for a failure, or even for a connection. Raises OSError."""
        end = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            while True:
                try:
                    connection.connect(self._path)  # at once, or not at all
                    return connection
                except BlockingIOError:
                    if asyncio.get_running_loop().time() > end:
                        raise
                await asyncio.sleep(FULL_SECONDS)
        except BaseException:
            connection.close()
            raise


class RelayServer:
    """The supervisor's side. app: its application; before: awaited for each request with its path, before the
    application is called; settled: before its answer leaves."""

    def __init__(
        self, app: ASGIApp, before: Callable[[str], Awaitable[None]], settled: Callable[[], Awaitable[None]]
    ):
        self._app = app
        self._before = before
        self._settled = settled
        self._server: asyncio.Server | None = None
        self._requests: set[asyncio.Task[None]] = set()

    async def start(self, path: Path) -> None:
        """Take requests on a socket at this path."""
        self._server = await asyncio.start_unix_server(self._connected, path, backlog=BACKLOG)

    async def close(self) -> None:
        """Take no further ones, and end those that are there."""
        if self._server is not None:
            self._server.close()
        for task in list(self._requests):
            task.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            logger.debug("a worker has ended a forwarded request")
        except asyncio.CancelledError:
            logger.debug("a forwarded request is ended")
        finally:
            self._requests.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await _read(reader)
        version = {"version": "3.0", "spec_version": "2.3"}
        scope = {"type": "http", "asgi": version, "root_path": "", "state": {}, **head}
        scope["headers"] = [tuple(pair) for pair in head["headers"]]
        for name in ("client", "server"):
            scope[name] = None if head[name] is None else tuple(head[name])

        async def receive() -> Message:
            try:
                return dict(await _read(reader))
            except (OSError, asyncio.IncompleteReadError):
                return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._settled()
                message = {**message, "headers": list(message.get("headers", ()))}
            with contextlib.suppress(ConnectionError):  # `receive` says that the client is gone
                await _write(writer, message)

        await self._before(scope["path"])
        try:
            await self._app(scope, receive, send)
        except Exception:  # it has answered with 500
            logger.exception("error inside a forwarded request")
        while await reader.read(SKIPPED_BYTES):  # until the worker has closed
            pass


async def _send_body(receive: Receive, writer: asyncio.StreamWriter) -> None:
    """The request's body, and at last the client's hang-up."""
    with contextlib.suppress(ConnectionError):
        while (message := await receive())["type"] == "http.request":
            await _write(writer, message)
        writer.close()


async def _copy_answer(reader: asyncio.StreamReader, send: Send) -> bool:
    """Whether there was any."""
    begun = False
    while True:
        try:
            message = await _read(reader)
        except (OSError, asyncio.IncompleteReadError):
            return begun
        begun = True
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            return True


async def _unreachable(scope: Scope, receive: Receive, send: Send) -> None:
    error = EngineDead("the process that holds the engine does not answer; try again later")
    await error_response(error)(scope, receive, send)


async def _write(writer: asyncio.StreamWriter, content: Any) -> None:
    data = msgspec.msgpack.encode(content)
    writer.write(len(data).to_bytes(LENGTH_BYTES, "big"))
    writer.write(data)
    await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Any:
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
    return msgspec.msgpack.decode(await reader.readexactly(length))
