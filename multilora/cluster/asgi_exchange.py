"""One request of ASGI as messages that can travel: what the ingress sends, and what comes back of an application.

The body travels whole; the answer comes in pieces, as the application sends them, those that are there already
together. A receiver that stops reading has hung up: the application is told so, as by any server.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope

PIECES_WAITING = 256
"""Messages of an answer that nobody has taken yet, until the application waits."""
TRAVELLING = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


def travelling_scope(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What another process needs of a request's scope."""
    kept = {key: scope[key] for key in TRAVELLING if key in scope}
    kept["headers"] = [(bytes(name), bytes(value)) for name, value in kept.get("headers", ())]
    return kept | {"client": scope.get("client"), "server": scope.get("server")}


async def read_body(receive: Receive, most: int) -> bytes | None:
    """The whole body; None if the client hung up. One that is longer than `most` is cut, by so little that whoever
    reads it sees that it is too long."""
    pieces, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        if size <= most:
            pieces.append(piece[: most + 1 - size])
            size += len(pieces[-1])
        if not message.get("more_body"):
            return b"".join(pieces)


def answers(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any of them brings something of an answer's body."""
    return any(message["type"] == "http.response.body" and message.get("body") for message in messages)


async def run(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
    """What the application sends. Closing the generator hangs up."""
    pieces: asyncio.Queue[Message | None] = asyncio.Queue(PIECES_WAITING)
    hung_up, asked = asyncio.Event(), False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        kept = {key: value for key, value in message.items() if key != "headers"}
        if "headers" in message:
            kept["headers"] = [(bytes(name), bytes(value)) for name, value in message["headers"]]
        await pieces.put(kept)

    async def serve() -> None:
        try:
            await app(scope, receive, send)
        finally:
            await pieces.put(None)

    task = asyncio.create_task(serve())
    try:
        ended = False
        while not ended and (piece := await pieces.get()) is not None:
            together: list[Message] = [piece]
            while not pieces.empty():
                more = pieces.get_nowait()
                if more is None:
                    ended = True
                    break
                together.append(more)
            yield together
        await task
    finally:
        hung_up.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
